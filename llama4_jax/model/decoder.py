"""The decoder's layers, and the passes over all of them: a whole sequence, or a step with a cache."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.model.attention import Attention, Place
from llama4_jax.model.cache import Cache, LayerCache, Step, make_step
from llama4_jax.model.config import LayerSpec, ModelConfig, Precision
from llama4_jax.model.layers import RMSNorm, SwiGLU
from llama4_jax.model.moe import MoE, RouterChoices, RouterStats
from llama4_jax.model.stack import Stack
from llama4_jax.sharding import constrain


class DecoderLayer(nnx.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h))."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, precision: Precision, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, "dtype": precision.params}
        self.attention_norm = RMSNorm(config.embed_dim, **norm)
        self.attention = Attention(config, spec, precision, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, **norm)
        if spec.moe:
            self.moe = MoE(config, precision, rngs=rngs)
        else:
            make = {"std": config.init_std, "dtype": precision.params, "rngs": rngs}
            self.mlp = SwiGLU(config.embed_dim, config.mlp_dim, **make)
        self.spec = spec

    def __call__(
        self,
        x: Float[Array, "B T D"],
        place: Place,
        valid: Bool[Array, "B T"] | None,
        cache: tuple[LayerCache, Step] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, LayerCache | None]:
        attended, layer_cache = self.attention(self.attention_norm(x), place, cache)
        x = constrain(x + attended, "batch", "seq", "embed")
        if self.spec.moe:
            fed, stats = self.moe(self.mlp_norm(x), valid)
        else:
            fed, stats = self.mlp(self.mlp_norm(x)), None
        return constrain(x + fed, "batch", "seq", "embed"), stats, layer_cache


class LayerOutputs(NamedTuple):
    """What was asked for of each layer, in order."""

    hidden: list[Float[Array, "B T D"]]  # after it
    choices: list[RouterChoices]  # of the expert layers


class Decoder(Stack):
    """All layers. A Llama 4 repeats a group of them: three RoPE layers and a NoPE one, dense and experts in turn."""

    def __init__(self, config: ModelConfig, precision: Precision, *, scan_layers: bool, remat: str, key: Array):
        def make(i: int, layer_key: Array) -> DecoderLayer:
            return DecoderLayer(config, config.layers[i], precision, rngs=nnx.Rngs(params=layer_key))

        super().__init__(
            make,
            num_layers=config.num_layers,
            period=config.period,
            scan_layers=scan_layers,
            remat=remat,
            key=key,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        place: Place,
        valid: Bool[Array, "B T"] | None,
        *,
        keep_hidden: bool = False,
        keep_choices: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, LayerOutputs]:
        """Returns the hidden states, the router statistics stacked over the expert layers in order, and what of each
        layer is to be kept."""

        def each(layer, x):
            x, stats, _ = layer(x, place, valid)
            if stats is not None and not keep_choices:
                stats = stats._replace(choices=None)
            return x, (stats, x if keep_hidden else None)

        x, outs = self.run(each, x)
        every = [stats for stats, _ in outs if stats is not None]
        kept = LayerOutputs(
            [hidden for _, hidden in outs if hidden is not None],
            [stats.choices for stats in every if stats.choices is not None],
        )
        every = [stats._replace(choices=None) for stats in every]
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *every) if every else None, kept

    def step(
        self, x: Float[Array, "B T D"], place: Place, cache: Cache, counts: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Runs T new tokens a row after those in the cache; the first counts[b] are real, the others padding.

        Layer by layer whatever the layout: caches of different lengths do not stack, and slicing a scanned cache
        copies it.
        """
        step = make_step(cache.lengths, counts, x.shape[1])
        caches = []
        for layer, layer_cache in zip(self.layers(), cache.layers, strict=True):
            x, _, new = layer(x, place, step.valid, (layer_cache, step))
            caches.append(new)
        return x, Cache(tuple(caches), cache.lengths + counts)

    def map_balance_biases(self, change: Callable[[Array, Array], Array], counts: Float[Array, "layers E"]) -> None:
        """bias = change(bias, counts) in each expert layer, with counts in the order of the layers."""
        scanned = [layer.moe for layer in self.group if layer.spec.moe]
        rest = [layer.moe for layer in self.rest if layer.spec.moe]
        by_repeat = counts[: self.repeats * len(scanned)].reshape(self.repeats, len(scanned), counts.shape[1])
        for i, moe in enumerate(scanned):
            moe.bias[...] = change(moe.bias[...], by_repeat[:, i])
        for moe, layer_counts in zip(rest, counts[self.repeats * len(scanned) :], strict=True):
            moe.bias[...] = change(moe.bias[...], layer_counts)

"""The stack of decoder layers: scanned over its repeating group, or one after another.

A Llama 4 repeats a group of layers (three RoPE layers and a NoPE one, dense and expert layers in turn). `scan`
compiles the group once and runs it as often as it occurs, with the group's parameters stacked; layers that are left
over at the end follow one by one. The numbers of a seed do not depend on the layout.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.model.attention import Attention, Place
from llama4_jax.model.cache import Cache, LayerCache, Step, make_step
from llama4_jax.model.config import LayerSpec, ModelConfig, Precision
from llama4_jax.model.layers import RMSNorm, SwiGLU
from llama4_jax.model.moe import MoE, RouterStats
from sharding import constrain

# `remat`: what the backward pass may keep of each layer, beside the layer's input. "none" keeps all it needs.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of products with parameters
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
            make = {"std": config.init_std, "dtype": precision.params, "matmul": precision.matmul, "rngs": rngs}
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


class Decoder(nnx.Module):
    """All layers. Attributes:

    - group: one module a layer of the repeating group, each parameter stacked over the repetitions; empty if nothing
      is scanned
    - rest: the layers after the repetitions; all of them if nothing is scanned
    """

    def __init__(self, config: ModelConfig, precision: Precision, *, scan_layers: bool, remat: str, key: Array):
        if remat not in ("none", *_REMAT_POLICIES):
            raise ValueError(f"remat must be one of none, {', '.join(_REMAT_POLICIES)}, got {remat!r}.")
        period = config.period
        repeats = config.num_layers // period if scan_layers else 0
        if repeats < 2:  # nothing repeats: stacking one group would only hide its layers
            repeats = 0

        def make(spec: LayerSpec, layer_key: Array) -> DecoderLayer:
            return DecoderLayer(config, spec, precision, rngs=nnx.Rngs(params=layer_key))

        keys = jax.random.split(key, config.num_layers)
        scanned = repeats * period
        self.group = nnx.List(
            [
                _stack_axes(jax.vmap(lambda k, spec=spec: make(spec, k))(keys[i:scanned:period]))
                for i, spec in enumerate(config.layers[: period if repeats else 0])
            ]
        )
        self.rest = nnx.List([make(config.layers[i], keys[i]) for i in range(scanned, config.num_layers)])
        self.repeats = repeats
        self.remat = remat

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, valid: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Returns the hidden states, and the router statistics stacked over the expert layers in order."""

        def run(layers, x):
            collected = []
            for layer in layers:
                x, stats = self._rematerialized(layer, x, place, valid)
                collected += [] if stats is None else [stats]
            return x, collected

        stats = []
        if self.repeats:
            x, scanned = jax.lax.scan(lambda x, group: run(group, x), x, self.group)
            by_repeat = [jax.tree.map(lambda leaf, r=r: leaf[r], scanned) for r in range(self.repeats)]
            stats = [s for repeat in by_repeat for s in repeat]  # in the order of the layers
        x, rest_stats = run(self.rest, x)
        stats += rest_stats
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats) if stats else None

    def _rematerialized(self, layer: DecoderLayer, x, place: Place, valid):
        def run(layer, x):
            x, stats, _ = layer(x, place, valid)
            return x, stats

        if self.remat != "none":
            run = jax.checkpoint(run, policy=_REMAT_POLICIES[self.remat])
        return run(layer, x)

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

    def layers(self) -> list[DecoderLayer]:
        """The layers one by one, in order; those of the scanned group as slices of their stacks."""
        repeats = [jax.tree.map(lambda leaf, r=r: leaf[r], self.group) for r in range(self.repeats)]
        return [*(_unstack_axes(layer) for group in repeats for layer in group), *self.rest]

    def map_balance_biases(self, change: Callable[[Array, Array], Array], counts: Float[Array, "layers E"]) -> None:
        """bias = change(bias, counts) in each expert layer, with counts in the order of the layers."""
        scanned = [layer.moe for layer in self.group if layer.spec.moe]
        rest = [layer.moe for layer in self.rest if layer.spec.moe]
        by_repeat = counts[: self.repeats * len(scanned)].reshape(self.repeats, len(scanned), counts.shape[1])
        for i, moe in enumerate(scanned):
            moe.bias[...] = change(moe.bias[...], by_repeat[:, i])
        for moe, layer_counts in zip(rest, counts[self.repeats * len(scanned) :], strict=True):
            moe.bias[...] = change(moe.bias[...], layer_counts)

    def unscanned(self) -> "Decoder":
        """The same layers with nothing stacked: what decoding wants, since a slice of a stack is a copy."""
        graphdef, state = nnx.split(self)
        copy = nnx.merge(graphdef, state)
        copy.rest, copy.group, copy.repeats = nnx.List(self.layers()), nnx.List([]), 0
        return copy


def _map_axes(module: DecoderLayer, change) -> DecoderLayer:
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(axes=change(variable.axes))
    return module


def _stack_axes(module: DecoderLayer) -> DecoderLayer:
    return _map_axes(module, lambda axes: ("layers", *axes))


def _unstack_axes(module: DecoderLayer) -> DecoderLayer:
    return _map_axes(module, lambda axes: axes[1:])

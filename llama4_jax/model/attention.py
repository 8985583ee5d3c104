"""Llama 4's attention layer: projections, positions, norm, query scale, then one op.

The order is that of both references: RoPE → qk-norm → query scale → cache → attention → output.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llama4_jax.model.cache import LayerCache, Step, cached_attention
from llama4_jax.model.config import LayerSpec, ModelConfig, Precision
from llama4_jax.model.layers import Linear, rms_normalize
from llama4_jax.model.query_scale import ScalableSoftmax, num_visible, scale_query, temperature
from llama4_jax.model.rope import Rotation, rotate
from llama4_jax.ops.mesh_attention import self_attention
from llama4_jax.ops.order import ANY_ORDER, Order
from llama4_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where the tokens stand: what every layer of a forward pass shares."""

    positions: Int[Array, "B T"]  # from the start of the token's own document
    segment_ids: Int[Array, "B T"] | None  # document of each token, 0: padding; None: one document a row
    rotation: Rotation  # of RoPE
    order: Order = field(default=ANY_ORDER, metadata={"static": True})


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, spec: LayerSpec, precision: Precision, *, rngs: nnx.Rngs):
        embed = {"embed": config.embed_dim}
        q_heads = {"q_heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        make = {"std": config.init_std, "dtype": precision.params, "rngs": rngs}
        self.q = Linear(embed, q_heads, **make)
        self.k = Linear(embed, kv_heads, **make)
        self.v = Linear(embed, kv_heads, **make)
        self.o = Linear(q_heads, embed, **make)
        if spec.query_scale in ("ssmax", "ssmax_bias"):
            length = min(spec.chunk or config.context_length, config.context_length)
            self.ssmax = ScalableSoftmax(config.num_heads, length=length, bias=spec.query_scale == "ssmax_bias")
        self.spec = spec
        self.implementation = "auto"  # of a whole sequence; see `Llama4`
        self.head_dim = config.head_dim
        self.norm_eps = config.norm_eps
        self.temperature_floor = config.temperature_floor
        self.temperature_coef = config.temperature_coef

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, cache: tuple[LayerCache, Step] | None = None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends to x itself, or, given a cache, to the past in it too; then returns the cache extended by x."""
        # Head-major from here on, as the cache is.
        q = constrain(self.q(x).swapaxes(1, 2), "batch", "q_heads", "seq", "head_dim")
        k = constrain(self.k(x).swapaxes(1, 2), "batch", "kv_heads", "seq", "head_dim")
        v = constrain(self.v(x).swapaxes(1, 2), "batch", "kv_heads", "seq", "head_dim")
        if self.spec.rope:
            q, k = rotate(q, place.rotation), rotate(k, place.rotation)
        if self.spec.qk_norm:
            q, k = rms_normalize(q, self.norm_eps), rms_normalize(k, self.norm_eps)
        q = self.scale_query(q, place.positions)

        how = {"chunk": self.spec.chunk, "scale": self.head_dim**-0.5, "implementation": self.implementation}
        out, layer_cache = attention(q, k, v, place, cache, **how)
        return self.o(out.swapaxes(1, 2)), layer_cache

    def scale_query(self, q: Float[Array, "B N T H"], positions: Int[Array, "B T"]) -> Float[Array, "B N T H"]:
        match self.spec.query_scale:
            case "none":
                return q
            case "temperature":
                scale = temperature(positions, floor=self.temperature_floor, coef=self.temperature_coef)
                return scale_query(q, scale[:, None])
            case "ssmax" | "ssmax_bias":
                return scale_query(q, self.ssmax(num_visible(positions, self.spec.chunk)))


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    place: Place,
    cache: tuple[LayerCache, Step] | None,
    *,
    chunk: int | None,
    scale: float,
    implementation: str = "auto",
) -> tuple[Float[Array, "B N T H"], LayerCache | None]:
    if cache is not None:
        return cached_attention(q, k, v, *cache, chunk=chunk, scale=scale)
    positions, segments = place.positions, place.segment_ids
    if segments is not None:
        positions = jnp.where(segments > 0, positions, -1)  # padding sees nothing, and nothing sees it
    at = {"positions": positions, "segments": segments, "order": place.order}
    return self_attention(q, k, v, **at, chunk=chunk, scale=scale, implementation=implementation), None

"""Llama 4's attention layer: projections, positions, norm, query scale, then one op.

The order is that of both references: RoPE → qk-norm → query scale → cache → attention → output.
"""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from llama4_jax.model.cache import LayerCache, Step, extend
from llama4_jax.model.config import LayerSpec, ModelConfig, Precision
from llama4_jax.model.layers import Linear, rms_normalize
from llama4_jax.model.query_scale import ScalableSoftmax, num_visible, scale_query, temperature
from llama4_jax.model.rope import Rotation, rotate
from llama4_jax.ops.attention import attention
from sharding import constrain


class Place(NamedTuple):
    """Where the tokens stand: what every layer of a forward pass shares."""

    positions: Int[Array, "B T"]  # from the start of the token's own document
    segment_ids: Int[Array, "B T"] | None  # document of each token; None: one document a row
    rotation: Rotation  # of RoPE


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, spec: LayerSpec, precision: Precision, *, rngs: nnx.Rngs):
        embed = {"embed": config.embed_dim}
        q_heads = {"q_heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        make = {
            "std": config.init_std,
            "dtype": precision.params,
            "matmul": precision.matmul,
            "rngs": rngs,
        }
        self.q = Linear(embed, q_heads, **make)
        self.k = Linear(embed, kv_heads, **make)
        self.v = Linear(embed, kv_heads, **make)
        self.o = Linear(q_heads, embed, **make)
        if spec.query_scale in ("ssmax", "ssmax_bias"):
            length = min(spec.chunk or config.context_length, config.context_length)
            self.ssmax = ScalableSoftmax(config.num_heads, length=length, bias=spec.query_scale == "ssmax_bias")
        self.spec = spec
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

        k_positions, segment_ids, layer_cache = place.positions, place.segment_ids, None
        if cache is not None:
            layer_cache, (k, v, k_positions) = extend(cache[0], k, v, cache[1], self.spec.chunk)
        out = attention(
            q,
            k,
            v,
            q_positions=place.positions,
            k_positions=k_positions,
            q_segments=segment_ids,
            k_segments=segment_ids,
            chunk=self.spec.chunk,
            scale=self.head_dim**-0.5,
        )
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

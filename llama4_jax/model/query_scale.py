"""Sharpening attention as the past grows: Llama 4's temperature, and scalable softmax.

Both multiply the query, after RoPE and qk-norm, so that any attention kernel can be used unchanged. Everything is
float32, and the number of visible keys is counted within the document and, on chunked layers, within the chunk.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def temperature(positions: Int[Array, "B T"], *, floor: int, coef: float) -> Float[Array, "B T"]:
    """1 + coef · ln(floor((p + 1) / floor) + 1): exactly 1 before the first `floor` positions are full.

    Reference: `Llama4TextAttention` of transformers (attn_scale, floor_scale), `Attention` of llama-models.
    """
    n = positions.astype(jnp.float32) + 1
    return 1 + coef * jnp.log(jnp.floor(n / floor) + 1)


def num_visible(positions: Int[Array, "B T"], chunk: int | None) -> Int[Array, "B T"]:
    """How many keys a query at each position sees, itself included."""
    return (positions if chunk is None else positions % chunk) + 1


class ScalableSoftmax(nnx.Module):
    """s · ln n + b, learned for each head: softmax over n keys becomes n^{s z_i} / Σ_j n^{s z_j} (b = 0).

    Source: Nakanishi, "Scalable-Softmax Is Superior for Attention", arXiv 2501.19399, Eq. 2 and 11. s starts at
    1 / mean(ln n) over the training length, so that the average scale is 1 (ours; the paper's figures agree with it).
    """

    def __init__(self, num_heads: int, *, length: int, bias: bool):
        mean_log = math.lgamma(length + 1) / length  # Σ ln n = ln(length!)
        init = 1.0 / mean_log if length > 1 else 1.0
        self.s = nnx.Param(jnp.full((num_heads,), init, jnp.float32), axes=("q_heads",), eager_sharding=False)
        self.b = (
            nnx.Param(jnp.zeros((num_heads,), jnp.float32), axes=("q_heads",), eager_sharding=False) if bias else None
        )

    def __call__(self, visible: Int[Array, "B T"]) -> Float[Array, "B N T"]:
        log_n = jnp.log(visible.astype(jnp.float32))
        scale = self.s[...].astype(jnp.float32)[None, :, None] * log_n[:, None, :]
        return scale if self.b is None else scale + self.b[...].astype(jnp.float32)[None, :, None]


def scale_query(q: Float[Array, "B N T H"], scale: Float[Array, "B #N T"]) -> Float[Array, "B N T H"]:
    """q · scale in float32, returned in q's dtype."""
    return (q.astype(jnp.float32) * jax.lax.expand_dims(scale, (3,))).astype(q.dtype)

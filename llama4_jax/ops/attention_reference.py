"""Which keys a query sees, and attention written as its formula: what every implementation is tested against.

The rule is that of `transformers`' Llama 4 masks (`create_causal_mask`, `create_chunked_causal_mask`), with explicit
positions so that it also covers packed rows and caches whose slots are not in order.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30  # finite: a row of hidden keys only then has a softmax without NaN, and is zeroed after it


def first_visible(positions: Int[Array, "..."], chunk: int | None) -> Int[Array, "..."]:
    """The smallest position that a query at each of `positions` may see: the start of its chunk.

    A negative query position starts at 0 as well, which is above itself: it sees nothing.
    """
    if chunk is None:
        return jnp.zeros_like(positions)
    return jnp.maximum(positions // chunk * chunk, 0)


def visible(
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    chunk: int | None,
) -> Bool[Array, "B T S"]:
    """Same segment, not in the future, in the query's chunk. A negative key position is an empty slot."""
    first = first_visible(q_positions, chunk)
    seen = (k_positions[:, None, :] >= first[:, :, None]) & (k_positions[:, None, :] <= q_positions[:, :, None])
    if q_segments is not None:
        seen &= q_segments[:, :, None] == k_segments[:, None, :]
    return seen


def attention_reference(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None,
    k_segments: Int[Array, "B S"] | None,
    chunk: int | None,
    scale: float,
) -> Float[Array, "B N T H"]:
    """softmax(q kᵀ · scale over the visible keys) v, all of it in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
    seen = visible(q_positions, k_positions, q_segments, k_segments, chunk)[:, None]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bnth,bnsh->bnts", q32, k32, precision="highest") * scale
    weights = jax.nn.softmax(jnp.where(seen, scores, HIDDEN), axis=-1) * seen
    return jnp.einsum("bnts,bnsh->bnth", weights, v32, precision="highest").astype(q.dtype)

"""Attention by cuDNN, for GPUs. It knows causal rows and no documents or chunks, so a row must be one document, and its
chunks become rows of their own."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from llama4_jax.ops.order import Order
from llama4_jax.sharding import platform


def obstacle(q, k, v, segments: Array | None, chunk: int | None, order: Order) -> str | None:
    """Why cuDNN cannot serve these arguments of `attention`; None if it can."""
    length = q.shape[2]
    if platform() != "gpu":
        return f"it runs on GPUs, and this program is compiled for a {platform()}"
    if not order.aligned or segments is not None or k.shape[2] != length:
        return "it needs rows of one document each, in order from the beginning, which `order` does not promise"
    if chunk is not None and chunk < length and length % chunk:
        return f"it needs whole chunks, but a row has {length} tokens, which is no multiple of {chunk}"
    if not (q.dtype == k.dtype == v.dtype == jnp.bfloat16):
        return f"it needs bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"it needs heads of a multiple of 8 and at most 128 numbers, got {q.shape[3]}"
    return None


def cudnn_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B T"],
    q_segments: None,
    k_segments: None,
    chunk: int | None,
    scale: float,
    kernel: str = "cudnn",
) -> Float[Array, "B N T H"]:
    """See `obstacle` for what it serves. `kernel`: "cudnn", or "xla" for the same on any platform."""
    size = q.shape[2] if chunk is None else min(chunk, q.shape[2])
    chunks = (rearrange(x, "b n (c t) h -> (b c) t n h", t=size) for x in (q, k, v))
    out = jax.nn.dot_product_attention(*chunks, scale=scale, is_causal=True, implementation=kernel)
    return rearrange(out, "(b c) t n h -> b n (c t) h", b=q.shape[0])

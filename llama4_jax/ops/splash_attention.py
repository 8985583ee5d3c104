"""Attention by JAX's "splash" kernel for TPUs: flash attention with a mask that is known before the program runs.

The kernel visits the blocks that the mask leaves, and looks at segment ids within them. In a row whose documents stand
one after another, causal within the row and of the same document is causal within the document; and a chunk is what is
less than `chunk` tokens away and has not seen the position pass a multiple of `chunk`. So the masks are two, the whole
past and a window, and everything else is in the ids: a new one wherever the document or the chunk changes. Padding, of
negative positions, has ids of its own; what it attends to is dropped.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_infos
from jaxtyping import Array, Float, Int

from llama4_jax.ops.order import Order
from llama4_jax.sharding import platform

LANES = 128  # of a TPU's vector registers: blocks are so many tokens, or a multiple
BLOCK_Q, BLOCK_K, BLOCK_K_COMPUTE = 512, 1024, 512
# One backward kernel instead of two writes dq once for each block of keys, and adds them up: it saves computing the
# scores again where those are few.
FUSED_BLOCKS = 8


def obstacle(q, k, v, segments: Array | None, chunk: int | None, order: Order) -> str | None:
    """Why splash cannot serve these arguments of `attention`; None if it can."""
    if platform() != "tpu":
        return f"it runs on TPUs, and this program is compiled for a {platform()}"
    if not order.contiguous:
        return "it needs rows whose documents stand one after another, which `order` does not promise"
    if k.shape[2] < q.shape[2] or q.shape[2] % LANES or k.shape[2] % LANES:
        return f"it needs queries and keys in multiples of {LANES}, got {q.shape[2]} and {k.shape[2]}"
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it needs float32 or bfloat16, the same for q, k and v, got {q.dtype}, {k.dtype} and {v.dtype}"
    return None


def splash_attention(
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
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """The queries are those of the last T of S tokens, whose order is contiguous; see `obstacle` for the rest.

    `interpret`: emulates the kernel, on any platform.
    """
    length, seen = q.shape[2], k.shape[2]
    ids = refined_segments(k_positions, k_segments, chunk)
    # In float32: the kernel has no scale of its own.
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    kernel = _kernel(q.shape[1], length, seen, chunk if chunk is not None and chunk < seen else None, interpret)
    out = jax.vmap(kernel)(scaled, k, v, kernels.SegmentIds(ids[:, seen - length :], ids))
    return jnp.where((q_positions >= 0)[:, None, :, None], out, 0)


def refined_segments(
    positions: Int[Array, "B S"], segments: Int[Array, "B S"] | None, chunk: int | None
) -> Int[Array, "B S"]:
    """A number for each run of tokens that may see each other: it goes up where the document or the chunk changes, and
    between padding and others."""
    kinds = [positions < 0 if chunk is None else jnp.maximum(positions // chunk, -1)]
    kinds += [] if segments is None else [segments]
    new = sum(jnp.diff(x.astype(jnp.int32), axis=1) != 0 for x in kinds) > 0
    return jnp.pad(jnp.cumsum(new, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, length: int, seen: int, chunk: int | None, interpret: bool) -> kernels.SplashAttentionKernel:
    """Looking at every block of the mask takes seconds for long rows, so it is done once. `make_splash_mha` would do
    the same and put its arrays on a device; numpy's belong to no trace, and compile where there is no device."""
    shape, offset = (length, seen), seen - length
    mask = masks.CausalMask(shape, offset) if chunk is None else masks.LocalMask(shape, (chunk - 1, 0), offset)
    block_q, block_k = _block(length, BLOCK_Q, chunk), _block(seen, BLOCK_K, chunk)
    compute = _block(block_k, BLOCK_K_COMPUTE, chunk)
    fused = seen // block_k <= FUSED_BLOCKS
    blocks = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_k,
        use_fused_bwd_kernel=fused,
    )
    heads_mask = masks.MultiHeadMask([mask] * heads)
    forward, mask_function = mask_infos.process_mask(heads_mask, (block_q, block_k))
    backward, _ = mask_infos.process_mask_dkv(heads_mask, (block_q, block_k), shrink_grid=not fused)
    return kernels.SplashAttentionKernel(
        forward,
        None if fused else forward,  # of dq alone
        backward,
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=interpret,
    )


def _block(length: int, most: int, chunk: int | None) -> int:
    """The greatest multiple of LANES that divides `length`, is at most `most` and not far longer than a chunk."""
    most = min(most, length, max(LANES, chunk or most))
    return max(n for n in range(LANES, most + 1, LANES) if length % n == 0)

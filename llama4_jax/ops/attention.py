"""Attention of new queries to new or cached keys: one meaning, several implementations.

`attention_reference.py` says what it means. `flash_attention.py` computes it in blocks, for training and prefill;
`decode_attention` below in one pass, for few queries against a long cache. These serve everything everywhere.
`splash_attention.py` for TPUs and `cudnn_attention.py` for GPUs do not: each says what it cannot serve, and is chosen
where it can. All of this is of one device; `mesh_attention.py` has what is split over several.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_jax.ops.attention_reference import HIDDEN, attention_reference, visible
from llama4_jax.ops.cudnn_attention import cudnn_attention
from llama4_jax.ops.cudnn_attention import obstacle as cudnn_obstacle
from llama4_jax.ops.dot_general import exact
from llama4_jax.ops.flash_attention import flash_attention, flash_partial
from llama4_jax.ops.order import ANY_ORDER, Order
from llama4_jax.ops.partial_attention import PartialAttention, merge, normalize, nothing_seen
from llama4_jax.ops.plain import is_plain
from llama4_jax.ops.quantization import Quantized
from llama4_jax.ops.splash_attention import obstacle as splash_obstacle
from llama4_jax.ops.splash_attention import splash_attention
from llama4_jax.sharding import platform

DECODE_QUERIES = 8  # at most: their scores are small beside the keys
# A cache of at least `from_slots` is read in blocks, and only those that hold something. On a CPU the loop pays early;
# elsewhere each turn starts several kernels, so that blocks are larger.


class _InBlocks(NamedTuple):
    from_slots: int
    block: int


_IN_BLOCKS = {"cpu": _InBlocks(4096, 512)}
_IN_BLOCKS_ELSEWHERE = _InBlocks(16_384, 4096)
HELD_SCOPE = "held_blocks"  # the loop's name in a compiled program


def decode_partial(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"] | Quantized,
    v: Float[Array, "B K S H"] | Quantized,
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    chunk: int | None,
    scale: float,
) -> PartialAttention:
    """Reads each key and value once, as they are: not repeated for the heads of a group, not cast, not copied.

    - k, v: of a quantized cache int8 values, and scales [B, K, S], which multiply scores and probabilities
    """
    (k, k_scale), (v, v_scale) = ((*x,) if isinstance(x, Quantized) else (x, None) for x in (k, v))
    k, v = (x.astype(q.dtype) if x.dtype == jnp.int8 else x for x in (k, v))
    num_queries = q.shape[2]
    if q.shape[1] == k.shape[1] and num_queries == 1:
        # XLA on a CPU casts all keys to float32 before a bfloat16 product with a single row, but not with two.
        q, q_positions = (jnp.concatenate([x, x], axis) for x, axis in ((q, 2), (q_positions, 1)))
        q_segments = None if q_segments is None else jnp.concatenate([q_segments, q_segments], axis=1)
    seen = visible(q_positions, k_positions, q_segments, k_segments, chunk)[:, None, None]
    rows = rearrange(q, "b (k g) t h -> b k (g t) h", k=k.shape[1])
    scores = (
        jnp.einsum("bkmh,bksh->bkms", rows, k, precision=exact(rows, k), preferred_element_type=jnp.float32) * scale
    )
    scores = scores if k_scale is None else scores * k_scale[:, :, None]
    scores = jnp.where(seen, rearrange(scores, "b k (g t) s -> b k g t s", t=q.shape[2]), HIDDEN)
    peak = jax.lax.stop_gradient(scores.max(-1))
    p = jnp.exp(scores - peak[..., None]) * seen
    shares = rearrange(p, "b k g t s -> b k (g t) s")
    shares = (shares if v_scale is None else shares * v_scale[:, :, None]).astype(v.dtype)
    out = jnp.einsum("bkms,bksh->bkmh", shares, v, precision=exact(shares, v), preferred_element_type=jnp.float32)
    peak, total = (rearrange(x, "b k g t -> b (k g) t")[:, :, :num_queries] for x in (peak, p.sum(-1)))
    return PartialAttention(peak, total, rearrange(out, "b k (g t) h -> b (k g) t h", t=q.shape[2])[:, :, :num_queries])


def decode_attention(q, k, v, **keywords) -> Float[Array, "B N T H"]:
    """In one pass over the keys: for few queries."""
    return normalize(decode_partial(q, k, v, **keywords), q.dtype)


class Held(NamedTuple):
    """What a cache holds, where each row fills its slots from the first on: slot i < count[b] holds the key of position
    first[b] + i, and the others nothing. The count may exceed the slots: a part of a cache is then full."""

    first: Int[Array, " B"]
    count: Int[Array, " B"]

    def positions(self, slots: Int[Array, " S"]) -> Int[Array, "B S"]:
        """Those of the keys in these slots; -1 for an empty one."""
        return jnp.where(slots < self.count[:, None], self.first[:, None] + slots, -1)


def block_of_slots(slots: int) -> int | None:
    """How many slots decoding reads at a time from a cache of so many; None: all of them at once."""
    from_slots, block = _IN_BLOCKS.get(platform(), _IN_BLOCKS_ELSEWHERE)
    return min(block, slots) if slots >= from_slots else None


def decode_held(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"] | Quantized,
    v: Float[Array, "B K S H"] | Quantized,
    *,
    held: Held,
    q_positions: Int[Array, "B T"],
    chunk: int | None,
    scale: float,
    block: int,
) -> PartialAttention:
    """`decode_partial` in blocks of slots, up to the last that any row fills: a step costs what the longest row holds,
    not what the cache has room for.

    What a row gets is the same, bit for bit, however long the others are: borders of blocks stand still, and a block in
    which a row sees nothing adds exact zeros.
    """
    slots = (k.values if isinstance(k, Quantized) else k).shape[2]

    def one(i: Int[Array, ""], so_far: PartialAttention) -> PartialAttention:
        # The last block begins where it still fits, and leaves out what the one before it had.
        start = jnp.minimum(i * block, slots - block)
        part_k, part_v = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block, axis=2), (k, v))
        at = start + jnp.arange(block, dtype=jnp.int32)
        positions = jnp.where(at >= i * block, held.positions(at), -1)
        how = {"q_positions": q_positions, "k_positions": positions, "chunk": chunk, "scale": scale}
        return merge(so_far, decode_partial(q, part_k, part_v, **how))

    with jax.named_scope(HELD_SCOPE):
        blocks = -(-jnp.minimum(jnp.max(held.count), slots) // block)
        return lax.fori_loop(0, blocks, one, nothing_seen(q))


def partial_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"] | Quantized,
    v: Float[Array, "B K S H"] | Quantized,
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    chunk: int | None,
    scale: float,
) -> PartialAttention:
    """What these keys contribute to `attention`, where other devices hold the rest of a cache; and all of it for a
    quantized cache, which has int8 values and scales [B, K, S]."""
    # XLA on a CPU would make floats of a whole quantized cache before a product with it; in blocks, of one at a time.
    at_once = q.shape[2] <= DECODE_QUERIES and not (isinstance(k, Quantized) and platform() == "cpu")
    part = decode_partial if at_once else flash_partial
    return part(q, k, v, q_positions=q_positions, k_positions=k_positions, chunk=chunk, scale=scale)


IMPLEMENTATIONS: dict[str, Callable[..., Float[Array, "B N T H"]]] = {
    "reference": attention_reference,
    "flash": flash_attention,
    "decode": decode_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}
# Of those that do not serve everything everywhere: why not, given (q, k, v, segments, chunk, order).
OBSTACLES: dict[str, Callable[..., str | None]] = {
    "splash": splash_obstacle,
    "cudnn": cudnn_obstacle,
}


def _choose(q, k, v, segments, chunk: int | None, order: Order) -> str:
    if is_plain():
        return "reference"
    if q.shape[2] <= DECODE_QUERIES:
        return "decode"
    able = (name for name, obstacle in OBSTACLES.items() if obstacle(q, k, v, segments, chunk, order) is None)
    return next(able, "flash")


def _check_shapes(q, k, v, q_positions, k_positions, q_segments, k_segments) -> None:
    """Raises ValueError, with the layouts that are meant, unless all of these fit together."""
    if any(x.ndim != 4 for x in (q, k, v)):
        got = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(
            f"attention: q must be [B N T H] (batch, heads, tokens, head dim), k and v [B K S H], got {got}."
        )
    (rows, _, queries, width), (_, kv_heads, keys, _) = q.shape, k.shape
    expected = {
        "k": (k, (rows, kv_heads, keys, width)),
        "v": (v, (rows, kv_heads, keys, width)),
        "q_positions": (q_positions, (rows, queries)),
        "k_positions": (k_positions, (rows, keys)),
        "q_segments": (q_segments, (rows, queries)),
        "k_segments": (k_segments, (rows, keys)),
    }
    wrong = [(name, x.shape, want) for name, (x, want) in expected.items() if x is not None and x.shape != want]
    if not wrong:
        return
    name, got, want = wrong[0]
    swapped = (q.shape[1], k.shape[1]) == (q_positions.shape[-1], k_positions.shape[-1])
    hint = " q, k and v seem to be [B T N H]: give them with .swapaxes(1, 2)." if swapped else ""
    raise ValueError(
        f"attention: {name} must have the shape {list(want)}, got {list(got)}, beside q [B N T H] = {list(q.shape)}, "
        f"k and v [B K S H] = {list(k.shape)}, positions and segments [B T] and [B S].{hint}"
    )


def attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"] | None = None,
    k_segments: Int[Array, "B S"] | None = None,
    chunk: int | None = None,
    scale: float,
    order: Order = ANY_ORDER,
    implementation: str = "auto",
) -> Float[Array, "B N T H"]:
    """Causal attention, grouped: query head n reads kv head n // (N // K). Returns the dtype of `q`.

    A query sees a key of the same segment, at its own position or before, in the same chunk of `chunk` positions
    (None: however far back). Positions count from the start of a token's document, in any order along T and S; a
    negative one marks padding or an empty cache slot, whose keys must be finite. A query that sees no key returns 0,
    with zero gradients. Scores are multiplied by `scale` > 0; softmax and sums are float32.

    - order: a promise, which some implementations need
    - implementation: a name in `IMPLEMENTATIONS`, or "auto"

    Raises ValueError for an unknown implementation or one that cannot serve these arguments here, and for arguments
    that do not fit together.
    """
    if implementation not in (known := ("auto", *IMPLEMENTATIONS)):
        raise ValueError(f"attention: implementation must be one of {', '.join(known)}, got {implementation!r}.")
    _check_shapes(q, k, v, q_positions, k_positions, q_segments, k_segments)
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: {q.shape[1]} query heads cannot share {k.shape[1]} key/value heads evenly; "
            f"the first must be a multiple of the second."
        )
    if (q_segments is None) != (k_segments is None):
        raise ValueError("attention: give both q_segments and k_segments, or neither.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"attention: chunk must be at least 1, or None for no limit, got {chunk}.")
    if scale <= 0:
        raise ValueError(f"attention: scale must be positive, got {scale}.")
    name = _choose(q, k, v, q_segments, chunk, order) if implementation == "auto" else implementation
    if name in OBSTACLES and (why := OBSTACLES[name](q, k, v, q_segments, chunk, order)) is not None:
        raise ValueError(f"attention: {name!r} cannot serve this: {why}. 'auto' chooses one that can.")
    return IMPLEMENTATIONS[name](
        q,
        k,
        v,
        q_positions=q_positions,
        k_positions=k_positions,
        q_segments=q_segments,
        k_segments=k_segments,
        chunk=chunk,
        scale=scale,
    )

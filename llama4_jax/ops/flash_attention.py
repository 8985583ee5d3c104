"""Attention in blocks, in plain JAX: scores never exist whole, and a block without a visible pair is never computed.

The online softmax is FlashAttention's (Dao et al. 2022, algorithm 1; backward: algorithm 4), with the backward pass in
one sweep that recomputes the probabilities from the saved log-sum-exp.

Which blocks are computed follows from positions and segments at run time, so packed rows, caches with holes and chunks
need no case of their own: `plan_blocks` lists, for each block of queries, the blocks of keys with a visible pair; the
loops run over those lists and nothing else, forward and backward. Blocks that are visible whole come first in a list,
and skip the mask.

`attend` and `attend_backward` go on from what other keys gave: the ring of `ring_attention` is made of them too.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.ops.attention_reference import first_visible
from llama4_jax.ops.dot_general import exact
from llama4_jax.ops.partial_attention import PartialAttention
from llama4_jax.ops.plain import own_gradient
from llama4_jax.ops.quantization import Quantized

BLOCK = 256  # tokens; the scores of one block and all its heads should stay in the caches of a CPU
SMALLEST_BLOCK = 64  # below, the loop costs more than the hidden part of a block
BIG = jnp.iinfo(jnp.int32).max


class Queries(NamedTuple):
    """A query sees the keys of its segment whose position is in [first, last]."""

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]
    segments: Int[Array, "B T"]


class Keys(NamedTuple):
    positions: Int[Array, "B S"]  # negative: empty
    segments: Int[Array, "B S"]


class BlockPlan(NamedTuple):
    """For each block of queries: which blocks of keys to compute, in any row of the batch."""

    order: Int[Array, "I J"]  # indices of key blocks: whole ones, then partly visible ones, then the hidden
    num_whole: Int[Array, " I"]  # how many are visible whole, in every row
    num_visible: Int[Array, " I"]  # how many may have a visible pair in some row


class _Extent(NamedTuple):
    """What a block of tokens spans. `at_low` and `at_high`: among the tokens of its lowest and highest segment only.

    Rows of contiguous documents share one segment between two blocks, at the end of one and the start of the other.
    With the extents at both ends the test below is exact for them, though positions restart with each document.
    """

    segments: Int[Array, "B n"]  # bit s % 32 is set if segment s is there
    low_segment: Int[Array, "B n"]
    high_segment: Int[Array, "B n"]
    whole: tuple[Int[Array, "B n"], Int[Array, "B n"]]  # least and greatest position
    at_low: tuple[Int[Array, "B n"], Int[Array, "B n"]]
    at_high: tuple[Int[Array, "B n"], Int[Array, "B n"]]


def _extent(least: Int[Array, "B X"], greatest: Int[Array, "B X"], segments: Int[Array, "B X"], block: int) -> _Extent:
    least, greatest, segments = (x.reshape(x.shape[0], -1, block) for x in (least, greatest, segments))
    real = greatest >= 0
    # By way of `any`: devices that share a block can reduce that, but not a bitwise or.
    bit = jnp.arange(32)
    there = (real[..., None] & (segments[..., None] % 32 == bit)).any(-2)
    bits = jnp.where(there, 1 << bit, 0).sum(-1)
    low = jnp.where(real, segments, BIG).min(-1)
    high = jnp.where(real, segments, -BIG).max(-1)

    def span(among: Bool[Array, "B n block"]):
        return jnp.where(among, least, BIG).min(-1), jnp.where(among, greatest, -1).max(-1)

    at_low, at_high = span(real & (segments == low[..., None])), span(real & (segments == high[..., None]))
    return _Extent(bits, low, high, span(real), at_low, at_high)


def _span_at(x: _Extent, segment: Int[Array, "..."], one: Bool[Array, "..."]) -> tuple[Array, Array]:
    """Least and greatest position among the tokens of `segment` where `one`; a superset where that is not known."""
    is_low, is_high = one & (segment == x.low_segment), one & (segment == x.high_segment)
    least, greatest = (
        jnp.where(is_low, low, jnp.where(is_high, high, whole))
        for low, high, whole in zip(x.at_low, x.at_high, x.whole, strict=True)
    )
    return least, greatest


def plan_blocks(queries: Queries, keys: Keys, block_q: int, block_k: int) -> BlockPlan:
    """Needs O(T/block_q · S/block_k) work and memory. Never misses a visible pair, and is exact where segments and the
    positions in them are contiguous; elsewhere it may list a block without one, which costs time only."""
    q = _extent(queries.first, queries.last, queries.segments, block_q)
    k = _extent(keys.positions, keys.positions, keys.segments, block_k)
    q, k = (jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), e) for e, axis in ((q, 2), (k, 1)))

    # Segments that both blocks may hold are in [low, high]; if that is one, only its positions count.
    low, high = jnp.maximum(q.low_segment, k.low_segment), jnp.minimum(q.high_segment, k.high_segment)
    (q_first, q_last), (k_least, k_greatest) = _span_at(q, low, low == high), _span_at(k, low, low == high)
    share = (low <= high) & (q.segments & k.segments != 0)
    seen = (share & (k_least <= q_last) & (k_greatest >= q_first)).any(0)

    # Whole: one segment, and the keys' positions are in every query's interval. No token may be padding.
    def blocks(x, block):
        return x.reshape(x.shape[0], -1, block)

    latest_first = blocks(queries.first, block_q).max(-1)[:, :, None]
    earliest_last = blocks(queries.last, block_q).min(-1)[:, :, None]
    earliest_key = blocks(keys.positions, block_k).min(-1)[:, None, :]
    one_segment = (q.low_segment == q.high_segment) & (k.low_segment == k.high_segment) & (low == high)
    whole = (one_segment & (earliest_key >= latest_first) & (k.whole[1] <= earliest_last)).all(0)

    order = jnp.argsort(jnp.where(seen, jnp.where(whole, 0, 1), 2), axis=1, stable=True)
    return BlockPlan(order.astype(jnp.int32), (seen & whole).sum(1), seen.sum(1))


def _dot(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(subscripts, a, b, precision=exact(a, b), preferred_element_type=jnp.float32)


# Below, i counts blocks of queries, t and s are tokens in a block, and m = (g t): the query heads of a group are rows
# of one product with their shared keys. Batch and kv heads stay two axes, so that each can be sharded.


def query_blocks(x: Float[Array, "B N T ..."], kv_heads: int, block: int) -> Float[Array, "I B K M ..."]:
    return rearrange(x, "b (k g) (i t) ... -> i b k (g t) ...", k=kv_heads, t=block)


def from_query_blocks(x: Float[Array, "I B K M ..."], block: int) -> Float[Array, "B N T ..."]:
    return rearrange(x, "i b k (g t) ... -> b (k g) (i t) ...", t=block)


def _scores(q: Float[Array, "B K M H"], k: Float[Array, "B K s H"], seen: Bool[Array, "B t s"] | None):
    """Not yet scaled; -inf where hidden."""
    scores = _dot("bkmh,bksh->bkms", q, k)
    if seen is None:
        return scores
    by_head = rearrange(scores, "b k (g t) s -> b k g t s", t=seen.shape[1])
    return jnp.where(seen[:, None, None], by_head, -jnp.inf).reshape(scores.shape)


def _loop(plan: BlockPlan, keys: Keys, queries: Queries, block_k: int, step, carry):
    """`step(carry, start, seen)` over the visible blocks of keys of one block of queries."""

    def body(masked: bool, n, carry):
        start = plan.order[n] * block_k
        seen = None
        if masked:
            p, s = (lax.dynamic_slice_in_dim(x, start, block_k, axis=1)[:, None, :] for x in keys)
            first, last, segments = (x[:, :, None] for x in queries)
            seen = (p >= first) & (p <= last) & (s == segments)
        return step(carry, start, seen)

    carry = lax.fori_loop(0, plan.num_whole, partial(body, False), carry)
    return lax.fori_loop(plan.num_whole, plan.num_visible, partial(body, True), carry)


def split_queries(queries: Queries, block: int):
    return Queries(*(rearrange(x, "b (i t) -> i b t", t=block) for x in queries))


class Running(NamedTuple):
    """The online softmax of a block of queries over the keys so far, float32. It goes on from wherever it stopped: over
    the next block of keys, or over those of another device."""

    peak: Float[Array, "*I B K M"]  # the greatest score, not yet scaled; finite before any
    total: Float[Array, "*I B K M"]  # Σ exp((score - peak) · scale)
    out: Float[Array, "*I B K M H"]  # Σ exp((score - peak) · scale) v


def begin(q: Float[Array, "*I B K M H"]) -> Running:
    rows = q.shape[:-1]
    # A finite first peak: where all keys are hidden, -inf minus it is -inf, not NaN.
    return Running(jnp.full(rows, -1e30), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32))


def _block(x: Float[Array, "B K S H"] | Quantized, start, size: int, dtype) -> Float[Array, "B K s H"]:
    """Keys or values of a block; those of a quantized cache in this dtype, no more of them than the block's."""
    if not isinstance(x, Quantized):
        return lax.dynamic_slice_in_dim(x, start, size, axis=2)
    values, scale = (lax.dynamic_slice_in_dim(part, start, size, axis=2) for part in x)
    return (values * scale[..., None]).astype(dtype)


def attend(running: Running, q, k, v, queries: Queries, keys: Keys, plan: BlockPlan, scale, block_k: int) -> Running:
    """One block of queries over all of its blocks of these keys."""

    def step(running, start, seen):
        k_block, v_block = (_block(x, start, block_k, q.dtype) for x in (k, v))
        scores = _scores(q, k_block, seen)
        peak = jnp.maximum(running.peak, scores.max(-1))
        p = jnp.exp((scores - peak[..., None]) * scale)
        shrink = jnp.exp((running.peak - peak) * scale)
        total = running.total * shrink + p.sum(-1)
        out = running.out * shrink[..., None] + _dot("bkms,bksh->bkmh", p.astype(v_block.dtype), v_block)
        return Running(peak, total, out)

    return _loop(plan, keys, queries, block_k, step, running)


def finish(running: Running, scale, dtype) -> tuple[Float[Array, "*I B K M H"], Float[Array, "*I B K M"]]:
    """The output, and the log of the sum of exp(score · scale), which the backward pass needs."""
    nothing = running.total == 0
    out = running.out / jnp.where(nothing, 1, running.total)[..., None]
    # +inf: the backward pass then finds probabilities of exactly 0.
    return out.astype(dtype), jnp.where(nothing, jnp.inf, running.peak * scale + jnp.log(running.total))


class Gradients(NamedTuple):
    """Sums so far, float32; those of q and k not yet scaled."""

    dq: Float[Array, "B K M H"]  # of one block of queries
    dk: Float[Array, "B K S H"]
    dv: Float[Array, "B K S H"]


def attend_backward(
    so_far: Gradients, q, d_out, lse, mean, k, v, queries: Queries, keys: Keys, plan: BlockPlan, scale, block_k: int
) -> Gradients:
    """One block of queries. `mean`: Σ_h d_out · out, which is Σ_s p_s dp_s, since out = Σ_s p_s v_s."""

    def step(so_far, start, seen):
        block_of = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=block_k, axis=2)
        k_block, v_block = block_of(k), block_of(v)
        p = jnp.exp(_scores(q, k_block, seen) * scale - lse[..., None])
        dp = _dot("bkmh,bksh->bkms", d_out, v_block)
        ds = (p * (dp - mean[..., None])).astype(q.dtype)

        def add(total, x):
            return lax.dynamic_update_slice_in_dim(total, block_of(total) + x, start, axis=2)

        dv = add(so_far.dv, _dot("bkms,bkmh->bksh", p.astype(q.dtype), d_out))
        dk = add(so_far.dk, _dot("bkms,bkmh->bksh", ds, q))
        return Gradients(so_far.dq + _dot("bkms,bksh->bkmh", ds, k_block), dk, dv)

    return _loop(plan, keys, queries, block_k, step, so_far)


@own_gradient(nondiff_argnums=(6, 7, 8))
def _flash(q, k, v, queries, keys, plan, scale, block_q, block_k):
    return _flash_forward(q, k, v, queries, keys, plan, scale, block_q, block_k)[0]


def _flash_forward(q, k, v, queries, keys, plan, scale, block_q, block_k):
    def one_block(_, x):
        q, queries, plan = x
        running = attend(begin(q), q, k, v, queries, keys, plan, scale, block_k)
        return None, finish(running, scale, q.dtype)

    blocks = query_blocks(q, k.shape[1], block_q), split_queries(queries, block_q), plan
    _, (out, lse) = lax.scan(one_block, None, blocks)
    out, lse = from_query_blocks(out, block_q), from_query_blocks(lse, block_q)
    return out, (q, k, v, out, lse, queries, keys, plan)


def _flash_backward(scale, block_q, block_k, residuals, d_out):
    q, k, v, out, lse, queries, keys, plan = residuals
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def one_block(d_kv, x):
        q, d_out, lse, mean, queries, plan = x
        so_far = Gradients(jnp.zeros(q.shape, jnp.float32), *d_kv)
        dq, *d_kv = attend_backward(so_far, q, d_out, lse, mean, k, v, queries, keys, plan, scale, block_k)
        return tuple(d_kv), (dq * scale).astype(q.dtype)

    blocks = tuple(query_blocks(x, k.shape[1], block_q) for x in (q, d_out, lse, mean))
    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = lax.scan(one_block, zeros, (*blocks, split_queries(queries, block_q), plan))
    return from_query_blocks(dq, block_q), (dk * scale).astype(k.dtype), dv.astype(v.dtype), None, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _pad(x: Array, axis: int, multiple: int, value=0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


class Padded(NamedTuple):
    """What attention is computed from, in whole blocks. Padding has position -1: as a query it sees nothing, as a key
    nothing sees it."""

    q: Float[Array, "B N T H"]
    k: Float[Array, "B K S H"] | Quantized
    v: Float[Array, "B K S H"] | Quantized
    queries: Queries
    keys: Keys


def padded(
    q, k, v, q_positions, k_positions, q_segments, k_segments, chunk: int | None, block_q: int, block_k: int
) -> Padded:
    if q_segments is None:
        q_segments, k_segments = jnp.zeros_like(q_positions), jnp.zeros_like(k_positions)
    q, (k, v) = _pad(q, 2, block_q), jax.tree.map(lambda x: _pad(x, 2, block_k), (k, v))
    q_positions, k_positions = _pad(q_positions, 1, block_q, -1), _pad(k_positions, 1, block_k, -1)
    queries = Queries(first_visible(q_positions, chunk), q_positions, _pad(q_segments, 1, block_q))
    return Padded(q, k, v, queries, Keys(k_positions, _pad(k_segments, 1, block_k)))


def block_size(length: int, chunk: int | None) -> int:
    """A good one for a row of `length` tokens: a block larger than a chunk is mostly hidden."""
    return min(length, BLOCK if chunk is None else min(BLOCK, max(SMALLEST_BLOCK, chunk)))


def flash_attention(
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
    block_q: int | None = None,
    block_k: int | None = None,
) -> Float[Array, "B N T H"]:
    """Saves q, k, v, the output and one float32 a query and head for the backward pass.

    `block_q`, `block_k`: tokens of a block; None: a good size for the chunk.
    """
    num_queries = q.shape[2]
    block_q = min(block_q, num_queries) if block_q else block_size(num_queries, chunk)
    block_k = min(block_k, k.shape[2]) if block_k else block_size(k.shape[2], chunk)
    x = padded(q, k, v, q_positions, k_positions, q_segments, k_segments, chunk, block_q, block_k)
    plan = plan_blocks(x.queries, x.keys, block_q, block_k)
    return _flash(*x, plan, scale, block_q, block_k)[:, :, :num_queries]


def flash_partial(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"] | Quantized,
    v: Float[Array, "B K S H"] | Quantized,
    *,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    chunk: int | None,
    scale: float,
) -> PartialAttention:
    """Of queries to some of their keys, in no segments. For inference: its gradients would hold all scores.

    - k, v: of a quantized cache int8 values, and scales [B, K, S]
    """
    num_queries, (kv_heads, num_keys) = q.shape[2], (k.values if isinstance(k, Quantized) else k).shape[1:3]
    block_q, block_k = block_size(num_queries, chunk), block_size(num_keys, chunk)
    x = padded(q, k, v, q_positions, k_positions, None, None, chunk, block_q, block_k)
    plan = plan_blocks(x.queries, x.keys, block_q, block_k)

    def one_block(_, block):
        q, queries, plan = block
        return None, attend(begin(q), q, x.k, x.v, queries, x.keys, plan, scale, block_k)

    blocks = query_blocks(x.q, kv_heads, block_q), split_queries(x.queries, block_q), plan
    peak, total, out = (from_query_blocks(y, block_q)[:, :, :num_queries] for y in lax.scan(one_block, None, blocks)[1])
    return PartialAttention(peak * scale, total, out)

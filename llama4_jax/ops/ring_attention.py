"""Attention of a sequence that is split over devices: keys and values go round, queries stay.

Each device computes its queries against the keys it holds, while it sends those on to the next device and takes those
of the one before; after as many steps as there are devices all have seen all (Liu, Zaharia and Abbeel, "Ring Attention
with Blockwise Transformers", arXiv 2310.01889). The blocks are those of flash attention, whose online softmax simply
goes on with each new set of keys. Positions and segments travel with their keys, so that any order of tokens is right,
packed rows and chunks are, and blocks that see nothing are not computed.

The backward pass sends keys and values round once more, and their gradients a step behind them, so that no step waits
for what it has just computed. Differentiating the forward loop instead would keep the keys of every device.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from llama4_jax.ops.flash_attention import (
    Gradients,
    Keys,
    Queries,
    Running,
    attend,
    attend_backward,
    begin,
    block_size,
    finish,
    from_query_blocks,
    padded,
    plan_blocks,
    query_blocks,
    split_queries,
)


class _How(NamedTuple):
    axes: tuple[str, ...]  # of the mesh, over which the sequence is split
    size: int  # devices along them
    scale: float
    block: int


class _Travelling(NamedTuple):
    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T H"]
    keys: Keys


def ring_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    chunk: int | None,
    scale: float,
    axes: tuple[str, ...],
    size: int,
    stripes: int = 1,
) -> Float[Array, "B N T H"]:
    """A device's part of attention over a sequence split over the mesh axes `axes`, of `size` devices: for use in
    `shard_map`. The meaning is that of `attention` over the tokens of all of them.

    A device's tokens are `stripes` runs of equal length, each of neighbours in the sequence: blocks are made to fit.
    Saves its own q, k, v, the output and one float32 a query and head for the backward pass.
    """
    length = q.shape[2]
    block = block_size(length // stripes, chunk)
    x = padded(q, k, v, positions, positions, segments, segments, chunk, block, block)
    return _ring(*x, _How(axes, size, scale, block))[:, :, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(q, k, v, queries: Queries, keys: Keys, how: _How):
    return _forward(q, k, v, queries, keys, how)[0]


def _pass_on(x, how: _How):
    """To the next device; what comes is the one before's."""
    pairs = [(i, (i + 1) % how.size) for i in range(how.size)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, how.axes, pairs), x)


def _round(x: _Travelling, state, visit, how: _How):
    """state = visit(x, state) for the x of each device in turn, its own first."""

    def step(carry, _):
        x, state = carry
        return (_pass_on(x, how), visit(x, state)), None  # neither waits for the other

    (x, state), _ = lax.scan(step, (x, state), length=how.size - 1)
    return visit(x, state)


def _forward(q, k, v, queries: Queries, keys: Keys, how: _How):
    q_blocks, of_queries = query_blocks(q, k.shape[1], how.block), split_queries(queries, how.block)

    def visit(x: _Travelling, running: Running) -> Running:
        def one_block(_, block):
            running, q, queries, plan = block
            return None, attend(running, q, x.k, x.v, queries, x.keys, plan, how.scale, how.block)

        plan = plan_blocks(queries, x.keys, how.block, how.block)
        return lax.scan(one_block, None, (running, q_blocks, of_queries, plan))[1]

    running = _round(_Travelling(k, v, keys), begin(q_blocks), visit, how)
    out, lse = (from_query_blocks(x, how.block) for x in finish(running, how.scale, q.dtype))
    return out, (q, k, v, out, lse, queries, keys)


def _backward(how: _How, residuals, d_out):
    q, k, v, out, lse, queries, keys = residuals
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    blocks = tuple(query_blocks(x, k.shape[1], how.block) for x in (q, d_out, lse, mean))
    of_queries = split_queries(queries, how.block)

    def visit(x: _Travelling, state):
        dq, d_kv = state

        def one_block(d_kv, block):
            dq, q, d_out, lse, mean, queries, plan = block
            so_far = Gradients(dq, *d_kv)
            at = queries, x.keys, plan, how.scale, how.block
            dq, *d_kv = attend_backward(so_far, q, d_out, lse, mean, x.k, x.v, *at)
            return tuple(d_kv), dq

        plan = plan_blocks(queries, x.keys, how.block, how.block)
        own, dq = lax.scan(one_block, jax.tree.map(jnp.zeros_like, d_kv), (dq, *blocks, of_queries, plan))
        # Gradients follow a step behind their keys: those that come now are of the keys that are here now.
        return dq, jax.tree.map(jnp.add, _pass_on(d_kv, how), own)

    zeros = jnp.zeros(blocks[0].shape, jnp.float32), (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    dq, d_kv = _round(_Travelling(k, v, keys), zeros, visit, how)
    dk, dv = _pass_on(d_kv, how)  # the last step home
    dq = from_query_blocks(dq * how.scale, how.block).astype(q.dtype)
    return dq, (dk * how.scale).astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_forward, _backward)

"""Attention of rows to themselves, on any mesh: what moves between devices, and that nothing else does.

Rows and heads are apart, so each device computes its own. A sequence that is split over devices is three cases:

- every token may see every earlier one: keys and values go round in a ring                     → `ring_attention`
- tokens see their chunk, and each device's tokens are whole chunks: nothing moves
- tokens see their chunk, wherever it begins: what they may see before a run of tokens is less than a chunk long, so
  that much, the halo, is fetched from the device that holds it; or, where runs are shorter than that, the ring again
"""

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llama4_jax.ops.attention import attention
from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.ops.order import ANY_ORDER, Order
from llama4_jax.ops.ring_attention import ring_attention
from llama4_jax.sharding import activation_spec, axes_of, ways

HALO_MULTIPLE = 128  # tokens; kernels of TPUs take no other lengths


def self_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    chunk: int | None = None,
    scale: float,
    order: Order = ANY_ORDER,
    implementation: str = "auto",
) -> Float[Array, "B N T H"]:
    """`attention` with q, k and v of the same tokens, which live on the mesh in use where the rules say: rows by
    "batch", heads by "kv_heads", tokens by "seq", each left whole where the mesh does not divide it.

    `implementation` is of what a device computes alone; the ring has one. Raises ValueError as `attention` does.
    """
    spec = activation_spec(k.shape, "batch", "kv_heads", "seq", None)  # query heads are split as their kv heads are
    axes = axes_of(spec[2])

    def local(q, k, v, positions, segments):
        how = {"chunk": chunk, "scale": scale}
        if axes:
            at = {"positions": positions, "segments": segments}
            return _of_split_rows(q, k, v, **at, **how, order=order, axes=axes, implementation=implementation)
        at = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
        return attention(q, k, v, **at, **how, order=order, implementation=implementation)

    rows = PartitionSpec(spec[0], spec[2])
    return on_mesh(local, (spec, spec, spec, rows, rows), spec)(q, k, v, positions, segments)


def _of_split_rows(q, k, v, *, positions, segments, chunk, scale, order: Order, axes, implementation):
    stripes = 2 if order.zigzag else 1
    length = q.shape[2] // stripes
    if chunk is None or not order.contiguous or length < chunk - 1:
        at = {"positions": positions, "segments": segments, "axes": axes, "size": ways(axes), "stripes": stripes}
        return ring_attention(q, k, v, **at, chunk=chunk, scale=scale)

    # Each stripe becomes a row of its own, whose tokens are in order, after its halo.
    whole_chunks = order.aligned and length % chunk == 0
    halo = 0 if whole_chunks else min(length, -(-(chunk - 1) // HALO_MULTIPLE) * HALO_MULTIPLE)

    def own(x, axis):
        return jnp.concatenate(jnp.split(x, stripes, axis), axis=0)

    def seen(x, axis, absent=0):
        return (
            jnp.concatenate([_before(x, axis, halo, stripes, axes, absent), own(x, axis)], axis)
            if halo
            else own(x, axis)
        )

    out = attention(
        own(q, 2),
        seen(k, 2),
        seen(v, 2),
        q_positions=own(positions, 1),
        k_positions=seen(positions, 1, absent=-1),
        q_segments=None if segments is None else own(segments, 1),
        k_segments=None if segments is None else seen(segments, 1),
        chunk=chunk,
        scale=scale,
        order=Order(contiguous=True, aligned=whole_chunks),
        implementation=implementation,
    )
    return rearrange(out, "(s b) n t h -> b n (s t) h", s=stripes)


def _before(x, axis: int, halo: int, stripes: int, axes: tuple[str, ...], absent):
    """The `halo` tokens before each stripe; `absent` before the first of all, where nothing is."""
    devices, here = ways(axes), lax.axis_index(axes)
    tails = [lax.slice_in_dim(part, part.shape[axis] - halo, None, axis=axis) for part in jnp.split(x, stripes, axis)]
    # Device d's first stripe comes after device d - 1's. In zigzag order its second comes after device d + 1's, and
    # that of the last device after its own first: these two are the middle of the sequence.
    first = lax.ppermute(tails[0], axes, [(d, d + 1) for d in range(devices - 1)])
    first = jnp.where(here == 0, jnp.full_like(first, absent), first)
    if stripes == 1:
        return first
    second = lax.ppermute(tails[1], axes, [(d + 1, d) for d in range(devices - 1)])
    return jnp.concatenate([first, jnp.where(here == devices - 1, tails[0], second)], axis=0)

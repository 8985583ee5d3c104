"""New entries of a cache of keys or values, each written to its slot.

`at[].set` is what it means, and what serves everywhere. But XLA fetches a whole array that a scatter writes to into a
TPU's vector memory and sends all of it back, if it fits there: a token then costs another writing of the cache beside
the one reading that attention needs. So for one new token a row, as in decoding, a TPU has a kernel: of each row it
reads and writes the one tile of slots that the new one is in, and the result is the cache's own memory.

A tile is the least that a TPU moves, (8, 128) of 32 bits: 8 slots of float32, 16 of bfloat16, 32 of int8.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, Shaped

from llama4_jax.sharding import platform


def write_slots(
    cache: Shaped[Array, "B K S *H"], new: Shaped[Array, "B K T *H"], slots: Int[Array, "B T"]
) -> Shaped[Array, "B K S *H"]:
    """The cache with each new entry, cast to the cache's dtype, in its slot; one whose slot is not in [0, S) is left
    out. A row's slots within it must differ. Of one device: on a mesh call it in `shard_map`."""
    new = new.astype(cache.dtype)
    if platform() == "tpu" and slots.shape[1] == 1:
        return write_tile(cache, new, slots[:, 0])
    return scatter(cache, new, slots)


def scatter(
    cache: Shaped[Array, "B K S *H"], new: Shaped[Array, "B K T *H"], slots: Int[Array, "B T"]
) -> Shaped[Array, "B K S *H"]:
    """`write_slots` by XLA."""
    size = cache.shape[2]
    slots = jnp.where((slots >= 0) & (slots < size), slots, size)  # a negative index would count from the end
    return cache.at[jnp.arange(len(slots))[:, None], :, slots].set(new.swapaxes(1, 2), mode="drop")


def write_tile(
    cache: Shaped[Array, "B K S *H"],
    new: Shaped[Array, "B K 1 *H"],
    slots: Int[Array, " B"],
    *,
    interpret: bool = False,
) -> Shaped[Array, "B K S *H"]:
    """`write_slots` of one token a row by a kernel for TPUs, in place. `interpret` runs it elsewhere, for tests."""
    rows, heads, size, *rest = cache.shape
    itemsize = cache.dtype.itemsize
    # Without a last axis of their own, slots lie along a tile's 128 columns.
    height = min(size, 32 // itemsize if rest else 128)

    def index(row, slots):
        return row, 0, jnp.clip(slots[row], 0, size - 1) // height, *(0 for _ in rest)

    tile = pl.BlockSpec((1, heads, height, *rest), index)
    entry = pl.BlockSpec((1, heads, 1, *rest), lambda row, slots: (row, 0, 0, *(0 for _ in rest)))
    moved = rows * heads * math.prod(rest) * itemsize
    written = pl.pallas_call(
        partial(_kernel, size, height),
        # Or XLA would bring the cache to the kernel, as it does to a scatter.
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(rows,), in_specs=[entry, tile], out_specs=tile
        ),
        input_output_aliases={2: 0},
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved * (2 * height + 1)),
        name="cache_write",
        interpret=interpret,
    )(slots, new, cache)
    # XLA cannot yet return as a program's result what is bound to a memory; the barrier's is not.
    return lax.optimization_barrier(written)


def _kernel(size: int, height: int, slots, new, old, out) -> None:
    slot = slots[pl.program_id(0)]
    first = jnp.clip(slot, 0, size - 1) // height * height
    at = first + lax.broadcasted_iota(jnp.int32, old.shape, 2)
    out[...] = jnp.where(at == slot, new[...], old[...])

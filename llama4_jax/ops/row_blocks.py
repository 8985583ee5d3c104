"""Rows sorted by group, a block of them at a time: a loop over groups of unknown sizes, in programs of fixed shapes.

Each group is one contiguous block of rows, whose height is known at run time only. So a loop is compiled for each of a
short list of heights; a group takes the smallest that holds it, and of the rows computed only the group's own are kept.

Written for how XLA compiles such loops, on a CPU above all, where a step is bound by the copies it makes:
- A `lax.switch` over the heights would copy the whole result at every turn. A loop updates it in place.
- XLA:CPU moves 16-bit floats by way of float32. Unasked, it converts all experts before the loop, and rewrites the
  whole result at every turn: see `part_of` and `as_bits`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped


class Block(NamedTuple):
    """A group's rows, rounded up to a height that is compiled."""

    group: Int[Array, ""]
    first_row: Int[Array, ""]
    height: int
    is_inside: Bool[Array, " height"]  # which rows are the group's own

    def of(self, rows: Shaped[Array, "R *N"]) -> Bool[Array, "height *_"]:
        """`is_inside`, to be broadcast over such rows."""
        return lax.expand_dims(self.is_inside, range(1, rows.ndim))


def heights_for(num_rows: int, num_groups: int) -> list[int]:
    """The block heights worth compiling, ascending, the last of them num_rows.

    From a quarter of the mean group on (what a smaller group costs is the reading of its weights, not its rows), each
    is half as large again as the one before: rounding up then adds a fifth to the work on average. Finer steps would
    add less, but every height is one more loop to compile, forward and backward, in every layer. For few rows, where
    compiling outweighs computing, the steps are of 2.
    """
    height = max(32, num_rows // (4 * num_groups) // 8 * 8)
    ratio = 2 if num_rows < 1024 else 1.5
    heights = []
    while height * ratio <= num_rows:
        heights.append(height)
        height = int(height * ratio) // 8 * 8
    return [*heights, num_rows]


def fold_groups(step: Callable, out, group_sizes: Int[Array, " E"], num_rows: int):
    """out = step(out, block) for the block of every group that has rows, in no particular order."""
    heights = heights_for(num_rows, group_sizes.shape[0])
    # The index of each group's height. Groups without rows come last, and are never reached.
    height_of = jnp.sum(group_sizes[:, None] > jnp.array(heights), axis=1)
    height_of = jnp.where(group_sizes > 0, height_of, len(heights))
    order = jnp.argsort(height_of)
    last_of_height = jnp.sum(height_of[:, None] <= jnp.arange(len(heights)), axis=0, dtype=jnp.int32)
    ends = jnp.cumsum(group_sizes)
    plan = jnp.stack([order, (ends - group_sizes)[order], ends[order]]).astype(jnp.int32)

    def fold_height(height, last, turn, out):
        def body(carry):
            turn, out = carry
            group, start, end = part_of(plan, turn, 1, axis=1)[:, 0]
            first_row = jnp.minimum(start, num_rows - height)
            row = first_row + lax.iota(jnp.int32, height)
            return turn + 1, step(out, Block(group, first_row, height, (row >= start) & (row < end)))

        return lax.while_loop(lambda carry: carry[0] < last, body, (turn, out))

    turn = jnp.int32(0)
    for height, last in zip(heights, last_of_height, strict=True):
        turn, out = fold_height(height, last, turn, out)
    return out


def write_rows(out: Shaped[Array, "R *N"], block: Block, y: Float[Array, "height *N"]) -> Shaped[Array, "R *N"]:
    """Writes the group's own rows of the block into out."""
    old = lax.dynamic_slice_in_dim(out, block.first_row, block.height, allow_negative_indices=False)
    new = jnp.where(block.of(out), as_bits(y), old)
    return lax.dynamic_update_slice_in_dim(out, new, block.first_row, 0, allow_negative_indices=False)


def part_of(array: Shaped[Array, "..."], start: Int[Array, ""], size: int, axis: int = 0) -> Shaped[Array, "..."]:
    """`size` entries of the array from `start` on, read inside the loop that this is in.

    XLA:CPU slices 16-bit floats as slice(float32(array)) and then moves float32(array), which does not change, out
    of the loop: a float32 copy of all experts. The barrier ties the array to this turn's `start`.
    """
    array, start = lax.optimization_barrier((array, start))
    return lax.dynamic_slice_in_dim(array, start, size, axis, allow_negative_indices=False)


def as_bits(x: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """16-bit floats as integers, which XLA:CPU updates in place. Other dtypes as they are."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: Shaped[Array, "*shape"], dtype) -> Float[Array, "*shape"]:
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def largest_of_groups(x: Float[Array, "R *N"], group_sizes: Int[Array, " E"]) -> Float[Array, "E *N"]:
    """The largest magnitude in each column of each group's rows, in float32; 0 for a group without rows."""

    def look(out, block: Block):
        rows = jnp.where(block.of(x), jnp.abs(part_of(x, block.first_row, block.height)), 0)
        found = jnp.max(rows, axis=0).astype(jnp.float32)
        return lax.dynamic_update_index_in_dim(out, found, block.group, 0, allow_negative_indices=False)

    zeros = jnp.zeros((group_sizes.shape[0], *x.shape[1:]), jnp.float32)
    return fold_groups(look, zeros, group_sizes, x.shape[0])

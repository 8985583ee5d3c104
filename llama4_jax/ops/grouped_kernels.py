"""Grouped products by the kernels that come with JAX: megablox on TPUs, a Mosaic kernel on Hopper GPUs.

A library of kernels gives two products, rows · matrix of their group and, for each group, rowsᵀ · rows; the second is
the gradient of the matrices. Both are wrapped alike: shapes are padded to whole tiles, and rows of no group, which no
kernel writes, are set to 0.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.sharding import platform


class Kernels(NamedTuple):
    """- rows: (x [R I], w [E I O], sizes, transposed) → [R O] in x's dtype; transposed: w is [E O I]
    - outer: (x [R I], g [R O], sizes) → [E I O], float32 sums in x's dtype or float32
    - tile: R is a multiple of it, I and O of `width`"""

    rows: Callable[..., Array]
    outer: Callable[..., Array]
    tile: int
    width: int


def megablox(x: Float[Array, "R I"]) -> Kernels:
    """`jax.experimental.pallas.ops.tpu.megablox`: only tiles with rows of a group are computed. On a CPU Pallas
    interprets it, which is slow and for tests. Raises ValueError on other platforms."""
    if platform() not in ("tpu", "cpu"):
        raise ValueError(f"grouped_matmul: megablox is made for TPUs, and this is compiled for a {platform()}.")
    # The package exports a function of this module's name.
    kernel = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    interpret = platform() == "cpu"
    tile = min(512, _rounded_up(x.shape[0], 16))
    side = 1024 if x.dtype.itemsize <= 2 else 512

    def tiling(inner: int, outer: int) -> tuple[int, int, int]:
        # Two buffers of each operand and result and a float32 sum: at most 10 MiB of the 16 that a kernel gets.
        return tile, min(side, _rounded_up(inner, 128)), min(side, _rounded_up(outer, 128))

    def rows(x, w, sizes, transposed):
        sides = tiling(x.shape[1], w.shape[1] if transposed else w.shape[2])
        return kernel.gmm(x, w, sizes, x.dtype, sides, transpose_rhs=transposed, interpret=interpret)

    def outer(x, g, sizes):
        return kernel.tgmm(x.T, g, sizes, x.dtype, tiling(x.shape[1], g.shape[1]), interpret=interpret)

    return Kernels(rows, outer, tile, 1)


def mosaic_gpu(x: Float[Array, "R I"]) -> Kernels:
    """`jax.experimental.pallas.ops.gpu.ragged_dot_mgpu`, for Hopper's tensor cores. Raises ValueError on other
    platforms, and for other dtypes than bfloat16 and float16."""
    if platform() != "gpu":
        raise ValueError(f"grouped_matmul: mosaic_gpu is made for Hopper GPUs, and this is compiled for {platform()}.")
    if x.dtype.itemsize != 2:
        raise ValueError(f"grouped_matmul: mosaic_gpu multiplies bfloat16 and float16, got {x.dtype}.")
    library = "jax.experimental.pallas.ops.gpu"
    forward = importlib.import_module(f"{library}.ragged_dot_mgpu").ragged_dot
    transposed_dot = importlib.import_module(f"{library}.transposed_ragged_dot_mgpu").transposed_ragged_dot
    blocks = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 2}

    def rows(x, w, sizes, transposed):
        return forward(x, w, group_sizes=sizes, transpose_rhs=transposed, **blocks)

    def outer(x, g, sizes):
        # It multiplies rows of no group by 0 where they share a tile with a group, which a NaN survives.
        x, g = _of_groups(x, sizes), _of_groups(g, sizes)
        return transposed_dot(x, g, group_sizes=sizes, **blocks)

    return Kernels(rows, outer, 128, 128)


def forward(
    kernels: Kernels, x: Float[Array, "R I"], w: Float[Array, "E I O"], group_sizes: Int[Array, " E"]
) -> Float[Array, "R O"]:
    """Rows times the matrix of their group, in x's dtype."""
    padded = _padded(_padded(w.astype(x.dtype), 1, kernels.width), 2, kernels.width)
    y = kernels.rows(_whole_tiles(x, kernels), padded, group_sizes, False)
    return _of_groups(y, group_sizes)[: x.shape[0], : w.shape[2]]


def backward(
    kernels: Kernels,
    x: Float[Array, "R I"],
    w: Float[Array, "E I O"],
    g_x: Float[Array, "R O"],
    g_w: Float[Array, "R O"],
    group_sizes: Int[Array, " E"],
) -> tuple[Float[Array, "R I"], Float[Array, "E I O"]]:
    """g_x · wᵀ and, for each group, xᵀ · g_w, in x's dtype."""
    padded = _padded(_padded(w.astype(x.dtype), 1, kernels.width), 2, kernels.width)
    d_x = kernels.rows(_whole_tiles(g_x.astype(x.dtype), kernels), padded, group_sizes, True)
    d_w = kernels.outer(_whole_tiles(x, kernels), _whole_tiles(g_w.astype(x.dtype), kernels), group_sizes)
    return _of_groups(d_x, group_sizes)[: x.shape[0], : x.shape[1]], d_w[:, : w.shape[1], : w.shape[2]]


def _whole_tiles(rows: Float[Array, "R N"], kernels: Kernels) -> Float[Array, "_ _"]:
    return _padded(_padded(rows, 0, kernels.tile), 1, kernels.width)


def _of_groups(rows: Float[Array, "R N"], group_sizes: Int[Array, " E"]) -> Float[Array, "R N"]:
    """0 after the last group."""
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < jnp.sum(group_sizes), rows, 0)


def _padded(x: Float[Array, "..."], axis: int, multiple: int) -> Float[Array, "..."]:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

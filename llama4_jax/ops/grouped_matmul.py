"""Each row times the matrix of its group: what a mixture of experts spends its time on.

The rows come sorted by group, so every group is one contiguous block of rows and one ordinary matrix product; no
token is dropped and none is multiplied by an expert it did not choose. Only the block heights are a problem: they
are known at run time, and XLA compiles fixed shapes. (`lax.ragged_dot` has the same semantics, but outside TPUs it
computes every row with every expert.)

"blocks", the portable implementation, compiles the product for a short list of heights (`row_blocks`). There is one
loop per height, over the groups that take it: thus every group in use costs one product and one look at its weights,
and the others nothing, from one row (decoding) to many thousands (training).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from llama4_jax.ops import grouped_kernels
from llama4_jax.ops.dot_general import exact
from llama4_jax.ops.plain import is_plain, own_gradient
from llama4_jax.ops.row_blocks import Block, as_bits, fold_groups, from_bits, part_of, write_rows
from llama4_jax.sharding import platform


def grouped_matmul(
    x: Float[Array, "R I"], w: Float[Array, "E *P I O"], group_sizes: Int[Array, " E"], *, implementation: str = "auto"
) -> Float[Array, "R *P O"]:
    """Rows [sum(group_sizes[:e]), sum(group_sizes[:e + 1])) of x, times w[e]. Rows after the last group give 0.

    Args:
        x: rows, sorted by group.
        w: one matrix a group, or several (P, such as gate and up). Where its dtype is not x's, it is cast, one group at
            a time.
        group_sizes: how many rows each group has; zeros are fine. Their sum must not exceed R.
        implementation: a key of PRODUCTS, or "auto": the best one for the platform it is compiled for.

    Returns the products in x's dtype, summed in float32. So are both gradients; w's is in w's dtype.
    Raises ValueError for an unknown implementation, and one that cannot serve here.
    """
    if implementation == "auto":
        implementation = "reference" if is_plain() else choose(x.shape[0])
    if implementation not in PRODUCTS:
        known = ", ".join(["auto", *PRODUCTS])
        raise ValueError(f"unknown grouped_matmul implementation {implementation!r}: expected one of {known}.")
    return _grouped_matmul(PRODUCTS[implementation], x, w, group_sizes)


@own_gradient(nondiff_argnums=(0,))
def _grouped_matmul(products: "Products", x, w, group_sizes):
    return products.forward(x, w, group_sizes, x.dtype)


def _backward(products: "Products", operands, g):
    x, w, group_sizes = operands
    return *products.backward(x, w, g, g, group_sizes, (x.dtype, w.dtype)), None


_grouped_matmul.defvjp(lambda products, *operands: (_grouped_matmul(products, *operands), operands), _backward)


class Products(NamedTuple):
    """What an implementation computes; sums are float32.

    - forward: (x [R I], w [E *P I O], group_sizes, dtype, scales) → x · w of its group, [R *P O] in `dtype`
    - backward: (x, w, g_x [R *P O], g_w [R *P O], group_sizes, dtypes, scales) → g_x · wᵀ of its group [R I], and for
      each group xᵀ · g_w [E *P I O], in these two dtypes; g_x and g_w are the same but for rounding. Where the second
      dtype is None, the second gradient is not computed, and None

    `scales`, where an implementation takes them, multiply the sums: of rows [R 1] and of columns [E *P 1 O or 1] in
    `forward`, of g_x · wᵀ [R 1] and of xᵀ · g_w [E *P 1 O or 1] in `backward`.
    """

    forward: Callable[..., Array]
    backward: Callable[..., tuple[Array, Array | None]]


Scales = tuple[Float[Array, "R 1"], Float[Array, "E *P 1 O"] | None]


def _reference(x, w, group_sizes, dtype) -> Float[Array, "R *P O"]:
    """Every row times every matrix, then the right one picked: E times the work, and obviously right."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    chosen = (row >= ends - group_sizes) & (row < ends)
    w = w.astype(x.dtype)
    every = jnp.einsum("RI,E...IO->RE...O", x, w, precision=exact(x, w), preferred_element_type=jnp.float32)
    chosen = chosen.reshape(*chosen.shape, *[1] * (every.ndim - 2))
    return jnp.sum(jnp.where(chosen, every, 0), axis=1).astype(dtype)


def _by_autodiff(forward: Callable[..., Array]) -> Products:
    def backward(x, w, g_x, g_w, group_sizes, dtypes):
        _, pull = jax.vjp(lambda x, w: forward(x, w, group_sizes, x.dtype), x, w)
        d_x = pull(g_x.astype(x.dtype))[0].astype(dtypes[0])
        return d_x, None if dtypes[1] is None else pull(g_w.astype(x.dtype))[1].astype(dtypes[1])

    return Products(forward, backward)


def _masked(x, w, group_sizes, dtype) -> Float[Array, "R *P O"]:
    """One product with the matrices of all groups side by side, for matrices that are narrow on one side: E times the
    work of a loop, and of little work one product makes more than a loop of many. Where they are narrow in what they
    put out, of that every row keeps its group's part; where in what they take in, every row has zeros for the others.
    """
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    own = ((row >= ends - group_sizes) & (row < ends)).astype(x.dtype)
    w = w.astype(x.dtype)
    how = {"precision": exact(x, w), "preferred_element_type": jnp.float32}
    if w.shape[-2] <= w.shape[-1]:
        beside = own[:, :, None] * x[:, None]
        return jnp.einsum("REI,E...IO->R...O", beside, w, **how).astype(dtype)
    every = jnp.einsum("RI,E...IO->RE...O", x, w, **how).astype(dtype)
    return jnp.einsum("RE,RE...->R...", own.astype(dtype), every, precision=exact(every)).astype(dtype)


def _by_kernels(kernels: Callable[[Array], grouped_kernels.Kernels]) -> Products:
    def forward(x, w, group_sizes, dtype):
        return grouped_kernels.forward(kernels(x), x, w, group_sizes).astype(dtype)

    def backward(x, w, g_x, g_w, group_sizes, dtypes):
        # What is not used of them is not computed: kernels have no side effects.
        d_x, d_w = grouped_kernels.backward(kernels(x), x, w, g_x, g_w, group_sizes)
        return d_x.astype(dtypes[0]), None if dtypes[1] is None else d_w.astype(dtypes[1])

    return Products(forward, backward)


# Their columns must be one dimension.
KERNELS = ("megablox", "mosaic_gpu")
# On a TPU, to lay a kernel's weights out so is to copy all of them: little beside the products of many rows, and three
# times the work of a few.
FEW_ROWS = 256


def choose(rows: int) -> str:
    """What "auto" means for so many rows."""
    # A kernel that nobody has run on its hardware, as "mosaic_gpu", is not chosen unasked.
    return "megablox" if platform() == "tpu" and rows > FEW_ROWS else "blocks"


def _blocks(x, w, group_sizes, dtype, scales: Scales | None = None) -> Float[Array, "R *P O"]:
    """One product a group, of the smallest compiled height that holds it."""
    if x.shape[0] == 1:  # XLA:CPU has no fast product of a single row; in 16 bits it is 10 times slower than of two
        two = None if scales is None else (jnp.pad(scales[0], ((0, 1), (0, 0))), scales[1])
        return _blocks(jnp.pad(x, ((0, 1), (0, 0))), w, group_sizes, dtype, two)[:1]

    def multiply(out: Shaped[Array, "R *P O"], block: Block) -> Shaped[Array, "R *P O"]:
        rows = part_of(x, block.first_row, block.height)
        products = [_float32_sum(rows, _operand(m, x), (1, 0)) for m in _matrices(w, block.group)]
        y = jnp.stack(products, axis=1) if w.ndim == 4 else products[0]
        if scales is not None:
            y = _scaled_rows(y, scales[0], block)
            if scales[1] is not None:  # [*P 1 O] beside [height *P O]
                y = y * jnp.moveaxis(part_of(scales[1], block.group, 1)[0], -2, 0)
        return write_rows(out, block, y.astype(dtype))

    zeros = jnp.zeros((x.shape[0], *w.shape[1:-2], w.shape[-1]), dtype)
    return from_bits(fold_groups(multiply, as_bits(zeros), group_sizes, x.shape[0]), dtype)


def _blocks_backward(x, w, g_x, g_w, group_sizes, dtypes, scales: Scales | None = None):
    def own(g: Float[Array, "R *P O"], block: Block) -> Float[Array, "*P height O"]:
        rows = jnp.where(block.of(g), part_of(g, block.first_row, block.height), 0)
        return jnp.moveaxis(rows, 1, 0) if rows.ndim == 3 else rows

    def multiply(grads: tuple[Shaped[Array, "R I"], Shaped[Array, "E *P I O"] | None], block: Block):
        x_grad, w_grad = grads
        for_x = own(g_x, block)
        matrix = _operand(part_of(w, block.group, 1)[0], x)
        pairs = zip(for_x, matrix, strict=True) if for_x.ndim == 3 else [(for_x, matrix)]
        x_new = sum(_float32_sum(g, m, (1, 1)) for g, m in pairs)
        x_new = x_new if scales is None else _scaled_rows(x_new, scales[0], block)
        x_grad = write_rows(x_grad, block, x_new.astype(dtypes[0]))
        if w_grad is None:
            return x_grad, None
        for_w = for_x if g_w is g_x else own(g_w, block)
        x_rows = jnp.where(block.of(x), part_of(x, block.first_row, block.height), 0)
        # Transposed in memory, which the barrier insists on: XLA:CPU's product over leading axes is half as fast.
        x_columns = lax.optimization_barrier(x_rows.T)
        w_new = _each_matrix(lambda g: _float32_sum(x_columns, g, (1, 0)), for_w, at=0)
        w_new = w_new if scales is None else w_new * part_of(scales[1], block.group, 1)[0]
        w_new = as_bits(w_new.astype(dtypes[1]))
        return x_grad, lax.dynamic_update_index_in_dim(w_grad, w_new, block.group, 0, allow_negative_indices=False)

    w_zeros = None if dtypes[1] is None else as_bits(jnp.zeros(w.shape, dtypes[1]))
    x_grad, w_grad = fold_groups(multiply, (as_bits(jnp.zeros(x.shape, dtypes[0])), w_zeros), group_sizes, x.shape[0])
    return from_bits(x_grad, dtypes[0]), None if w_grad is None else from_bits(w_grad, dtypes[1])


def _operand(matrix: Shaped[Array, "*P I O"], x: Shaped[Array, "R I"]) -> Shaped[Array, "*P I O"]:
    """A matrix as it is multiplied: 8-bit floats as they are, others in x's dtype."""
    return matrix if matrix.dtype.itemsize == 1 else matrix.astype(x.dtype)


def _scaled_rows(y: Float[Array, "height *N"], scale: Float[Array, "R 1"], block: "Block") -> Float[Array, "height *N"]:
    rows = part_of(scale, block.first_row, block.height)
    return y * lax.expand_dims(rows[:, 0], range(1, y.ndim))


PRODUCTS: dict[str, Products] = {
    "reference": _by_autodiff(_reference),
    "blocks": Products(_blocks, _blocks_backward),
    "masked": _by_autodiff(_masked),
    "megablox": _by_kernels(grouped_kernels.megablox),
    "mosaic_gpu": _by_kernels(grouped_kernels.mosaic_gpu),
}


def _float32_sum(a: Float[Array, "m n"], b: Float[Array, "p q"], contract: tuple[int, int]) -> Float[Array, "_ _"]:
    """Sums over dimension contract[0] of a and contract[1] of b, in float32."""
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=exact(a, b), preferred_element_type=jnp.float32)


def _matrices(w: Float[Array, "E *P I O"], group: Int[Array, ""]) -> list[Float[Array, "I O"]]:
    """A group's matrices, each sliced for itself: of one slice with both of them a TPU makes a copy to take one from,
    and reads the other a second time."""
    every = w.reshape(-1, *w.shape[-2:])
    count = every.shape[0] // w.shape[0]
    return [part_of(every, group * count + p, 1)[0] for p in range(count)]


def _each_matrix(product: Callable, matrices: Shaped[Array, "*P m n"], at: int) -> Shaped[Array, "..."]:
    """The product with each, put side by side; with the only one, if there is no P. One product for all would copy
    them: no backend multiplies by a matrix whose columns are in two places."""
    return jnp.stack([product(m) for m in matrices], axis=at) if matrices.ndim == 3 else product(matrices)

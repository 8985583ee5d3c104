"""The one place where the precision of a matrix product is decided.

Every linear layer multiplies through a `dot_general` chosen by name (`make_dot_general`), with the signature of
`jax.lax.dot_general`, so that it also fits `nnx.Linear(dot_general=...)`.

The default multiplies in the dtype of its operands and adds up in float32: the forward product and both products of
the gradient. `lax.dot_general` does so by request, but not in its gradient, where it multiplies a float32 cotangent
by a float32 copy of the weights; and a bfloat16 result leaves the dtype of the sums to the compiler. Hence an own
VJP. For float32 operands there is nothing to decide and `lax.dot_general` is used as it is.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def dot_general(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    *,
    out_sharding=None,
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` that adds up in float32, then casts to `preferred_element_type` (default: lhs.dtype).

    In the gradient, the cotangent is first cast to lhs.dtype, so that all three products multiply the same dtype.
    """
    out_dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    if lhs.dtype == rhs.dtype == jnp.float32:
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, out_dtype, out_sharding=out_sharding)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    # Lists become tuples: what custom_vjp does not differentiate must be hashable.
    numbers = ((tuple(lhs_contract), tuple(rhs_contract)), (tuple(lhs_batch), tuple(rhs_batch)))
    return _dot_general(lhs, rhs, numbers, precision, out_dtype, out_sharding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _dot_general(lhs, rhs, numbers, precision, out_dtype, out_sharding):
    return _float32_sum(lhs, rhs, numbers, precision, out_sharding).astype(out_dtype)


def _forward(lhs, rhs, numbers, precision, out_dtype, out_sharding):
    return _dot_general(lhs, rhs, numbers, precision, out_dtype, out_sharding), (lhs, rhs)


def _backward(numbers, precision, out_dtype, out_sharding, operands, g):
    lhs, rhs = operands
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    lhs_kept = [d for d in range(lhs.ndim) if d not in (*lhs_contract, *lhs_batch)]
    rhs_kept = [d for d in range(rhs.ndim) if d not in (*rhs_contract, *rhs_batch)]
    # g's dimensions are [batch, lhs_kept, rhs_kept], in this order.
    batch, g_lhs, g_rhs = _consecutive(len(lhs_batch), len(lhs_kept), len(rhs_kept))
    g = g.astype(lhs.dtype)

    # [batch, lhs_kept, lhs_contract]: a product leaves the other side's dimensions in their own order, so the
    # contracted ones come out sorted as rhs has them.
    lhs_grad = _float32_sum(g, rhs, ((g_rhs, rhs_kept), (batch, rhs_batch)), precision)
    lhs_dims = [*lhs_batch, *lhs_kept, *(c for _, c in sorted(zip(rhs_contract, lhs_contract, strict=True)))]
    # [batch, rhs_contract, rhs_kept]: lhs first, so that the gradient of weights [in, out] needs no transpose.
    rhs_grad = _float32_sum(lhs, g, ((lhs_kept, g_lhs), (lhs_batch, batch)), precision)
    rhs_dims = [*rhs_batch, *(c for _, c in sorted(zip(lhs_contract, rhs_contract, strict=True))), *rhs_kept]
    return _put_back(lhs_grad, lhs_dims).astype(lhs.dtype), _put_back(rhs_grad, rhs_dims).astype(rhs.dtype)


_dot_general.defvjp(_forward, _backward)


def _consecutive(*lengths: int) -> list[list[int]]:
    """(2, 1, 2) → [0, 1], [2], [3, 4]."""
    numbers = iter(range(sum(lengths)))
    return [[next(numbers) for _ in range(length)] for length in lengths]


def _put_back(x: Float[Array, "..."], dims: list[int]) -> Float[Array, "..."]:
    """Moves dimension i of x to dims[i]."""
    return jnp.transpose(x, [dims.index(d) for d in range(x.ndim)])


def _float32_sum(lhs, rhs, numbers, precision, out_sharding=None) -> Float[Array, "..."]:
    """The product with float32 sums, in float32."""
    product = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    rows = [n for d, n in enumerate(lhs.shape) if d not in (*lhs_contract, *lhs_batch)]
    if any(n != 1 for n in rows) or out_sharding is not None:
        return product(lhs, rhs, numbers, out_sharding=out_sharding)

    def twice(lhs, rhs):
        # XLA:CPU has no bfloat16 matrix-vector product: it would copy all of rhs to float32. Two rows it has.
        after = ((tuple(d + 1 for d in lhs_contract), rhs_contract), (tuple(d + 1 for d in lhs_batch), rhs_batch))
        return lax.index_in_dim(product(jnp.stack([lhs, lhs]), rhs, after), 0, len(lhs_batch), keepdims=False)

    return lax.platform_dependent(lhs, rhs, cpu=twice, default=lambda lhs, rhs: product(lhs, rhs, numbers))


DOT_GENERALS: dict[str, Callable] = {"auto": dot_general, "default": dot_general}


def make_dot_general(name: str) -> Callable:
    """The `dot_general` of this name. Raises ValueError for an unknown name."""
    if name not in DOT_GENERALS:
        raise ValueError(f"unknown matmul {name!r}: expected one of {', '.join(DOT_GENERALS)}.")
    return DOT_GENERALS[name]


def contract(
    x: Float[Array, "..."], w: Float[Array, "..."], *, num_contract: int = 1, dot_general: Callable = dot_general
) -> Float[Array, "..."]:
    """Sums over the last `num_contract` dimensions of x and the first of w: x[..., D], w[D, N, H] → [..., N, H]."""
    over = tuple(range(num_contract))
    return dot_general(x, w, ((tuple(x.ndim - num_contract + d for d in over), over), ((), ())))

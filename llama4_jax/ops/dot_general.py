"""The one place where the precision of a matrix product is decided.

Every linear layer multiplies through a `dot_general` chosen by name (`make_dot_general`), with the signature of
`jax.lax.dot_general`, so that it also fits `nnx.Linear(dot_general=...)`.

The default multiplies in the dtype of its operands and adds up in float32: the forward product and both products of
the gradient. `lax.dot_general` does so by request, but not in its gradient, where it multiplies a float32 cotangent
by a float32 copy of the weights; and a bfloat16 result leaves the dtype of the sums to the compiler. Hence an own
VJP. For float32 operands `lax.dot_general` does as is wanted, once it is told that they are meant (`exact`).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from llama4_jax.ops.dims import Dims
from llama4_jax.ops.fp8 import Fp8DotGeneral, fp8_dot_general
from llama4_jax.ops.plain import own_gradient
from llama4_jax.sharding import for_use

# The name of what is dear to compute again, results of products with parameters, for a policy of `jax.checkpoint`. By
# their primitive a policy finds no product that is within a custom VJP or a kernel.
PRODUCT = "product"


def exact(*operands: Array) -> lax.Precision | None:
    """The `precision` of a product of these: float32 is multiplied as float32. Unasked, a GPU's tensor cores would take
    10 bits of each mantissa (tf32), and a TPU bfloat16. Where `jax.default_matmul_precision` says something, that
    holds; and other dtypes have but one way."""
    said = jax.config.jax_default_matmul_precision is not None
    return None if said or any(x.dtype != jnp.float32 for x in operands) else lax.Precision.HIGHEST


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
        precision = exact(lhs, rhs) if precision is None else precision
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, out_dtype, out_sharding=out_sharding)
    return _dot_general(lhs, rhs, Dims.of(lhs, rhs, dimension_numbers), precision, out_dtype, out_sharding)


@own_gradient(nondiff_argnums=(2, 3, 4, 5))
def _dot_general(lhs, rhs, dims: Dims, precision, out_dtype, out_sharding):
    return _float32_sum(lhs, rhs, dims.numbers, precision, out_sharding).astype(out_dtype)


def _forward(lhs, rhs, dims, precision, out_dtype, out_sharding):
    return _dot_general(lhs, rhs, dims, precision, out_dtype, out_sharding), (lhs, rhs)


def _backward(dims: Dims, precision, out_dtype, out_sharding, operands, g):
    lhs, rhs = operands
    g = g.astype(lhs.dtype)
    multiply = partial(_float32_sum, precision=precision)
    lhs_grad, rhs_grad = dims.lhs_gradient(multiply, g, rhs), dims.rhs_gradient(multiply, lhs, g)
    return lhs_grad.astype(lhs.dtype), rhs_grad.astype(rhs.dtype)


_dot_general.defvjp(_forward, _backward)


def _float32_sum(lhs, rhs, numbers, precision=None, out_sharding=None) -> Float[Array, "..."]:
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


def bfloat16_dot_general(
    lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *, out_sharding=None
) -> Float[Array, "..."]:
    """`dot_general` of bfloat16 copies of its operands, whatever their dtype; results and gradients are of theirs."""
    out_dtype = lhs.dtype if preferred_element_type is None else preferred_element_type
    lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
    return dot_general(lhs, rhs, dimension_numbers, precision, out_dtype, out_sharding=out_sharding)


DOT_GENERALS: dict[str, Callable] = {
    "default": dot_general,
    "bf16": bfloat16_dot_general,
    "fp8": fp8_dot_general("tensor"),
    "fp8_row": fp8_dot_general("row"),
    "fp8_block": fp8_dot_general("block", gradient="float8_e4m3fn"),  # as DeepSeek-V3; numerics only
    "fp8_e5m2": fp8_dot_general("tensor", forward="float8_e5m2"),  # two bits of mantissa are too few: a control
}


def make_dot_general(name: str) -> Callable:
    """The `dot_general` of this name. Raises ValueError for an unknown name."""
    if name not in DOT_GENERALS:
        raise ValueError(f"unknown matmul {name!r}: expected one of {', '.join(DOT_GENERALS)}.")
    return DOT_GENERALS[name]


def linear(
    x: Float[Array, "..."], kernel: Float[Array, "..."], axes: tuple[str, ...], num_contract: int, matmul: str
) -> Float[Array, "..."]:
    """x [..., in dims] · a parameter [in dims, out dims] whose axes have these names, by the `dot_general` of this
    name. On a mesh the parameter is gathered in what it is multiplied in. The result has the name PRODUCT."""
    multiply = make_dot_general(matmul)
    if isinstance(multiply, Fp8DotGeneral):
        return checkpoint_name(multiply.linear(x, kernel, axes, num_contract), PRODUCT)
    dtype = jnp.bfloat16 if multiply is bfloat16_dot_general else x.dtype
    y = contract(x, for_use(kernel, dtype, *axes), num_contract=num_contract, dot_general=multiply)
    return checkpoint_name(y, PRODUCT)


def contract(
    x: Float[Array, "..."], w: Float[Array, "..."], *, num_contract: int = 1, dot_general: Callable = dot_general
) -> Float[Array, "..."]:
    """Sums over the last `num_contract` dimensions of x and the first of w: x[..., D], w[D, N, H] → [..., N, H]."""
    over = tuple(range(num_contract))
    return dot_general(x, w, ((tuple(x.ndim - num_contract + d for d in over), over), ((), ())))

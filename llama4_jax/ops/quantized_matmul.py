"""Products with matrices of few bits, each as it is fast on the platform; nothing of their size is made in full.

- CPU: a loop over blocks of inputs, since XLA there would write the whole matrix in float32 before any product with it.
  A block's values are converted and multiplied while they are in the cores' caches.
- TPU: the product gets one batch dimension more, the groups, and its results are scaled and summed. The compiler fuses
  all of it, for few rows and for many; of values · scales it would make a matrix first.
- GPU: the same for few rows. For many the results of all groups are large, and the matrix is the lesser evil.
- Where an output has one scale, it multiplies the result, on every platform.

What is multiplied is a choice, `activations`, and not the platform's alone, since it changes the numbers:

- "float": x as it is, the values converted to its dtype. The error is that of the weights
- "int8": x too is rounded, to int8 with a scale a row, and products of int8 are summed in int32 (W8A8). It is the
  fastest on a CPU, and adds about as much error as the weights of int8 have
- "auto": "int8" on a CPU for matrices of int8 with one scale an output, "float" otherwise

The gradient, of x alone, is the cotangent's product with the dequantized matrix, whatever x was rounded to: values and
scales do not learn. That matrix exists while it is multiplied, one at a time.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Shaped

from llama4_jax.ops.dot_general import dot_general
from llama4_jax.ops.plain import own_gradient
from llama4_jax.ops.quantization import Quantized, dequantize, scale_axes
from llama4_jax.ops.row_blocks import as_bits, fold_groups, from_bits, part_of, write_rows
from llama4_jax.sharding import for_use, platform

ACTIVATIONS = ("auto", "float", "int8")

_BLOCK = 256  # inputs that a CPU multiplies with at a time: large enough for threads, small enough for caches
_FEW_ROWS = 32  # of which a GPU has a result for every group: half as large, in groups of 128, as the matrix


def quantized_dot(
    x: Float[Array, "..."], q: Quantized, *, num_contract: int = 1, activations: str = "auto"
) -> Float[Array, "..."]:
    """x [..., *inputs] · q [*inputs, *outputs] → [..., *outputs] in x's dtype, summed in float32 (or int32).

    - num_contract: how many dimensions are inputs
    - activations: see above

    Raises ValueError for activations that are unknown, or that the values cannot be multiplied with.
    """
    return _quantized_dot(x, q, num_contract, activations)


@own_gradient(nondiff_argnums=(2, 3))
def _quantized_dot(x, q: Quantized, num_contract: int, activations: str):
    inputs, outputs = q.values.shape[:num_contract], q.values.shape[num_contract:]
    lead = x.shape[: x.ndim - num_contract]
    x, dtype = x.reshape(math.prod(lead), math.prod(inputs)), x.dtype
    if not _is_split():  # or to make one dimension of the outputs, of which one is split, would be to gather them
        outputs = (math.prod(outputs),)
    own = Quantized(q.values.reshape(math.prod(inputs), *outputs), q.scale.reshape(-1, *outputs))
    y = _product(_rows(x, _decide(activations, own.values, len(own.scale))), own)
    return y.astype(dtype).reshape(*lead, *q.values.shape[num_contract:])


def _quantized_dot_backward(num_contract: int, activations: str, q: Quantized, g):
    # The barrier keeps XLA from dequantizing all layers of a scan before it.
    w = dequantize(lax.optimization_barrier(q), num_contract=num_contract, dtype=g.dtype)
    outputs = w.ndim - num_contract
    over = tuple(range(g.ndim - outputs, g.ndim)), tuple(range(num_contract, w.ndim))
    return dot_general(g, w, (over, ((), ()))), None


_quantized_dot.defvjp(lambda x, q, *how: (_quantized_dot(x, q, *how), q), _quantized_dot_backward)


def quantized_linear(
    x: Float[Array, "..."], q: Quantized, axes: tuple[str, ...], *, num_contract: int, activations: str = "auto"
) -> Float[Array, "..."]:
    """`quantized_dot` with a parameter whose axes have these names, which on a mesh is gathered in its few bits."""
    of_scale = scale_axes(axes, q.scale.shape[0], num_contract=num_contract)
    values = for_use(q.values, q.values.dtype, *axes)
    own = Quantized(values, for_use(q.scale, q.scale.dtype, *of_scale))
    return quantized_dot(x, own, num_contract=num_contract, activations=activations)


def quantized_grouped_matmul(
    x: Float[Array, "R I"],
    q: Quantized,
    group_sizes: Int[Array, " E"],
    *,
    activations: str = "auto",
    axes: tuple[str, ...] = (),
) -> Float[Array, "R *P O"]:
    """`grouped_matmul` with quantized matrices, values [E, *P, I, O] and scales [E, *P, G, O]: "blocks" of rows.

    - axes: within `shard_map`, the mesh axes that split the inputs. The result is then a part of a sum; the scales of
      x's rows are those of whole rows

    Raises ValueError as `quantized_dot` does.
    """
    rows = _rows(x, _decide(activations, q.values, q.scale.shape[-2]), axes)
    pairs = q.values.shape[1:-2]

    def multiply(out: Shaped[Array, "R *P O"], block) -> Shaped[Array, "R *P O"]:
        own = _Rows(*(None if part is None else part_of(part, block.first_row, block.height) for part in rows))
        products = [_product(own, q, (block.group, *pair)).astype(x.dtype) for pair in np.ndindex(*pairs)]
        return write_rows(out, block, jnp.stack(products, axis=1) if pairs else products[0])

    zeros = jnp.zeros((x.shape[0], *pairs, q.values.shape[-1]), x.dtype)
    return from_bits(fold_groups(multiply, as_bits(zeros), group_sizes, x.shape[0]), x.dtype)


def quantized_grouped_row_gradient(
    g: Float[Array, "R *P O"], q: Quantized, group_sizes: Int[Array, " E"], dtype
) -> Float[Array, "R I"]:
    """The gradient of x, in `dtype`, where g is that of `quantized_grouped_matmul(x, q, group_sizes)`: g times the
    dequantized matrices of its rows' group, transposed. One group's are dequantized at a time."""
    pairs = q.values.shape[1:-2]

    def multiply(out: Shaped[Array, "R I"], block) -> Shaped[Array, "R I"]:
        rows = jnp.where(block.of(g), part_of(g, block.first_row, block.height), 0)
        total = 0.0
        for pair in np.ndindex(*pairs):
            values, scale = (_read(part, (block.group, *pair), 0, part.shape[-2]) for part in q)
            w = _scaled(values, scale, g.dtype)
            over = (((1,), (1,)), ((), ()))
            total += dot_general(rows[:, *pair], w, over, preferred_element_type=jnp.float32)
        return write_rows(out, block, total.astype(dtype))

    zeros = jnp.zeros((g.shape[0], q.values.shape[-2]), dtype)
    return from_bits(fold_groups(multiply, as_bits(zeros), group_sizes, g.shape[0]), dtype)


class _Rows(NamedTuple):
    """What multiplies a matrix."""

    values: Float[Array, "M I"] | Int8[Array, "M I"]
    scale: Float[Array, "M 1"] | None  # float32; None: the values are what they say


def _rows(x: Float[Array, "M I"], activations: str, axes: tuple[str, ...] = ()) -> _Rows:
    if activations == "float":
        return _Rows(x, None)
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    largest = lax.pmax(largest, axes) if axes else largest
    scale = jnp.where(largest > 0, largest * np.float32(1 / 127), 1)
    return _Rows(jnp.round(x / scale).astype(jnp.int8), scale)


def check_activations(activations: str, dtype, what: str = "a matrix") -> None:
    """Raises ValueError for activations that are unknown, or that values of this dtype cannot be multiplied with."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}.")
    if activations == "int8" and dtype == jnp.float8_e4m3fn:
        raise ValueError(f"activations of int8 cannot be multiplied with {what} of fp8: choose 'float' or 'auto'.")


def _decide(activations: str, values: Shaped[Array, "..."], groups: int) -> str:
    check_activations(activations, values.dtype)
    if activations != "auto":
        return activations
    return "int8" if platform() == "cpu" and values.dtype == jnp.int8 and groups == 1 else "float"


def _product(rows: _Rows, q: Quantized, at: tuple = ()) -> Float[Array, "M *O"]:
    """The rows times the matrix that stands at these indices of a stack, float32."""
    x = rows.values
    if len(x) == 1:  # XLA has no fast product of a single row on a CPU, and on a GPU none in groups
        x = jnp.concatenate([x, x])
    y = (_at_once if platform() != "cpu" or _is_split() else _in_blocks)(x, q, at)[: len(rows.values)]
    return y if rows.scale is None else y * rows.scale.reshape(-1, *[1] * (y.ndim - 1))


def _is_split() -> bool:
    """Whether a matrix may be split over devices, and not by `shard_map`: no part of it can then be sliced without
    moving it."""
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.empty or mesh.size == 1 or mesh.manual_axes)


def _at_once(x: Shaped[Array, "M I"], q: Quantized, at: tuple) -> Float[Array, "M *O"]:
    values, scale = (_read(part, at, 0, part.shape[-2]) for part in q) if at else q
    groups, scale = len(scale), scale.astype(jnp.float32)  # a product of int32 and bfloat16 would be bfloat16
    if groups == 1:
        return _multiply(x, values) * scale
    if x.dtype == jnp.int8 or platform() == "tpu" or (platform() == "gpu" and x.shape[0] <= _FEW_ROWS):
        x, values = x.reshape(len(x), groups, -1), values.reshape(groups, -1, *values.shape[1:])
        return jnp.sum(_multiply(x, values, batch=True) * scale[:, None], axis=0)
    return _multiply(x, _scaled(values, scale, x.dtype))


def _in_blocks(x: Shaped[Array, "M I"], q: Quantized, at: tuple) -> Float[Array, "M O"]:
    """The sum of the products of blocks of inputs, one after another."""
    (inputs, outputs), groups = q.values.shape[-2:], q.scale.shape[-2]
    block = _block_size(inputs, groups, x.dtype)
    by_block = x.reshape(len(x), inputs // block, block).swapaxes(0, 1)

    def add(i, total):
        rows = lax.dynamic_index_in_dim(by_block, i, 0, keepdims=False)
        values = _read(q.values, at, i * block, block)
        if groups == 1:
            return total + _multiply(rows, values)
        in_block = groups * block // inputs
        scale = _read(q.scale, at, i * in_block, in_block).astype(jnp.float32)
        if x.dtype == jnp.int8:
            return total + _multiply(rows, values) * scale
        return total + _multiply(rows, _scaled(values, scale, x.dtype))

    sums = jnp.int32 if x.dtype == jnp.int8 and groups == 1 else jnp.float32
    total = lax.fori_loop(0, inputs // block, add, jnp.zeros((len(x), outputs), sums))
    return total * _read(q.scale, at, 0, 1).astype(jnp.float32) if groups == 1 else total


def _block_size(inputs: int, groups: int, dtype) -> int:
    """How many inputs at a time. With several groups, whole ones; and where sums of products are scaled, one."""
    if groups == 1:
        block = next(n for n in range(min(_BLOCK, inputs), 0, -1) if inputs % n == 0)
        return block if block >= 32 else inputs  # of no good divisor
    group = inputs // groups
    most = 1 if dtype == jnp.int8 else max(1, _BLOCK // group)
    return group * next(n for n in range(min(most, groups), 0, -1) if groups % n == 0)


def _multiply(x: Shaped[Array, "..."], values: Shaped[Array, "..."], *, batch: bool = False) -> Shaped[Array, "..."]:
    """x [M, I] · values [I, *O], in int32 for int8 and float32 otherwise; of groups one each, [G, M, *O]."""
    numbers = (((2,), (1,)), ((1,), (0,))) if batch else (((1,), (0,)), ((), ()))
    if x.dtype == jnp.int8:
        return lax.dot_general(x, values.astype(jnp.int8), numbers, preferred_element_type=jnp.int32)
    return dot_general(x, values.astype(x.dtype), numbers, preferred_element_type=jnp.float32)


def _scaled(values: Shaped[Array, "I *O"], scale: Float[Array, "G *O"], dtype) -> Float[Array, "I *O"]:
    """Dequantized."""
    return dequantize(Quantized(values, scale), dtype=dtype)


def _read(stack: Shaped[Array, "*stack I O"], at: tuple, first, size: int) -> Shaped[Array, "size O"]:
    """Rows [first, first + size) of the matrix at these indices, read inside the loop that this is in."""
    if not at and size == stack.shape[-2]:
        return stack
    # XLA would move the conversion of all of it out of the loop: the barrier ties it to this turn's indices.
    stack, at, first = lax.optimization_barrier((stack, at, first))
    sizes = (*[1] * len(at), size, stack.shape[-1])
    part = lax.dynamic_slice(stack, (*at, first, 0), sizes, allow_negative_indices=False)
    return part.reshape(size, stack.shape[-1])

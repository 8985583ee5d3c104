"""Matrices in few bits: values of 4 or 8 bits, and a scale for each group of numbers that are summed together.

A number is `value · scale`. A scale belongs to one output, and to all of its inputs, or to a group of consecutive ones:
so the products of a group are scaled after they are summed, and a group never spans outputs of which one is an outlier.
Symmetric, without zero points: 0 stays 0, and no sum of the inputs is needed beside the product.

    int8  -127 to 127, one scale an output               error of Gaussian weights 0.9 %
    fp8   float8_e4m3fn, one scale an output                                       2.6 %
    int4  -7 to 7, one scale for 128 inputs, or for 32                     11.7 %, 9.7 %

Scales are float32; of groups, which have many, bfloat16: a 500th part of what the rounding of int4 adds.

The functions take numpy arrays, as conversion does, or jax arrays, and return the same kind. The dimensions that a
product sums over, the inputs, stand together in a matrix: `start` is the first of them and `num_contract` how many
there are. Before them stand experts, after them outputs. Scales have one dimension, of the groups, in their place.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

Array = np.ndarray | jax.Array


class Number(NamedTuple):
    """A format of the values."""

    dtype: np.dtype
    largest: float  # the greatest value in a group becomes this


NUMBERS: dict[str, Number] = {
    "int8": Number(np.dtype(np.int8), 127),
    "int4": Number(np.dtype(ml_dtypes.int4), 7),  # symmetric: -8 is not used
    "fp8": Number(np.dtype(ml_dtypes.float8_e4m3fn), 448),
}


@dataclass(frozen=True)
class Scheme:
    """How matrices are quantized. Raises ValueError for weights that are not in NUMBERS, and for a group below 1."""

    weights: str  # int8, int4 or fp8
    group: int | None = None  # inputs that share a scale; None: all of an output

    def __post_init__(self):
        if self.weights not in NUMBERS:
            raise ValueError(f"weights must be one of {', '.join(NUMBERS)}, got {self.weights!r}.")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be at least 1, or None for one scale an output, got {self.group}.")

    @property
    def number(self) -> Number:
        return NUMBERS[self.weights]

    def __str__(self) -> str:
        return self.weights if self.group is None else f"{self.weights}, groups of {self.group}"


class Quantized(NamedTuple):
    """A matrix of values and scales."""

    values: Any  # [*experts, *inputs, *outputs], of a dtype in NUMBERS
    scale: Any  # [*experts, G, *outputs], float32 or bfloat16


def is_quantized_dtype(dtype) -> bool:
    return any(np.dtype(dtype) == number.dtype for number in NUMBERS.values())


def quantize(w: Array, scheme: Scheme, *, start: int = 0, num_contract: int = 1, what: str = "matrix") -> Quantized:
    """The nearest values, with the scale that takes the greatest magnitude of each group to the greatest value. A group
    of zeros has the scale 1.

    - what: the name of the matrix, for errors

    Raises ValueError for a group that does not divide the number of inputs.
    """
    groups = num_groups(w.shape, scheme, start=start, num_contract=num_contract, what=what)
    scale = scale_of(amax(w, groups, start=start, num_contract=num_contract), scheme)
    return Quantized(encode(w, scale, scheme, start=start, num_contract=num_contract), scale)


def dequantize(q: Quantized, *, start: int = 0, num_contract: int = 1, dtype=np.float32) -> Array:
    """values · scale, multiplied in float32."""
    grouped = _in_groups(q.values, q.scale.shape[start], start, num_contract).astype(np.float32)
    return (grouped * _beside(q.scale, start).astype(np.float32)).reshape(q.values.shape).astype(dtype)


def num_groups(
    shape: tuple[int, ...], scheme: Scheme, *, start: int = 0, num_contract: int = 1, what: str = "matrix"
) -> int:
    """How many scales each output of such a matrix has. Raises ValueError for a group that does not divide it."""
    inputs = math.prod(shape[start : start + num_contract])
    if scheme.group is None:
        return 1
    if inputs % scheme.group:
        fitting = [n for n in (256, 128, 64, 32, 16, 8) if inputs % n == 0]
        raise ValueError(
            f"{what} has {inputs} inputs, which groups of {scheme.group} do not divide. Choose a group that divides "
            f"them all, such as {', '.join(map(str, fitting)) or inputs}."
        )
    return inputs // scheme.group


def scale_axes(axes: tuple, groups: int, *, start: int = 0, num_contract: int = 1) -> tuple:
    """The names of a scale's axes, given those of its matrix: its groups are split as the inputs are. A single one is
    not: it has no name."""
    return (*axes[:start], axes[start] if groups > 1 else None, *axes[start + num_contract :])


def amax(w: Array, groups: int, *, start: int = 0, num_contract: int = 1) -> Array:
    """The greatest magnitude of each group, as `Quantized.scale` has its dimensions; float32."""
    return abs(_in_groups(w, groups, start, num_contract).astype(np.float32)).max(axis=start + 1)


def scale_of(amax: Array, scheme: Scheme) -> Array:
    """The scales for these greatest magnitudes: float32, or bfloat16 if they are of groups."""
    scale = amax * np.float32(1 / scheme.number.largest)  # as XLA would make of a division
    # Where the greatest number is 0, or too small for a scale in float32, all values are 0.
    scale = _numpy(amax).where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))
    return scale if scheme.group is None else scale.astype(ml_dtypes.bfloat16)


def encode(w: Array, scale: Array, scheme: Scheme, *, start: int = 0, num_contract: int = 1) -> Array:
    """The values whose products with these scales are nearest to w."""
    dtype, largest = scheme.number
    grouped = _in_groups(w, scale.shape[start], start, num_contract).astype(np.float32)
    ratio = grouped / _beside(scale, start).astype(np.float32)
    if scheme.weights != "fp8":  # a conversion to a float rounds by itself
        ratio = _numpy(w).rint(ratio)
    # float8_e4m3fn has no infinity: what is too large would become NaN.
    return ratio.clip(-largest, largest).astype(dtype).reshape(w.shape)


def _in_groups(x: Array, groups: int, start: int, num_contract: int) -> Array:
    """[*experts, *inputs, *outputs] → [*experts, G, inputs of a group, *outputs]."""
    inputs = math.prod(x.shape[start : start + num_contract])
    return x.reshape(*x.shape[:start], groups, inputs // groups, *x.shape[start + num_contract :])


def _beside(scale: Array, start: int) -> Array:
    """The scales, to be multiplied with values in groups."""
    return scale.reshape(*scale.shape[: start + 1], 1, *scale.shape[start + 1 :])


def _numpy(x: Array):
    return jnp if isinstance(x, jax.Array) else np


def pack_int4(values: np.ndarray, axis: int, *, low_first: bool = True) -> np.ndarray:
    """int4, or int8 from -8 to 7 → uint8, two a byte along `axis`: 2i in the low half of byte i and 2i + 1 in the high,
    or, unless `low_first`, the other way round. Raises ValueError for an odd length."""
    if values.shape[axis] % 2:
        raise ValueError(f"two numbers go into a byte, and axis {axis} of {list(values.shape)} has an odd length.")
    bits = values.view(np.uint8) & 0xF
    first, second = bits[_every_second(bits, axis, 0)], bits[_every_second(bits, axis, 1)]
    low, high = (first, second) if low_first else (second, first)
    return low | high << 4


def unpack_int4(packed: np.ndarray, axis: int, *, low_first: bool = True) -> np.ndarray:
    """uint8 or int8 → int4, twice as long along `axis`: what `pack_int4` packed."""
    low, high = (half.view(ml_dtypes.int4) for half in (packed.view(np.uint8) & 0xF, packed.view(np.uint8) >> 4))
    shape = list(packed.shape)
    shape[axis] *= 2
    out = np.empty(shape, ml_dtypes.int4)
    out[_every_second(out, axis, 0)], out[_every_second(out, axis, 1)] = (low, high) if low_first else (high, low)
    return out


def _every_second(x: np.ndarray, axis: int, first: int) -> tuple[slice, ...]:
    axis %= x.ndim
    return (*[slice(None)] * axis, slice(first, None, 2), *[slice(None)] * (x.ndim - axis - 1))

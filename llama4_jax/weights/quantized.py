"""What a directory holds, quantized or not, as the parameters of a model: their shapes, schemes and values.

Which tensors are quantized is read off the names that are there: one with scales is. How many inputs share a scale is
read off the shape of these, and int4 off bytes, of which each holds two numbers.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from llama4_jax.ops.quantization import NUMBERS, Scheme
from llama4_jax.weights import table
from llama4_jax.weights.dequantize import unpacked_values
from llama4_jax.weights.source import Weights
from llama4_jax.weights.table import SCALE, Index, Row, Shape

_PACKED = np.dtype(np.uint8)


@dataclass(frozen=True)
class Parameters:
    """The tensors of `weights`, as they are stored, as those of a model."""

    weights: Weights

    @functools.cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.weights.names)

    @functools.cached_property
    def _rows(self) -> dict[str, Row]:
        return {row.ours: row for row in table.rows(self.weights.config)}

    def is_quantized(self, name: str) -> bool:
        return name + SCALE in self.names

    def scheme(self, name: str) -> Scheme | None:
        """How the matrix of this name is quantized; None if it is not. Raises ValueError, naming it, if that is not one
        of ours, or its scales do not fit."""
        if name not in self.names or not self.is_quantized(name):
            return None
        row, dtype = self._rows[name], self.weights.dtype(name)
        known = {number.dtype: weights for weights, number in NUMBERS.items()} | {_PACKED: "int4"}
        if dtype not in known:
            raise ValueError(f"{name} has scales, but is {dtype.name}: expected {', '.join(NUMBERS)} values.")
        of_scale, shape = row.scale(1), self.weights.shape(name + SCALE)
        place = of_scale.axes.split().index("G")
        inputs = math.prod(row.sizes[axis] for axis in row.contracted.split())
        groups = shape[place] if len(shape) == len(of_scale.shape) else 0
        if not groups or inputs % groups or shape != row.scale(groups).shape:
            raise ValueError(f"{name}{SCALE} has the shape {list(shape)}, which fits no groups of {inputs} inputs.")
        return Scheme(known[dtype], None if groups == 1 else inputs // groups)

    def shape(self, name: str) -> Shape:
        stored = self.weights.shape(name)
        if not self._is_packed(name):
            return stored
        axis = self._axis_of_bytes(name)
        return (*stored[:axis], 2 * stored[axis], *stored[axis + 1 :])

    def dtype(self, name: str) -> np.dtype:
        """Of the parameter that this becomes; of what is not quantized, as it is stored."""
        return NUMBERS["int4"].dtype if self._is_packed(name) else self.weights.dtype(name)

    def read(self, name: str, part: Index | None = None) -> np.ndarray:
        """Values, one to each number; scales; or a tensor that is not quantized."""
        if not self._is_packed(name):
            return self.weights.read(name, part)
        row = self._rows[name]
        return unpacked_values(row, self.weights, row.whole if part is None else part)

    def _is_packed(self, name: str) -> bool:
        return self.is_quantized(name) and self.weights.dtype(name) == _PACKED

    def _axis_of_bytes(self, name: str) -> int:
        row = self._rows[name]
        return row.axes.split().index(row.contracted.split()[-1])

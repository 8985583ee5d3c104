"""Published quantized checkpoints: where their values and scales are, and values · scales.

- Hugging Face, compressed-tensors (Maverick FP8): float8 linear layers, one for each expert, with `.weight_scale` of a
  number for each output
- Hugging Face, fbgemm: float8 fused experts with `gate_up_proj_scale` [E, 1, 2F] and `down_proj_scale` [E, D, 1], and
  linear layers with `.weight_scale`
- Meta, fp8: float8 experts under their usual keys, scales of each output in fp8_scales_{rank}.pt
- Meta, int4: two numbers a byte along the inputs, scales of groups of inputs in int4_scales_{rank}.pt

The table (`weights.table`) lays out values and scales as it does any tensor. Here each format's scales only get the
name and the shape by which it knows them: that of their values, and `_scale`; a number for each output and group.

Sources: the loader and `scripts/quantize.py` of llama-models 0.3.0, `integrations/fbgemm_fp8.py` of transformers 5.23.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Float

from llama4_jax.ops.quantization import unpack_int4
from llama4_jax.untrusted_json import shortened
from llama4_jax.weights.mapped import FileTensor, Shape
from llama4_jax.weights.meta_files import MetaCheckpoint
from llama4_jax.weights.table import SCALE, Index, Row

# Numbers packed into int32, blocks with inverse scales, zero points.
_OTHER_QUANTIZERS = (".weight_packed", ".qweight", ".weight_scale_inv", ".weight_zero_point", ".qzeros")
_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


# ---------------------------------------------------------------------------------------------------------------------
# What the files hold


@dataclass(frozen=True)
class HFTensors:
    """The tensors of a Hugging Face checkpoint. Raises ValueError for float8 values without scales, and for values and
    scales of other quantizers."""

    files: Mapping[str, FileTensor]

    def __post_init__(self):
        for name, tensor in self.files.items():
            if name.endswith(_OTHER_QUANTIZERS):
                raise ValueError(
                    f"{shortened(name)} is of a quantization that is not read here: read are weights of 8 bits with "
                    f"scales named weight{SCALE}. Dequantize it with the tool that made it, and take the result."
                )
            if tensor.dtype in _FLOAT8 and name + SCALE not in self.files:
                of = shortened(name)
                raise ValueError(f"{of} is {tensor.dtype}, but there is no scale for it: expected {of}{SCALE}.")

    def shapes(self) -> dict[str, Shape]:
        return {name: self._scale_shape(name) or tensor.shape for name, tensor in self.files.items()}

    def read(self, name: str) -> np.ndarray:
        """In the file's dtype; scales of a linear layer [out, groups]."""
        array, shape = self.files[name].map(), self._scale_shape(name)
        if shape is None:
            return array
        blocks = array.reshape(-1, shape[1])
        return np.repeat(blocks, shape[0] // len(blocks), axis=0)

    def _scale_shape(self, name: str) -> Shape | None:
        """Of a linear layer's scales as the table has them; None for all else. The files may have one for the whole
        layer, or for a block of several outputs."""
        linear = self.files.get(name.removesuffix(SCALE)) if name.endswith(f".weight{SCALE}") else None
        if linear is None or len(linear.shape) != 2:
            return None
        own, outputs = self.files[name].shape, linear.shape[0]
        blocks, groups = (*own, 1, 1)[:2]
        return None if len(own) > 2 or not blocks or outputs % blocks else (outputs, groups)


@dataclass(frozen=True)
class MetaTensors:
    """The tensors of one model-parallel rank. Quantized experts take the names and shapes of Meta's own modules, and so
    do their scales: `experts.w1` [E, D, F], of int4 [E, D/2, F] bytes; `experts.w1_scale` [E, groups, F]; `w3`
    likewise, `w2` [E, F, D]. Raises ValueError, when it is asked for, for scales without values."""

    checkpoint: MetaCheckpoint
    rank: int

    def shapes(self) -> dict[str, Shape]:
        return {name: self._shape(name, tensor) for name, tensor in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """In the file's dtype; bytes that hold two numbers are uint8."""
        tensor = self._names[name]
        array = tensor.map().reshape(self._shape(name, tensor))
        return array.view(np.uint8) if name in self._scales and self.checkpoint.quantization == "int4" else array

    @functools.cached_property
    def _scales(self) -> dict[str, FileTensor]:
        return self.checkpoint.scales[self.rank] if self.checkpoint.quantization else {}

    @functools.cached_property
    def _names(self) -> dict[str, FileTensor]:
        """The files' tensors, with the experts that have scales under the names of the scales, and these beside."""
        modules = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}
        names, scales = {}, self._scales
        for name, tensor in self.checkpoint.ranks[self.rank].items():
            where, _, last = name.rpartition(".")
            module = f"{where}.{modules[last]}" if last in modules else name
            names[module if module in scales else name] = tensor
        unused = scales.keys() - names.keys()
        if unused:
            first = shortened(min(unused))
            raise ValueError(f"rank {self.rank} has scales for {first}, which it does not hold.")
        return names | {name + SCALE: scale for name, scale in scales.items()}

    def _shape(self, name: str, tensor: FileTensor) -> Shape:
        """Experts are apart, and so are groups, of which fp8 has one."""
        of_values = name.removesuffix(SCALE)
        if of_values not in self._scales:
            return tensor.shape
        experts, outputs = self._scales[of_values].shape[0], tensor.shape[-1]
        return experts, math.prod(tensor.shape) // max(1, experts * outputs), outputs


# ---------------------------------------------------------------------------------------------------------------------
# The product


@runtime_checkable
class Stored(Protocol):
    """Our tensors as they are stored: values under a tensor's name, scales under that and `_scale`."""

    def shape(self, name: str) -> Shape: ...

    def read(self, name: str, part: Index | None = None) -> np.ndarray: ...


def dequantized(row: Row, stored: Stored, part: Index | None = None) -> Float[np.ndarray, "..."]:
    """A quantized tensor, or a part of it, in float32: values · scales.

    - row: of the tensor, unpacked; `part` is of its shape
    """
    part = row.whole if part is None else part
    return unpacked_values(row, stored, part).astype(np.float32) * _scales(row, stored, part)


def unpacked_values(row: Row, stored: Stored, part: Index) -> np.ndarray:
    """The values alone of a part of a tensor, one to each of its numbers: int4 where two share a byte."""
    if stored.shape(row.ours) == row.shape:
        return stored.read(row.ours, part)
    axis = row.axes.split().index(row.contracted.split()[-1])
    wanted = part[axis]
    whole_bytes = slice(wanted.start // 2, -(-wanted.stop // 2))
    numbers = unpack_int4(stored.read(row.ours, (*part[:axis], whole_bytes, *part[axis + 1 :])), axis)
    first = wanted.start % 2
    return numbers[(slice(None),) * axis + (slice(first, first + wanted.stop - wanted.start),)]


def steps(row: Row, stored: Stored) -> Float[np.ndarray, "..."]:
    """How far from each number of a quantized tensor the next one is that it could have been, in float32."""
    values, scales = unpacked_values(row, stored, row.whole), _scales(row, stored, row.whole)
    if values.dtype not in _FLOAT8:
        return np.broadcast_to(scales, row.shape)
    numbers = ml_dtypes.finfo(values.dtype)
    magnitudes = np.maximum(np.abs(values.astype(np.float32)), np.float32(numbers.smallest_normal))
    _, exponents = np.frexp(magnitudes)  # of a mantissa from 1/2 to 1
    return np.ldexp(np.float32(numbers.eps), exponents - 1) * scales


def _scales(row: Row, stored: Stored, part: Index) -> Float[np.ndarray, "..."]:
    """Of a part of a tensor, such that they broadcast against its values."""
    bounds = dict(zip(row.axes.split(), part, strict=True))
    scale = row.scale(1)
    axes, inputs = scale.axes.split(), row.contracted.split()
    groups = stored.shape(scale.ours)[axes.index("G")]
    of_scale = tuple(slice(0, groups) if axis == "G" else bounds[axis] for axis in axes)
    lengths = [row.sizes[axis] for axis in inputs]
    number = np.arange(math.prod(lengths)).reshape(lengths)[tuple(bounds[axis] for axis in inputs)]
    if groups == 1:
        number = number[(slice(0, 1),) * len(inputs)]
    scales = stored.read(scale.ours, of_scale).astype(np.float32)
    return scales.take(number * groups // math.prod(lengths), axis=axes.index("G"))

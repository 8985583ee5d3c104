"""Published quantized checkpoints as ordinary tensors: values · scales, computed piece by piece as they are read.

- Hugging Face, compressed-tensors (Maverick FP8): float8 linear layers, one for each expert, with `.weight_scale` of a
  number for each output
- Hugging Face, fbgemm: float8 fused experts with `gate_up_proj_scale` [E, 1, 2F] and `down_proj_scale` [E, D, 1], and
  linear layers with `.weight_scale`
- Meta, fp8: float8 experts under their usual keys, scales of each output in fp8_scales_{rank}.pt
- Meta, int4: two numbers a byte along the inputs, scales of groups of inputs in int4_scales_{rank}.pt

Sources: the loader and `scripts/quantize.py` of llama-models 0.3.0, `integrations/fbgemm_fp8.py` of transformers 5.23.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from llama4_jax.weights.mapped import FileTensor, Shape
from llama4_jax.weights.meta_files import MetaCheckpoint
from llama4_jax.weights.table import View, quantized

_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SCALE = re.compile(r"(.*)(?:(\.weight)_scale|((?:gate_up|down)_proj)_scale)")


@dataclass(frozen=True)
class HFTensors:
    """The tensors of a Hugging Face checkpoint, those with scales multiplied by them, in bfloat16.

    Raises ValueError for float8 values without scales, and for scales that do not fit their values.
    """

    files: Mapping[str, FileTensor]

    def __post_init__(self):
        for name, tensor in self.files.items():
            if tensor.dtype in _FLOAT8 and name not in self._scales:
                raise ValueError(f"{name} is {tensor.dtype}, but there is no scale for it: expected {name}_scale.")

    def shapes(self) -> dict[str, Shape]:
        scales = set(self._scales.values())
        return {name: tensor.shape for name, tensor in self.files.items() if name not in scales}

    def read(self, name: str) -> View:
        values, scale = self.files[name].map(), self._scales.get(name)
        if scale is None:
            return values
        scales = self.files[scale].map()
        if name.endswith("experts.down_proj"):
            scales = scales.swapaxes(-1, -2)  # stored for the transposed matrix
        return _with_scales(name, values, scales)

    @functools.cached_property
    def _scales(self) -> dict[str, str]:
        """Name of a tensor → name of its scales."""
        found = {}
        for name in self.files:
            match = _SCALE.fullmatch(name)
            if match and (values := match[1] + (match[2] or match[3])) in self.files:
                found[values] = name
        return found


@dataclass(frozen=True)
class MetaTensors:
    """The tensors of one model-parallel rank, quantized experts multiplied by their scales, in bfloat16. They take the
    names and shapes of Meta's own modules: `experts.w1` [E, D, F], `w3` likewise, `w2` [E, F, D]."""

    checkpoint: MetaCheckpoint
    rank: int

    def shapes(self) -> dict[str, Shape]:
        return {name: self._shape(name, tensor) for name, tensor in self._names.items()}

    def read(self, name: str) -> View:
        values, scale = self._names[name].map(), self._scales.get(name)
        if scale is None:
            return values
        scales = scale.map()
        values = values.reshape(scales.shape[0], -1, values.shape[-1])
        if self.checkpoint.quantization == "int4":
            return _from_int4(name, values, scales)
        return _with_scales(name, values, scales[:, None, :])

    @functools.cached_property
    def _scales(self) -> dict[str, FileTensor]:
        return self.checkpoint.scales[self.rank] if self.checkpoint.quantization else {}

    @functools.cached_property
    def _names(self) -> dict[str, FileTensor]:
        """The files' tensors, with the experts that have scales under the names of the scales."""
        modules = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}
        names, scales = {}, self._scales
        for name, tensor in self.checkpoint.ranks[self.rank].items():
            where, _, last = name.rpartition(".")
            module = f"{where}.{modules[last]}" if last in modules else name
            names[module if module in scales else name] = tensor
        unused = scales.keys() - names.keys()
        if unused:
            raise ValueError(f"rank {self.rank} has scales for {', '.join(sorted(unused))}, which it does not hold.")
        return names

    def _shape(self, name: str, tensor: FileTensor) -> Shape:
        if name not in self._scales:
            return tensor.shape
        experts = self._scales[name].shape[0]
        per_byte = 2 if self.checkpoint.quantization == "int4" else 1
        return experts, per_byte * tensor.shape[0] // experts, tensor.shape[1]


def _with_scales(name: str, values: np.ndarray, scales: np.ndarray) -> View:
    try:
        return quantized(values, scales, _BFLOAT16)
    except ValueError as error:
        raise ValueError(f"{name}: scales {list(scales.shape)} do not fit values {list(values.shape)}.") from error


def _from_int4(name: str, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, K/2, N] bytes and [E, K/group, N] scales → [E, K, N]: byte k holds input 2k low and 2k + 1 high, signed."""
    packed = values.view(np.int8)
    experts, half, outputs = packed.shape
    if scales.shape[2] != outputs or 2 * half % scales.shape[1]:
        raise ValueError(f"{name}: scales of {list(scales.shape)} do not fit int4 of {[experts, 2 * half, outputs]}.")
    out = np.empty((experts, 2 * half, outputs), _BFLOAT16)
    for expert in range(experts):  # so that float32 is held of one only
        pair = np.stack([packed[expert] << 4 >> 4, packed[expert] >> 4], axis=1)  # shifts keep the sign
        groups = pair.reshape(scales.shape[1], -1, outputs) * scales[expert][:, None, :]
        out[expert] = groups.reshape(2 * half, outputs)
    return out

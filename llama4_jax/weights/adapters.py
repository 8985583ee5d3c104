"""Directories of ours that hold LoRA's factors alone, and the base that they belong on.

    runs/my-lora/base.json          which directory the base is, of which step, and a digest of what it holds
    runs/my-lora/checkpoints/…      the factors: layers.3.attention.q.lora.a …

A base with other weights is refused: factors mean nothing beside them. As weights (`open_weights`) such a directory is
the base with the factors added to its matrices, part by part as they are read, so that whatever reads weights merges
them. A model that is loaded to run keeps them apart (`weights.load`).
"""

import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import xxhash
from etils import epath

from llama4_jax.atomic import AnyPath, write_atomically
from llama4_jax.model.config import LoraConfig, ModelConfig
from llama4_jax.untrusted_json import read_json, shortened
from llama4_jax.weights import table
from llama4_jax.weights.dequantize import dequantized
from llama4_jax.weights.quantized import Parameters
from llama4_jax.weights.table import SCALE, Index, Row, Shape

BASE = "base.json"
_WHOLE_BYTES, _SAMPLE_BYTES = 2**20, 2**16  # of a tensor that is digested whole, of a sample of a larger one
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Base(msgspec.Struct, frozen=True):
    """What factors belong on.

    - path: a directory, or a name on the Hugging Face Hub
    - step: of its checkpoint, if it is a directory of ours
    - digest: of its tensors, see `digest`
    """

    path: str
    step: int | None
    digest: str


def base_of(path: epath.PathLike, weights) -> Base:
    """What is to be kept of a base that was opened."""
    path = str(path)
    return Base(str(Path(path).resolve()) if Path(path).is_dir() else path, weights.step_of_run, digest(weights))


def write_base(directory: AnyPath, base: Base) -> None:
    write_atomically(directory / BASE, msgspec.json.format(msgspec.json.encode(base), indent=1))


def open_base(directory: AnyPath):
    """The weights that the factors in a directory belong on.

    Raises ValueError if they are not those that the factors were trained beside, and FileNotFoundError if there are
    none where base.json says.
    """
    from llama4_jax.weights.source import open_weights

    file = directory / BASE
    if not file.is_file():
        raise FileNotFoundError(f"{directory} holds adapters, but no {BASE} that says which weights they belong on.")
    base = read_json(file, of=Base)
    try:
        weights = open_weights(base.path, step=base.step)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{directory} holds adapters, whose base is not there: {shortened(str(error), 200)} Put it back, or write "
            f"where it is into {file}."
        ) from error
    if digest(weights) != base.digest:
        raise ValueError(
            f"{base.path} holds other weights than those that the adapters in {directory} belong on (its digest is not "
            f"that in {file}): put those back, or write where they are into that file."
        )
    return weights


def digest(weights) -> str:
    """A digest of all names, shapes and dtypes of weights, and of their values: all of small tensors, and samples at
    the beginning, in the middle and at the end of larger ones. It tells models and checkpoints apart and reads little.
    A single number that was changed in a large tensor can go unnoticed; checksums of files are for that."""
    made = xxhash.xxh3_128()
    for name in sorted(weights.names):
        shape, dtype = weights.shape(name), weights.dtype(name)
        made.update(f"{name} {shape} {dtype.name}\n".encode())
        for part in _samples(shape, dtype.itemsize):
            made.update(np.ascontiguousarray(weights.read(name, part)).view(np.uint8).reshape(-1))
    return made.hexdigest()


def _samples(shape: Shape, itemsize: int) -> list[Index]:
    if not shape or itemsize * int(np.prod(shape)) <= _WHOLE_BYTES:
        return [tuple(slice(0, size) for size in shape)]
    left, sizes = _SAMPLE_BYTES // itemsize, []
    for size in reversed(shape[1:]):
        sizes.insert(0, min(size, max(1, left)))
        left //= sizes[0]
    inner = tuple(slice((size - own) // 2, (size - own) // 2 + own) for size, own in zip(shape[1:], sizes, strict=True))
    first = [min(at, shape[0] - 1) for at in (0, shape[0] // 2, shape[0] - 1)]
    own = max(1, min(left, shape[0]))
    return [(slice(max(0, min(at, shape[0] - own)), max(0, min(at, shape[0] - own)) + own), *inner) for at in first]


class MergedWeights:
    """`Weights` of a base with LoRA's factors added to its matrices: W + A · B · scale, in the base's dtype, summed in
    float64. Those of a quantized base are dequantized first, and bfloat16."""

    format = "run"

    def __init__(self, path: AnyPath, factors, lora: LoraConfig, base):
        self.path, self.factors, self.lora, self.base = path, factors, lora, base
        self.config: ModelConfig = base.config
        self.provenance: Mapping[str, str] = base.provenance
        self.step_of_run = factors.step_of_run
        self._parameters = Parameters(base)
        self._rows = {row.ours: row for row in table.rows(base.config)}
        self._of = {name: pair for name in base.names if (pair := factor_names(name)) and pair[0] in factors.names}
        beside = {name for pair in self._of.values() for name in pair}
        wrong = sorted(set(factors.names) ^ beside)
        if wrong:
            raise ValueError(f"{path} holds adapters that do not fit its base: {', '.join(wrong[:4])}.")
        for name, (a, b) in self._of.items():
            expected = factor_shapes(self._rows[name], lora.rank)
            if (factors.shape(a), factors.shape(b)) != expected:
                raise ValueError(
                    f"{path}: the adapters of {name} have the shapes {list(factors.shape(a))} and "
                    f"{list(factors.shape(b))}, where its config makes them {list(expected[0])} and "
                    f"{list(expected[1])}."
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.base.names if not self._is_scale(name))

    def shape(self, name: str) -> Shape:
        return self._parameters.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return _BFLOAT16 if self._parameters.is_quantized(name) else self.base.dtype(name)

    def read(self, name: str, part: Index | None = None) -> np.ndarray:
        part = tuple(slice(0, size) for size in self.shape(name)) if part is None else part
        if self._parameters.is_quantized(name):
            values = dequantized(self._rows[name], self.base, part)
        else:
            values = self.base.read(name, part)
        if name in self._of:
            values = values.astype(np.float64) + self._delta(name, part)
        return np.ascontiguousarray(values).astype(self.dtype(name), copy=False)

    def parts(self, name: str, limit: int) -> Shape:
        if not self._parameters.is_quantized(name):
            return self.base.parts(name, limit)
        shape = list(self.shape(name))
        for axis in range(len(shape)):
            size = 4 * int(np.prod(shape))  # while it is summed
            if size > limit:
                shape[axis] = max(1, shape[axis] * limit // size)
        return tuple(shape)

    def _is_scale(self, name: str) -> bool:
        return name.endswith(SCALE) and self._parameters.is_quantized(name.removesuffix(SCALE))

    def _delta(self, name: str, part: Index) -> np.ndarray:
        """Reads a part of a matrix, and of the factors only what it meets."""
        row = self._rows[name]
        bounds = dict(zip(row.axes.split(), part, strict=True)) | {"R": slice(0, self.lora.rank)}
        a_axes, b_axes = factor_axes(row)
        factors = [
            self.factors.read(own, tuple(bounds[axis] for axis in axes.split())).astype(np.float64)
            for own, axes in zip(self._of[name], (a_axes, b_axes), strict=True)
        ]
        letters = [axes.replace(" ", "") for axes in (a_axes, b_axes, row.axes)]
        return np.einsum(f"{letters[0]},{letters[1]}->{letters[2]}", *factors, optimize=True) * self.lora.scale


def factor_names(name: str) -> tuple[str, str] | None:
    """The names of the factors of a matrix; None of what is no matrix that can have them."""
    owner, _, last = name.rpartition(".")
    if re.fullmatch(r"layers\.\d+\.moe\.(gate_up|down)", name):
        return f"{name}_lora.a", f"{name}_lora.b"
    return (f"{owner}.lora.a", f"{owner}.lora.b") if last == "kernel" else None


def factor_axes(row: Row) -> tuple[str, str]:
    """The axes of the factors of a matrix, in the table's words, with R for the rank (see `model.lora`)."""
    axes, contracted = row.axes.split(), row.contracted.split()
    if axes[0] == "E" and "F" in axes:  # routed experts
        return " ".join([axes[0], axes[-2], "R"]), " ".join([*axes[:-2], "R", axes[-1]])
    outputs = [axis for axis in axes if axis not in contracted]
    halves = [axis for axis in outputs if axis == "P"]
    return " ".join([*contracted, *halves, "R"]), " ".join([*halves, "R", *(a for a in outputs if a not in halves)])


def factor_shapes(row: Row, rank: int) -> tuple[Shape, Shape]:
    sizes = {**row.sizes, "R": rank}
    a, b = (tuple(sizes[axis] for axis in axes.split()) for axes in factor_axes(row))
    return a, b

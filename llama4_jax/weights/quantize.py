"""Weights of any directory → a directory of ours with quantized matrices, part by part, as conversion does.

A part holds whole groups of inputs, so that its scales follow from itself. Where an output has one scale, that is all
of its inputs, and a part may be large: it is then read twice in pieces, first for the greatest magnitudes.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from llama4_jax.config import converted_to_json
from llama4_jax.hub import model_directory
from llama4_jax.model.quantized import is_of_decoder
from llama4_jax.ops.quantization import Scheme, amax, encode, num_groups, pack_int4, scale_of
from llama4_jax.untrusted_json import read_json
from llama4_jax.weights import table
from llama4_jax.weights.convert import DTYPES, copying
from llama4_jax.weights.load import preset_differences
from llama4_jax.weights.source import FileWeights, Weights, open_weights
from llama4_jax.weights.table import SCALE, Index, Row, Shape
from llama4_jax.weights.workplace import (
    PART_BYTES,
    Done,
    Job,
    Report,
    Workplace,
    Write,
    finite,
    identity_of,
    make_run,
    parts_of,
    same,
)


class Made(NamedTuple):
    done: Done
    table: str  # every tensor: what it was and what it is, those of equal shape in several layers in one line


def quantize(
    source: str | Path,
    destination: str | Path,
    scheme: Scheme,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    verify: bool = False,
    report: Report = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Made:
    """Makes a directory of ours whose decoder has quantized matrices (`model.quantized`), of one of ours or a Hugging
    Face or Meta directory.

    - dtype: of the tensors that are not quantized; None keeps each as it is
    - verify: read everything back when it is written, and compare it bit for bit
    - say: is told how the config differs from the preset of its sizes, a line a field

    Raises ValueError for a source that is quantized already, and for groups that do not divide a matrix; otherwise as
    `convert` does. All but values that are not finite is found before anything is written, and what is finished is kept
    for the same command to go on with.
    """
    source, destination = Path(model_directory(source)), Path(destination)
    weights = open_weights(source)
    tensors = {tensor.name: tensor for tensor in _tensors(weights, scheme, dtype)}
    for line in preset_differences(weights.config):
        say(line)
    jobs = [tensor.job for tensor in tensors.values()]
    asked = {"quantize": dataclasses.asdict(scheme), "from": identity_of(source), "dtype": dtype, "arrays": "zarr3"}
    with Workplace(destination, asked, jobs) as work:

        def prepare(job: Job) -> Write:
            tensor = tensors[job.name]
            if isinstance(tensor, _Matrix):
                return _prepare_matrix(tensor, weights, work, verify)
            return copying(weights, work, job, verify)

        work.run(prepare, report)
        scales = [name + SCALE for name, tensor in tensors.items() if isinstance(tensor, _Matrix)]
        made = make_run(work, [*tensors, *scales], _config_json(source, weights, scheme), source)
        work.finish(made)
    return Made(work.done, _table(weights, list(tensors.values())))


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A tensor that is not quantized."""

    job: Job

    @property
    def name(self) -> str:
        return self.job.name


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A tensor that is. Its parts are in its own shape; bytes that hold two numbers are its array's."""

    row: Row
    scheme: Scheme
    groups: int  # of inputs; each has a scale for every output

    @property
    def name(self) -> str:
        return self.row.ours

    @property
    def start(self) -> int:
        """The first axis that is inputs."""
        return self.row.axes.split().index(self.row.contracted.split()[0])

    @property
    def num_contract(self) -> int:
        return len(self.row.contracted.split())

    @property
    def inputs(self) -> dict[str, int]:
        """As the functions of `ops.quantization` take it."""
        return {"start": self.start, "num_contract": self.num_contract}

    @property
    def is_packed(self) -> bool:
        return self.scheme.weights == "int4"

    @property
    def scale_dtype(self) -> np.dtype:
        return scale_of(np.ones(1, np.float32), self.scheme).dtype

    @property
    def job(self) -> Job:
        beside = math.prod(self.row.scale(self.groups).shape) * self.scale_dtype.itemsize
        dtype = np.dtype(np.uint8) if self.is_packed else self.scheme.number.dtype
        return Job(self.name, self.row.shape, dtype, 2 if self.is_packed else 1, beside)

    def pieces(self, shape: Shape) -> Shape:
        """About this shape: such that no group, and no byte, is cut."""
        start, last = self.start, self.start + self.num_contract - 1
        if self.scheme.group is not None and start < last:
            return self.with_all_inputs(shape)
        unit = math.lcm(self.scheme.group or 1, 2 if self.is_packed else 1)
        length = min(self.row.shape[last], -(-shape[last] // unit) * unit)
        return (*shape[:last], length, *shape[last + 1 :])

    def with_all_inputs(self, shape: Shape) -> Shape:
        after = self.start + self.num_contract
        return (*shape[: self.start], *self.row.shape[self.start : after], *shape[after:])

    def groups_in(self, shape: Shape) -> int:
        """Of a part of this shape, which holds whole ones."""
        inputs = math.prod(shape[self.start : self.start + self.num_contract])
        return 1 if self.scheme.group is None else inputs // self.scheme.group

    def place_of_scales(self, part: Index) -> Index:
        """Of a part."""
        before = part[self.start].start * math.prod(self.row.shape[self.start + 1 : self.start + self.num_contract])
        first = 0 if self.scheme.group is None else before // self.scheme.group
        groups = slice(first, first + self.groups_in(_sizes(part)))
        return (*part[: self.start], groups, *part[self.start + self.num_contract :])

    def place_of_values(self, part: Index) -> Index:
        """In the array."""
        if not self.is_packed:
            return part
        last = self.start + self.num_contract - 1
        return (*part[:last], slice(part[last].start // 2, part[last].stop // 2), *part[last + 1 :])

    def values(self, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """As the array has them."""
        values = encode(w, scale, self.scheme, **self.inputs)
        return pack_int4(values, self.start + self.num_contract - 1) if self.is_packed else values


def _sizes(part: Index) -> Shape:
    return tuple(s.stop - s.start for s in part)


def _tensors(weights: Weights, scheme: Scheme, dtype: str | None) -> Iterator[_Kept | _Matrix]:
    """What is made of each. Raises ValueError for what cannot be quantized."""
    if isinstance(weights, FileWeights) and weights.plan.vision:
        raise ValueError(
            f"{weights.path} holds {len(weights.plan.vision)} tensors of a vision encoder, but its config describes "
            f"none: add its vision_config, or use the config.json that belongs to it."
        )
    names = weights.plan.by_name if isinstance(weights, FileWeights) else weights.names
    already = [name for name in names if name + SCALE in names]
    if already:
        keep = " To keep it as it is: llama4 convert --keep-quantized." if isinstance(weights, FileWeights) else ""
        raise ValueError(
            f"{weights.path} is quantized already: {len(already)} tensors, such as {already[0]}. Quantize what it was "
            f"made of.{keep}"
        )
    rows = {row.ours: row for row in table.rows(weights.config)}
    for name in weights.names:
        row = rows.get(name)
        if row is None or not row.contracted or not is_of_decoder(name):
            as_it_is = dtype is None or row is None  # what only runs have, such as a router's bias, is float32 always
            target = weights.dtype(name) if as_it_is else DTYPES[dtype]
            yield _Kept(Job(name, weights.shape(name), target))
            continue
        contracted = row.contracted.split()
        start = row.axes.split().index(contracted[0])
        groups = num_groups(row.shape, scheme, start=start, num_contract=len(contracted), what=name)
        if scheme.weights == "int4" and row.sizes[contracted[-1]] % 2:
            raise ValueError(
                f"{name} is {list(row.shape)}, and two numbers of int4 share a byte: its axis of "
                f"{row.sizes[contracted[-1]]} inputs is odd. Choose int8 or fp8."
            )
        yield _Matrix(row, scheme, groups)


def _prepare_matrix(matrix: _Matrix, weights: Weights, work: Workplace, verify: bool) -> Write:
    from llama4_jax.weights.orbax_arrays import create_array

    name, scheme = matrix.name, matrix.scheme
    piece = matrix.pieces(weights.parts(name, PART_BYTES))
    part_shape = piece if scheme.group is not None else matrix.with_all_inputs(piece)
    stored = matrix.row.packed() if matrix.is_packed else matrix.row
    chunk = _sizes(matrix.place_of_values(tuple(slice(0, size) for size in piece)))
    values = create_array(work.array(name), stored.shape, matrix.job.dtype, chunk)
    chunk = _sizes(matrix.place_of_scales(tuple(slice(0, size) for size in part_shape)))
    of_scale = matrix.row.scale(matrix.groups).shape
    scales = create_array(work.array(name + SCALE), of_scale, matrix.scale_dtype, chunk)

    def read(part: Index) -> np.ndarray:
        return finite(weights.read(name, part), name)

    def write(part: Index) -> None:
        pieces = [
            tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(part, own, strict=True))
            for own in parts_of(_sizes(part), piece)
        ]
        groups = matrix.groups_in(_sizes(part))
        first = read(pieces[0])
        largest = amax(first, groups, **matrix.inputs)
        for own in pieces[1:]:  # of one group, then
            largest = np.maximum(largest, amax(read(own), groups, **matrix.inputs))
        scale, place = scale_of(largest, scheme), matrix.place_of_scales(part)
        scales.write(place, scale)
        if verify:
            same(name + SCALE, scale, scales.read(place))
        for own in pieces:
            made, there = matrix.values(first if len(pieces) == 1 else read(own), scale), matrix.place_of_values(own)
            values.write(there, made)
            if verify:
                same(name, made, values.read(there))

    return Write(part_shape, write, lambda: _files(work.array(name), work.array(name + SCALE)))


def _files(*arrays: Path) -> Iterator[Path]:
    return (file for array in arrays for file in array.rglob("*") if file.is_file())


def _config_json(source: Path, weights: Weights, scheme: Scheme) -> str:
    made = converted_to_json(weights.config, dict(weights.provenance), dataclasses.asdict(scheme))
    # Of a run that was trained this says how pictures are cut.
    data = read_json(source / "config.json", of=dict).get("data") if weights.format == "run" else None
    return made if data is None else json.dumps(json.loads(made) | {"data": data}, indent=1)


def _table(weights: Weights, tensors: list[_Kept | _Matrix]) -> str:
    lines: dict[tuple, list[tuple[int, int]]] = {}
    for tensor in tensors:
        kind = re.sub(r"layers\.\d+", "layers.*", tensor.name)
        shape, was, job = weights.shape(tensor.name), weights.dtype(tensor.name), tensor.job
        made = str(tensor.scheme) if isinstance(tensor, _Matrix) else f"{job.dtype.name}, not quantized"
        sizes = math.prod(shape) * was.itemsize, job.bytes
        lines.setdefault((kind, " × ".join(map(str, shape)), was.name, made), []).append(sizes)
    text = [f"{'tensor':<38} {'layers':>6}  {'shape':<26} {'was':<9} {'is':<24} {'MiB, was':>11} {'is':>11}"]
    for (kind, shape, was, made), sizes in lines.items():
        layers = str(len(sizes)) if "*" in kind else ""
        before, after = (sum(each) / 2**20 for each in zip(*sizes, strict=True))
        text.append(f"{kind:<38} {layers:>6}  {shape:<26} {was:<9} {made:<24} {before:>11,.1f} {after:>11,.1f}")
    before, after = (sum(size[i] for sizes in lines.values() for size in sizes) / 2**20 for i in (0, 1))
    return "\n".join([*text, f"{'in all':<38} {'':>6}  {'':<26} {'':<9} {'':<24} {before:>11,.1f} {after:>11,.1f}"])

"""Reading a Hugging Face directory: config.json, and *.safetensors, one file or shards under an index.

A safetensors file is eight bytes of length, that much JSON (name → dtype, shape, byte range), and the bytes. Tensors
are maps of the file (`mapped`), for reading and for writing. (The `safetensors` package itself copies, knows no float8
in numpy, and writes only what is whole in memory.)
Source: the format's description in the README of the package.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np
from etils import epath

from llama4_jax.atomic import any_path, in_bucket
from llama4_jax.untrusted_json import parse_json, read_json, shortened, shown, typed
from llama4_jax.weights.mapped import FileTensor, Shape, reserve

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


_MAX_HEADER = 2**25  # bytes; a file of 100 000 tensors has about half of that
_MAX_SIZE = 2**64  # what the format's own readers count in
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[_Number]
    data_offsets: tuple[_Number, _Number]


class SafetensorsFile:
    """One file.

    - tensors: where each is in it

    Raises FileNotFoundError if there is none; ValueError, naming it, if it is cut short, or no such file. Refused is
    whatever the `safetensors` package refuses (overlaps, holes, sizes that do not fit their shapes …), and besides: a
    header of more than 32 MiB, one that does not begin with its brace, a name that is there twice, an entry that says
    more than its three things, and number formats that are not in `DTYPES`.
    """

    def __init__(self, path: epath.PathLike):
        self.path = any_path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        size = self.path.stat().length if in_bucket(self.path) else self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(
                    f"{self.path} is truncated, or no safetensors file: its header should take {length} bytes, "
                    f"and the file has {size}. Download it again."
                )
            if length > _MAX_HEADER:
                raise ValueError(f"{self.path} has a header of {length:,} bytes: {_MAX_HEADER:,} are read at most.")
            header = file.read(length)
        start = 8 + length
        self.tensors = {
            name: FileTensor(self.path, start + entry.data_offsets[0], DTYPES[entry.dtype], tuple(entry.shape))
            for name, entry in self._entries(header, size - start).items()
        }

    def _entries(self, header: bytes, available: int) -> dict[str, _Entry]:
        corrupt = f"{self.path} is corrupt, or no safetensors file: its header"
        if not header.startswith(b"{"):
            raise ValueError(f"{corrupt} is no JSON object.")
        tree = parse_json(header, where=corrupt, of=dict[str, Any], exact=True)
        typed(tree.pop("__metadata__", None), dict[str, str] | None, where=f"{corrupt}: __metadata__")
        entries = {name: typed(entry, _Entry, where=f"{corrupt}: {shortened(name)}") for name, entry in tree.items()}
        for name, entry in entries.items():
            self._check(shortened(name), entry)
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            start, stop = entry.data_offsets
            if start != end:
                raise ValueError(
                    f"{self.path} is corrupt: {shortened(name)} begins at byte {start:,} of the tensors, but those "
                    f"before it end at {end:,}. Download it again."
                )
            end = stop
        if end != available:
            raise ValueError(
                f"{self.path} is truncated or corrupt: it should hold {end} bytes of tensors and holds {available}. "
                f"Download it again."
            )
        return entries

    def _check(self, name: str, entry: _Entry) -> None:
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.path}: {name} has the dtype {shortened(entry.dtype)}, which is not supported.")
        count = 1
        for length in entry.shape:
            count *= length
            if count >= _MAX_SIZE:
                raise ValueError(f"{self.path} is corrupt: the shape of {name} is of more numbers than can be counted.")
        start, stop = entry.data_offsets
        expected = count * DTYPES[entry.dtype].itemsize
        if stop - start != expected:
            raise ValueError(
                f"{self.path} is corrupt: {name} takes {shown(stop - start)} bytes, but its shape needs {expected}."
            )


def create_safetensors(path: Path, tensors: Mapping[str, tuple[np.dtype, Shape]]) -> dict[str, FileTensor]:
    """A file of these tensors, all zero, to be filled through their maps; one that is there already is kept as it is,
    if it has the same tensors. Raises OSError if the disk has no room for it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries, offset = {}, 0
    widest_first = sorted(tensors.items(), key=lambda item: -item[1][0].itemsize)  # so that each begins aligned
    for name, (dtype, shape) in widest_first:
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of eight
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(len(header).to_bytes(8, "little") + header)
    reserve(path, 8 + len(header) + offset)
    return SafetensorsFile(path).tensors


CONFIG_BYTES = 2**22  # of a config.json or params.json: real ones have a few thousand
_MAX_INDEX = 2**25


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class HFCheckpoint:
    """A directory as `save_pretrained` writes it. It is a source of tensors for `table.from_hf`.

    - config: config.json as it is, an object
    - tensors: where each is, by the file's name for it

    Opening checks everything but the tensors' values: FileNotFoundError for a missing config.json, missing weights or a
    missing shard; ValueError for a damaged file, for an index that names a file outside the directory, and for an index
    and shards that disagree. Each names the file. A shard may be a link to elsewhere, as in Hugging Face's cache.
    """

    def __init__(self, path: epath.PathLike):
        self.path = any_path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no such directory: {self.path}")
        self.config: dict = read_json(
            self.path / "config.json", of=dict, why="a Hugging Face checkpoint has one", max_bytes=CONFIG_BYTES
        )
        if (self.path / INDEX).is_file():
            self.tensors = self._open_shards(read_json(self.path / INDEX, of=_Index, max_bytes=_MAX_INDEX).weight_map)
        elif (self.path / SINGLE).is_file():
            self.tensors = SafetensorsFile(self.path / SINGLE).tensors
        else:
            raise FileNotFoundError(f"no weights in {self.path}: neither {SINGLE} nor {INDEX} is there.")

    def _open_shards(self, weight_map: dict[str, str]) -> dict[str, FileTensor]:
        index = self.path / INDEX
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not _is_inside(shard):
                raise ValueError(f"{index} names the file {shown(shard)}, which is no path within its directory.")
        files = {}
        for shard in shards:
            if not (self.path / shard).is_file():
                lost = shortened(shard)
                raise FileNotFoundError(f"missing shard: {index} names {lost}, which is not in {self.path}.")
            files[shard] = SafetensorsFile(self.path / shard).tensors
        for name, shard in weight_map.items():
            if name not in files[shard]:
                raise ValueError(
                    f"{index} says that {shortened(name)} is in {shortened(shard)}, but it is not. Download both again."
                )
        for shard, tensors in files.items():
            for name in tensors:
                if weight_map.get(name) != shard:
                    where = shortened(weight_map.get(name, "no shard"))
                    raise ValueError(
                        f"{index} says that {shortened(name)} is in {where}, but {shortened(shard)} holds one too."
                    )
        return {name: files[shard][name] for name, shard in weight_map.items()}

    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor in the file's dtype: a read-only map of the file."""
        return self.tensors[name].map()


def _is_inside(shard: str) -> bool:
    """Whether a name is that of a file in the directory, or in one within it."""
    parts = shard.split("/")
    return shard.isprintable() and "\\" not in shard and all(p not in ("", ".", "..") and len(p) < 256 for p in parts)

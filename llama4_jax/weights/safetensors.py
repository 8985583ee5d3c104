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

import ml_dtypes
import numpy as np
from etils import epath

from llama4_jax.atomic import AnyPath, any_path, in_bucket
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


class SafetensorsFile:
    """One file.

    - tensors: where each is in it

    Raises FileNotFoundError if there is none, ValueError if it is cut short or is no such file.
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
            header = file.read(length)
        try:
            entries: dict[str, dict] = json.loads(header)
        except ValueError as error:
            raise ValueError(f"{self.path} is corrupt, or no safetensors file: its header is no JSON.") from error
        entries.pop("__metadata__", None)
        self._check(entries, size - 8 - length)
        self.tensors = {
            name: FileTensor(
                self.path, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"])
            )
            for name, entry in entries.items()
        }

    def _check(self, entries: dict[str, dict], available: int) -> None:
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{self.path}: {name} has the dtype {entry['dtype']}, which is not supported.")
            start, stop = entry["data_offsets"]
            expected = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if stop - start != expected:
                raise ValueError(
                    f"{self.path} is corrupt: {name} takes {stop - start} bytes, but its shape needs {expected}."
                )
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != available:
            raise ValueError(
                f"{self.path} is truncated or corrupt: it should hold {end} bytes of tensors and holds {available}. "
                f"Download it again."
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


class HFCheckpoint:
    """A directory as `save_pretrained` writes it. It is a source of tensors for `table.from_hf`.

    - config: config.json as it is
    - tensors: where each is, by the file's name for it

    Opening checks everything but the tensors' values: FileNotFoundError for a missing config.json, missing weights or a
    missing shard; ValueError for a damaged file, and for an index and shards that disagree. Each names the file.
    """

    def __init__(self, path: epath.PathLike):
        self.path = any_path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no such directory: {self.path}")
        self.config: dict = read_json(self.path / "config.json", "a Hugging Face checkpoint has one")
        if (self.path / INDEX).is_file():
            self.tensors = self._open_shards(read_json(self.path / INDEX, "")["weight_map"])
        elif (self.path / SINGLE).is_file():
            self.tensors = SafetensorsFile(self.path / SINGLE).tensors
        else:
            raise FileNotFoundError(f"no weights in {self.path}: neither {SINGLE} nor {INDEX} is there.")

    def _open_shards(self, weight_map: dict[str, str]) -> dict[str, FileTensor]:
        index = self.path / INDEX
        files = {}
        for shard in sorted(set(weight_map.values())):
            if not (self.path / shard).is_file():
                raise FileNotFoundError(f"missing shard: {index} names {shard}, which is not in {self.path}.")
            files[shard] = SafetensorsFile(self.path / shard).tensors
        for name, shard in weight_map.items():
            if name not in files[shard]:
                raise ValueError(f"{index} says that {name} is in {shard}, but it is not. Download both again.")
        for shard, tensors in files.items():
            for name in tensors:
                if weight_map.get(name) != shard:
                    where = weight_map.get(name, "no shard")
                    raise ValueError(f"{index} says that {name} is in {where}, but {shard} holds one too.")
        return {name: files[shard][name] for name, shard in weight_map.items()}

    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor in the file's dtype: a read-only map of the file."""
        return self.tensors[name].map()


def read_json(path: AnyPath, why: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}" + (f" ({why})." if why else "."))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error

"""Reading a Hugging Face directory: config.json, and *.safetensors, one file or shards under an index.

A safetensors file is eight bytes of length, that much JSON (name → dtype, shape, byte range), and the bytes. Tensors
are returned as views of the memory-mapped file, in the file's own dtype: nothing is read before it is touched, and
slicing reads the slice only. (The `safetensors` package itself copies, and knows no float8 in numpy.)
Source: the format's description in the README of the package.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]

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
    """One file, memory-mapped for as long as this object or any array from it lives.

    Raises FileNotFoundError if there is none, ValueError if it is cut short or is no such file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(
                    f"{self.path} is truncated, or no safetensors file: its header should take {length} bytes, "
                    f"and the file has {size}. Download it again."
                )
            header = file.read(length)
        try:
            self._entries: dict[str, dict] = json.loads(header)
        except ValueError as error:
            raise ValueError(f"{self.path} is corrupt, or no safetensors file: its header is no JSON.") from error
        self._entries.pop("__metadata__", None)
        self._start = 8 + length
        self._check(size - self._start)
        self._bytes = np.memmap(self.path, np.uint8, "r") if size else np.empty(0, np.uint8)

    def _check(self, available: int) -> None:
        for name, entry in self._entries.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{self.path}: {name} has the dtype {entry['dtype']}, which is not supported.")
            start, stop = entry["data_offsets"]
            expected = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if stop - start != expected:
                raise ValueError(
                    f"{self.path} is corrupt: {name} takes {stop - start} bytes, but its shape needs {expected}."
                )
        end = max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)
        if end != available:
            raise ValueError(
                f"{self.path} is truncated or corrupt: it should hold {end} bytes of tensors and holds {available}. "
                f"Download it again."
            )

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> Shape:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> np.dtype:
        return DTYPES[self._entries[name]["dtype"]]

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file."""
        start, stop = (self._start + offset for offset in self._entries[name]["data_offsets"])
        return self._bytes[start:stop].view(np.ndarray).view(self.dtype(name)).reshape(self.shape(name))


class HFCheckpoint:
    """A directory as `save_pretrained` writes it. It is a source of tensors for `table.from_hf`.

    - config: config.json as it is

    Opening checks everything but the tensors' values: FileNotFoundError for a missing config.json, missing weights or a
    missing shard; ValueError for a damaged file, and for an index and shards that disagree. Each names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no such directory: {self.path}")
        self.config: dict = _read_json(self.path / "config.json", "a Hugging Face checkpoint has one")
        if (self.path / INDEX).is_file():
            self._file_of = self._open_shards(_read_json(self.path / INDEX, "")["weight_map"])
        elif (self.path / SINGLE).is_file():
            file = SafetensorsFile(self.path / SINGLE)
            self._file_of = dict.fromkeys(file.names(), file)
        else:
            raise FileNotFoundError(f"no weights in {self.path}: neither {SINGLE} nor {INDEX} is there.")

    def _open_shards(self, weight_map: dict[str, str]) -> dict[str, SafetensorsFile]:
        index = self.path / INDEX
        files = {}
        for shard in sorted(set(weight_map.values())):
            if not (self.path / shard).is_file():
                raise FileNotFoundError(f"missing shard: {index} names {shard}, which is not in {self.path}.")
            files[shard] = SafetensorsFile(self.path / shard)
        for name, shard in weight_map.items():
            if name not in files[shard].names():
                raise ValueError(f"{index} says that {name} is in {shard}, but it is not. Download both again.")
        for shard, file in files.items():
            for name in file.names():
                if weight_map.get(name) != shard:
                    where = weight_map.get(name, "no shard")
                    raise ValueError(f"{index} says that {name} is in {where}, but {shard} holds one too.")
        return {name: files[shard] for name, shard in weight_map.items()}

    def names(self) -> list[str]:
        return list(self._file_of)

    def shapes(self) -> dict[str, Shape]:
        return {name: file.shape(name) for name, file in self._file_of.items()}

    def shape(self, name: str) -> Shape:
        return self._file_of[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._file_of[name].dtype(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor in the file's dtype: a read-only view of the mapped file."""
        return self._file_of[name].read(name)


def _read_json(path: Path, why: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}" + (f" ({why})." if why else "."))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error

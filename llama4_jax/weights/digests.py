"""Digests of the tensors of exported files, in a file beside them, so that other tools load the rest as it is.

`digests.json` has the XXH3 of every tensor in blocks of 4 MiB. A block is held against it when it is first read, for a
part of a tensor as for all of it. A directory that comes from elsewhere has no such file, and is read without.
"""

import bisect
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from llama4_jax.atomic import AnyPath, write_atomically
from llama4_jax.untrusted_json import read_json
from llama4_jax.weights.mapped import FileTensor, place_in_file

DIGESTS = "digests.json"
BLOCK_BYTES = 4 * 2**20
_ALGORITHM = "xxh3_64"
_THREADS = 4  # xxhash lets other threads run


class TensorDigests(msgspec.Struct, frozen=True):
    """Of one tensor: where it is in its file, and the digest of each block of its bytes, in hexadecimal digits."""

    offset: int
    bytes: int
    blocks: list[str]


class DigestsFile(msgspec.Struct, frozen=True):
    algorithm: str
    block_bytes: int
    files: dict[str, dict[str, TensorDigests]]  # of each file, by the names of its tensors


def write_digests(directory: Path, files: Mapping[Path, Mapping[str, FileTensor]]) -> None:
    """Digests of what these files hold now."""

    def of(tensor: FileTensor) -> TensorDigests:
        data = tensor.bytes_mapped()
        return TensorDigests(tensor.offset, data.size, [_digest(data[s]) for s in _blocks(data.size, BLOCK_BYTES)])

    with ThreadPoolExecutor(_THREADS) as pool:
        made = {
            path.name: dict(zip(tensors, pool.map(of, tensors.values()), strict=True))
            for path, tensors in files.items()
        }
    content = msgspec.json.encode(DigestsFile(_ALGORITHM, BLOCK_BYTES, made))
    write_atomically(directory / DIGESTS, msgspec.json.format(content, indent=1))


class Digests:
    """What a directory's `digests.json` says. Raises ValueError if that is no such file."""

    def __init__(self, directory: AnyPath):
        self.directory = directory
        path = directory / DIGESTS
        self._known = read_json(path, of=DigestsFile)
        if self._known.algorithm != _ALGORITHM or self._known.block_bytes < 1:
            raise ValueError(
                f"{path} has digests of another kind ({self._known.algorithm}): remove it to read without them."
            )
        self._by_offset = {
            file: sorted((entry.offset, name) for name, entry in tensors.items())
            for file, tensors in self._known.files.items()
        }
        self._checked: set[tuple[str, str, int]] = set()

    @classmethod
    def of(cls, directory: AnyPath) -> "Digests | None":
        """None if there are none."""
        return cls(directory) if (directory / DIGESTS).is_file() else None

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self._known.files)

    def check(self, view: np.ndarray) -> None:
        """Raises ValueError, naming file and tensor, if a block that this part of a mapped tensor meets is not as it
        was written. Each block is looked at once."""
        place = place_in_file(view)
        if place is None or place.path.name not in self._known.files or view.size == 0:
            return
        file = place.path.name
        tensors, offsets = self._known.files[file], self._by_offset[file]
        i = bisect.bisect_right(offsets, (place.start, chr(0x10FFFF))) - 1
        entry = tensors[offsets[i][1]] if i >= 0 else None
        if entry is None or place.stop > entry.offset + entry.bytes:
            raise ValueError(self._changed(file, "the places of its tensors"))
        name, size = offsets[i][1], self._known.block_bytes
        for block in range((place.start - entry.offset) // size, -(-(place.stop - entry.offset) // size)):
            if (file, name, block) in self._checked:
                continue
            start = block * size
            data = place.bytes(entry.offset + start, entry.offset + min(start + size, entry.bytes))
            if block >= len(entry.blocks) or _digest(data) != entry.blocks[block]:
                raise ValueError(self._changed(file, f"its tensor {name}"))
            self._checked.add((file, name, block))

    def damaged(self, files: Mapping[str, Mapping[str, FileTensor]]) -> Iterator[str]:
        """Reads everything: the tensors, as "FILE: TENSOR", that are not as they were written."""
        for file in sorted(self._known.files.keys() - files.keys()):
            yield f"{file}: it is not there"

        def damage(item: tuple[str, str]) -> str | None:
            file, name = item
            try:
                if name not in files[file]:
                    return f"{file}: {name}, which is not there"
                self.check(files[file][name].map())
            except ValueError:
                return f"{file}: {name}"
            return None

        every = [
            (file, name) for file in sorted(self._known.files.keys() & files.keys()) for name in self._known.files[file]
        ]
        with ThreadPoolExecutor(_THREADS) as pool:
            yield from filter(None, pool.map(damage, every))

    def _changed(self, file: str, what: str) -> str:
        return (
            f"{self.directory / file} is damaged: {what} differs from {DIGESTS}, which was written with it. Copy or "
            f"export it again; if it was changed on purpose, remove {DIGESTS}."
        )


def _blocks(size: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, size)) for start in range(0, size, block))


def _digest(data: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(data)

"""A tensor as a range of bytes in a file, mapped into memory while it is used.

Nothing is read before it is touched, and slicing touches the slice only. Each map ends with the array, so that a
process which goes through a checkpoint keeps the pages of what it is at, not of all it has seen.

What is in a bucket cannot be mapped. There a tensor is fetched when it is asked for, and the last one is kept, since it
is mostly asked for part by part.
"""

import functools
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llama4_jax.atomic import AnyPath, in_bucket

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FileTensor:
    path: AnyPath
    offset: int  # bytes
    dtype: np.dtype
    shape: Shape
    strides: Shape | None = None  # bytes; None: row-major

    def map(self, mode: Literal["r", "r+"] = "r") -> np.ndarray:
        """The tensor as an array over the file: read-only, or such that assigning to it writes the file."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if in_bucket(self.path):
            return _fetched(self)
        if self.strides is None:
            return np.memmap(self.path, self.dtype, mode, self.offset, self.shape)
        flat = np.memmap(self.path, np.uint8, mode, self.offset, (self.extent,))
        return np.ndarray(self.shape, self.dtype, flat, 0, self.strides)

    def bytes_mapped(self) -> np.ndarray:
        """Its bytes, from its first to its last, as a read-only map."""
        if not self.extent:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.offset, (self.extent,))

    @property
    def extent(self) -> int:
        """Bytes from its first to its last."""
        if self.strides is None or 0 in self.shape:
            return self.dtype.itemsize * math.prod(self.shape)
        return self.dtype.itemsize + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))


@functools.lru_cache(maxsize=1)
def _fetched(tensor: FileTensor) -> np.ndarray:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        content = file.read(tensor.extent)
    return np.ndarray(tensor.shape, tensor.dtype, content, 0, tensor.strides)


@dataclass(frozen=True)
class Place:
    """Where a part of a mapped tensor is in its file: bytes from `start` to before `stop`."""

    path: Path
    start: int
    stop: int
    _map: np.ndarray  # all bytes that are mapped
    _map_start: int  # in the file

    def bytes(self, start: int, stop: int) -> np.ndarray:
        """Others of the same map, by their places in the file."""
        return self._map[start - self._map_start : stop - self._map_start]


def place_in_file(view: np.ndarray) -> Place | None:
    """None for what is no map of a file, such as what was fetched from a bucket."""
    owner = view
    while owner is not None and getattr(owner, "_mmap", None) is None:
        owner = getattr(owner, "base", None)
    if owner is None:
        return None
    mapped = np.frombuffer(owner._mmap, np.uint8)  # which begins at a page
    begin = owner.offset - owner.offset % mmap.ALLOCATIONGRANULARITY
    first, after = np.lib.array_utils.byte_bounds(view)
    start = mapped.ctypes.data
    return Place(Path(owner.filename), begin + first - start, begin + after - start, mapped, begin)


def write_through(to: np.memmap, values: np.ndarray) -> None:
    """to[...] = values by a system call, where both are row-major and `to` is one run of bytes in its file: through the
    map, the kernel would stop at every page that is touched first."""
    start = np.frombuffer(to._mmap, np.uint8).ctypes.data  # of the map, which begins at a page
    position = to.offset - to.offset % mmap.ALLOCATIONGRANULARITY + to.ctypes.data - start
    left = memoryview(values).cast("B")
    with open(to.filename, "r+b", buffering=0) as file:
        while left:
            written = os.pwrite(file.fileno(), left, position)
            left, position = left[written:], position + written


def reserve(path: Path, size: int) -> None:
    """Makes the file that long, of zeros where nothing was. Raises OSError if the disk has no room for it.

    A file that is only promised (sparse) would end the process when it is written through a map and the disk is full.
    """
    with path.open("ab") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)

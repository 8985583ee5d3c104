"""Text that is tokens already: .npy files of ids, in one dimension, of any integers.

A file is a stream, as pretraining scripts write it: documents one after another with the tokenizer's end of text
between them, before or after each. It is cut there; these ids, and a beginning of text, are put in again where a
document begins and ends. A file without any end of text is cut into pieces of 16 384 ids.

The ids are those of `data.tokenizer`, which says how many bytes each stands for, and writes what the model says.
"""

from typing import Any

import numpy as np
from etils import epath

from llama4_jax.data.documents import Documents, Tokens, empty_error, find_files, hash64
from llama4_jax.data.watch import stamp
from llama4_jax.inputs.tokenizer import Tokenizer
from llama4_jax.untrusted_json import shortened

_PIECE = 16_384  # ids
_CHUNK = 1 << 22  # ids read at a time when a file is opened


class TokenDocuments(Documents):
    """Documents of .npy files. The split is by each document's ids.

    Opening reads every file once, and never a whole one into memory. Raises ValueError, naming the file, for one that
    is no such array, is cut short, or holds an id that the tokenizer does not have.
    """

    def __init__(self, pattern: str, tokenizer: Tokenizer):
        paths, _ = find_files(pattern, "*.npy")
        stamps = [stamp(path) for path in paths]
        self._arrays = [_Array(path) for path in paths]
        hashes, files, starts, lengths = [], [], [], []
        for number, array in enumerate(self._arrays):
            begins, sizes = _documents(array, tokenizer)
            for start, length in zip(begins.tolist(), sizes.tolist(), strict=True):
                hashes.append(hash64(array.read(start, length).astype("<i4").tobytes()))
            files += [number] * len(begins)
            starts.append(begins)
            lengths.append(sizes)
        if not hashes:
            raise empty_error(f"tokens:{pattern}")
        self._files = np.array(files)
        self._starts, self._lengths = np.concatenate(starts), np.concatenate(lengths)
        super().__init__(hashes, sizes=self._lengths, stamps=stamps)

    def __getitem__(self, index: int) -> Tokens:
        array = self._arrays[self._files[index]]
        start = int(self._starts[index])
        return Tokens(array.read(start, int(self._lengths[index])), f"{array.path}, at id {start}")


class _Array:
    """An array in a file, read piece by piece: if it were mapped, a file cut short would kill the process."""

    def __init__(self, path: epath.Path):
        self.path = path
        with path.open("rb") as file:
            shape, self._dtype = _header(file, path)
            self._offset = file.tell()
        if len(shape) != 1 or self._dtype.kind not in "iu":
            raise ValueError(
                f"{path}: should be an array of integers in one dimension, and has the shape "
                f"{shortened(str(shape))} and the type {shortened(str(self._dtype))}."
            )
        self.size = int(shape[0])
        there = path.stat().length - self._offset
        if not 0 <= self.size * self._dtype.itemsize <= there:
            raise ValueError(f"{path} is cut short: it should hold {self.size:,} ids, and has {there:,} bytes of them.")

    def read(self, start: int, count: int) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self._offset + start * self._dtype.itemsize)
            data = file.read(count * self._dtype.itemsize)
        if len(data) < count * self._dtype.itemsize:
            raise ValueError(f"{self.path} was cut short while the run reads it.")
        return np.frombuffer(data, self._dtype)


def _header(file: Any, path: epath.Path) -> tuple[tuple[int, ...], np.dtype]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, _, dtype = readers[version](file)
    except Exception as error:  # numpy evaluates the header as Python's literals, which can fail in many ways
        raise ValueError(f"{path} is no .npy file of numbers, or damaged: {shortened(str(error), 200)}.") from None
    return shape, dtype


def _documents(array: _Array, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Where documents begin, and how many ids each has. Raises ValueError for an id out of range."""
    ends, begins_said = [], []
    for first in range(0, array.size, _CHUNK):
        ids = array.read(first, min(_CHUNK, array.size - first))
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise ValueError(
                f"{array.path} holds the id {low if low < 0 else high}, and data.tokenizer has {tokenizer.vocab_size} "
                f"ids, 0 to {tokenizer.vocab_size - 1}. Give the tokenizer that it was written with."
            )
        ends.append(first + np.flatnonzero(ids == tokenizer.eos_id))
        begins_said.append(first + np.flatnonzero(ids == tokenizer.bos_id))
    ends = np.concatenate(ends) if ends else np.zeros(0, np.int64)
    if len(ends):
        starts, stops = np.concatenate([[0], ends + 1]), np.concatenate([ends, [array.size]])
    else:
        starts = np.arange(0, array.size, _PIECE)
        stops = np.minimum(starts + _PIECE, array.size)
    if begins_said and tokenizer.bos_id != tokenizer.eos_id:
        starts = starts + np.isin(starts, np.concatenate(begins_said))
    kept = stops > starts
    return starts[kept], (stops - starts)[kept]

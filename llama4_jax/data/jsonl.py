"""JSON Lines: an object a line; `rows` says what is read of it."""

import codecs
import itertools
from array import array
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from llama4_jax.data.documents import Document, Documents, empty_error, find_files, hash64
from llama4_jax.data.rows import RowReader
from llama4_jax.data.watch import stamp
from llama4_jax.inputs.tokenizer import utf8
from llama4_jax.untrusted_json import parse_json, shortened, shown

_MAX_LINE = 1 << 30  # bytes


class JsonlDocuments(Documents):
    """One document a line. The split is by text (of other rows by the line), so that copies are on the same side of it.

    Opening reads and checks every line, so that a bad one stops the run before it begins. Blank lines and empty texts
    are left out. Raises ValueError, naming file and line, for one that is no JSON object with what is to be read.
    """

    def __init__(self, spec: str, pattern: str, rows: RowReader):
        self._paths, _ = find_files(pattern, "*.jsonl")
        self._rows = rows
        stamps = [stamp(path) for path in self._paths]
        hashes, files, starts, lengths = array("Q"), array("q"), array("q"), array("q")
        for number, path in enumerate(self._paths):
            start = 0
            with path.open("rb") as file:
                for line_number, line in enumerate(_lines(file.readline, path), 1):
                    if line.strip() and (document := self._read(line, path, f"line {line_number}")):
                        hashes.append(hash64(utf8(document) if isinstance(document, str) else line.strip()))
                        files.append(number)
                        starts.append(start)
                        lengths.append(len(line))
                    start += len(line)
        if not hashes:
            raise empty_error(spec)
        self._files, self._starts, self._lengths = (np.array(a, np.int64) for a in (files, starts, lengths))
        super().__init__(np.array(hashes, np.uint64), sizes=self._lengths, stamps=stamps)

    def __getitem__(self, index: int) -> Document:
        path = self._paths[self._files[index]]
        with path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.read(self._lengths[index])
        if len(line) < self._lengths[index]:
            raise ValueError(f"data.sources: {path} was cut short while the run reads it.")
        return self._read(line, path, f"at byte {self._starts[index]}")

    def _read(self, line: bytes, path: epath.Path, place: str) -> Document:
        where, field = f"{path}, {place}", self._rows.field
        row = parse_json(line.removeprefix(codecs.BOM_UTF8), where=where)
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: should be a JSON object with the field {field!r}, and is a {type(row).__name__}."
            )
        if field not in row:
            others = shortened(", ".join(map(shown, itertools.islice(row, 20))), 200) or "none"
            raise ValueError(f"{where}: has no field {field!r}, but {others}.")
        return self._rows.read(row, where, path.parent)


def _lines(readline: Callable[[int], bytes], path: epath.Path) -> Iterator[bytes]:
    """Lines with their ends. Raises ValueError for one that never seems to end."""
    number = 0
    while line := readline(_MAX_LINE + 1):
        number += 1
        if len(line) > _MAX_LINE:
            raise ValueError(f"{path}, line {number}: a line may have {_MAX_LINE:,} bytes at most.")
        yield line

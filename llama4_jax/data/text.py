"""Plain text: a book, or one file for a whole corpus.

One document would be of no use: it could not be split, shuffled or dealt to rows. So the text is cut into pieces, at an
empty line where there is one near, else at a line, else at a space, else between two characters.
"""

import contextlib
import mmap
from collections.abc import Iterator

from etils import epath

from llama4_jax.atomic import in_bucket
from llama4_jax.data.documents import Documents, empty_error, find_files, hash64
from llama4_jax.data.watch import stamp

_PIECE = 16_384  # bytes: long enough to learn from, short enough that a megabyte has both splits


class TextDocuments(Documents):
    """Pieces of text files, as UTF-8; bytes that are not become U+FFFD. The split is by each piece's text.

    Joined, the pieces of a file are the file. Opening reads every file once.
    """

    def __init__(self, pattern: str):
        paths, _ = find_files(pattern, "*.txt")
        self._pieces: list[tuple[epath.Path, int, int]] = []
        hashes, stamps = [], []
        for path in paths:
            stamps.append(stamp(path))
            if path.stat().length == 0:
                continue
            with _content(path) as content:
                start = 0
                while start < len(content):
                    stop = _cut(content, start)
                    self._pieces.append((path, start, stop - start))
                    hashes.append(hash64(content[start:stop]))
                    start = stop
        if not hashes:
            raise empty_error(f"text:{pattern}")
        super().__init__(hashes, sizes=[length for _, _, length in self._pieces], stamps=stamps)

    def __getitem__(self, index: int) -> str:
        path, start, length = self._pieces[index]
        with path.open("rb") as file:
            file.seek(start)
            piece = file.read(length)
        if len(piece) < length:
            raise ValueError(f"data.sources: {path} was cut short while the run reads it.")
        return piece.decode("utf-8", errors="replace")


@contextlib.contextmanager
def _content(path: epath.Path) -> Iterator[mmap.mmap | bytes]:
    if in_bucket(path):
        yield path.read_bytes()
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _cut(content: mmap.mmap | bytes, start: int) -> int:
    """Where the piece that begins at `start` ends."""
    stop = start + _PIECE
    if stop >= len(content):
        return len(content)
    for separator in (b"\n\n", b"\n", b" "):
        found = content.rfind(separator, start + _PIECE // 2, stop)
        if found >= 0:
            return found + len(separator)
    while stop > start + _PIECE - 3 and content[stop] & 0xC0 == 0x80:  # inside a character, of four bytes at most
        stop -= 1
    return stop

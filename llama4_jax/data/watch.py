"""Files of a data set that change while a run reads them: noticed before much is learnt from what is no longer there.
Every tenth of a second the next twenty files are looked at.

What was read when the data set was opened (where its documents begin, which are held out) holds for the files as they
were. Most of a small data set is in memory soon, so that a change would otherwise show hundreds of steps later, or
never. Files in a bucket are not looked at: an object there never changes, another takes its place.
"""

import os
import time
from collections.abc import Iterable
from typing import NamedTuple

from llama4_jax.atomic import in_bucket

_SECONDS = 0.1  # between two looks
_AT_ONCE = 20  # files in one look, so that a million of them cost no more


class Stamp(NamedTuple):
    """A file as it was when it was opened."""

    path: str
    size: int
    changed: int  # nanoseconds


def stamp(path: os.PathLike | str) -> Stamp | None:
    """Take it before the file is read. None in a bucket."""
    if in_bucket(path):
        return None
    found = os.stat(path)
    return Stamp(os.fspath(path), found.st_size, found.st_mtime_ns)


def check_unchanged(was: Stamp) -> None:
    """Raises FileNotFoundError if the file is gone, ValueError if it was changed."""
    again = "Nothing that was saved is lost: put it back as it was, and the same command goes on."
    try:
        now = stamp(was.path)
    except OSError as error:
        raise FileNotFoundError(
            f"data.sources: {was.path} can no longer be read while the run reads it ({error.strerror}). {again}"
        ) from error
    if now.size != was.size:
        raise ValueError(
            f"data.sources: {was.path} was changed while the run reads it: it had {was.size:,} bytes and has "
            f"{now.size:,}. {again}"
        )
    if now.changed != was.changed:
        raise ValueError(f"data.sources: {was.path} was written anew while the run reads it. {again}")


class Watch:
    """Looks at files now and then, all of them in turn."""

    def __init__(self, stamps: Iterable[Stamp]):
        self._stamps = list(dict.fromkeys(stamps))
        self._next = 0
        self._looked = time.monotonic()

    def look(self) -> None:
        """Raises as `check_unchanged`; does nothing within a second of the last look."""
        if not self._stamps or time.monotonic() - self._looked < _SECONDS:
            return
        self._looked = time.monotonic()
        for _ in range(min(_AT_ONCE, len(self._stamps))):
            check_unchanged(self._stamps[self._next])
            self._next = (self._next + 1) % len(self._stamps)

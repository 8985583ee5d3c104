"""Small files that a run killed while writing must not leave half written; and paths into buckets."""

import os
import pathlib

from etils import epath

AnyPath = pathlib.Path | epath.Path


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file whole or not at all; one of that name is replaced."""
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if in_bucket(path):  # where a file appears when it is complete
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def any_path(path: epath.PathLike) -> AnyPath:
    """Of this machine, as pathlib has it, or in a bucket."""
    return epath.Path(path) if in_bucket(path) else pathlib.Path(path)


def in_bucket(path: epath.PathLike) -> bool:
    """Whether it is a path as gs://bucket/name, and none of a file system of this machine."""
    return "://" in os.fspath(path)

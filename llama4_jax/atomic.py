"""Small files that a run killed while writing must not leave half written."""

from pathlib import Path

from etils import epath


def write_atomically(path: str | Path | epath.PathLike, content: str | bytes) -> None:
    """Writes a file whole or not at all; one of that name is replaced."""
    path = epath.Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)

"""One file, one document; and the default data set, which every machine has: Python's own standard library."""

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from llama4_jax.data.documents import Documents, empty_error, find_files, hash64
from llama4_jax.data.watch import stamp

# Not prose or code worth learning: tests, other people's packages, and 120 character tables that are near copies of
# each other, which would be in both splits.
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__", "encodings"}


class FileDocuments(Documents):
    """Whole files, as UTF-8; bytes that are not become U+FFFD. The split is by name. Empty files are left out."""

    def __init__(self, spec: str, paths: Sequence[epath.Path], names: Sequence[str]):
        stamps = [stamp(path) for path in paths]
        sizes = [path.stat().length if one is None else one.size for path, one in zip(paths, stamps, strict=True)]
        kept = [i for i, size in enumerate(sizes) if size]
        if not kept:
            raise empty_error(spec)
        hashes, sizes = [hash64(names[i].encode()) for i in kept], [sizes[i] for i in kept]
        super().__init__(hashes, sizes=sizes, stamps=[stamps[i] for i in kept])
        self._paths = [paths[i] for i in kept]

    @classmethod
    def find(cls, pattern: str) -> "FileDocuments":
        """All files of a directory, or those that a glob matches."""
        return cls(f"files:{pattern}", *find_files(pattern, "*"))

    def __getitem__(self, index: int) -> str:
        return self._paths[index].read_bytes().decode("utf-8", errors="replace")


def standard_library() -> FileDocuments:
    """The .py files of the running interpreter's library: about 9 MB. Raises FileNotFoundError if it has none."""
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    if not names:
        raise FileNotFoundError(f"data.sources: stdlib finds no .py file in {root}. Name another source.")
    names.sort()
    return FileDocuments("stdlib", [epath.Path(root / name) for name in names], names)

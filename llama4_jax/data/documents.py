"""A data set: documents by number, and which of them are held out.

Held out is decided document by document, by a hash of its name or text and nothing else. So the split is the same on
every machine and in every process, does not move when documents are added or the order is changed, and a larger
fraction holds out what a smaller one did, and more.
"""

import abc
import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int, Integer, UInt64

from llama4_jax.atomic import in_bucket
from llama4_jax.data.watch import Stamp
from llama4_jax.inputs.messages import Message, Picture, Tool
from llama4_jax.untrusted_json import shortened


class Conversation(NamedTuple):
    """Messages, as a chat model sees them. `where` it is from, for errors."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    where: str


class Illustrated(NamedTuple):
    """Text with pictures in it, in order. `where` it is from, for errors."""

    content: tuple[str | Picture, ...]
    where: str


class Tokens(NamedTuple):
    """Text as the tokenizer's ids, without what begins and ends a document. `where` it is from, for errors."""

    ids: Integer[np.ndarray, " n"]
    where: str


Document = str | Conversation | Illustrated | Tokens


class Documents(abc.ABC):
    """Documents by number, read when asked for.

    - hashes: one uniformly distributed number for each document, made of its name or content
    - blocks: numbers of the documents at which blocks begin, and at last the number of documents. Documents of one
      block are quick to read one after another; shuffling keeps them together. A source that reads any document as
      quickly as the next is one block.
    - stamps: of the files that it reads, as they were before they were read
    - identity: equal for two data sets if they are the same, as far as can be told without reading all of them
    """

    def __init__(
        self,
        hashes: Sequence[int] | UInt64[np.ndarray, "documents"],
        *,
        sizes: Sequence[int] | Int[np.ndarray, "..."] = (),
        blocks: Int[np.ndarray, "..."] | None = None,
        stamps: Iterable[Stamp | None] = (),
    ):
        self.hashes = np.asarray(hashes, np.uint64)
        self.blocks = np.array([0, len(self.hashes)]) if blocks is None else blocks
        self.stamps = [one for one in stamps if one is not None]
        content = self.hashes.tobytes() + np.asarray(sizes, np.int64).tobytes()
        self.identity = hashlib.blake2b(content, digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.hashes)

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Document: ...


class Subset(Documents):
    """Some documents of a data set, in its order."""

    def __init__(self, documents: Documents, indices: Int[np.ndarray, "chosen"]):
        blocks = np.unique(np.searchsorted(indices, documents.blocks))
        super().__init__(documents.hashes[indices], blocks=blocks, stamps=documents.stamps)
        self.identity = f"{documents.identity}-{self.identity}"
        self._documents = documents
        self._indices = indices

    def __getitem__(self, index: int) -> Document:
        return self._documents[int(self._indices[index])]


def split(documents: Documents, heldout_fraction: float) -> tuple[Subset, Subset]:
    """The documents to train on, and those held out. Either may be empty."""
    heldout = documents.hashes < np.uint64(int(heldout_fraction * 2**64))
    return Subset(documents, np.flatnonzero(~heldout)), Subset(documents, np.flatnonzero(heldout))


def hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def find_files(pattern: str, inside: str) -> tuple[list[epath.Path], list[str]]:
    """The files of a path, sorted, and their names relative to where the search began.

    The path may be a file, a glob (`**` for any depth, but not in a bucket), or a directory, of which all files named
    `inside` (a glob) at any depth are taken. Hidden files are left out. Raises FileNotFoundError if that leaves none.
    """
    if in_bucket(pattern):
        return _find_in_bucket(epath.Path(pattern), inside)
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        root, found = path, glob.glob(os.path.join(glob.escape(path), "**", inside), recursive=True)
    elif os.path.isfile(path):
        root, found = os.path.dirname(path), [path]
    else:
        root = os.path.dirname(path)
        while glob.has_magic(root):
            root = os.path.dirname(root)
        found = glob.glob(path, recursive=True)
    names = {os.path.relpath(file, root or "."): epath.Path(file) for file in found if os.path.isfile(file)}
    if not names:
        raise FileNotFoundError(
            f"data.sources: {shortened(os.fspath(pattern), 200)} matches no file (searched from "
            f"{shortened(os.path.realpath(root or '.'), 200)})."
        )
    return [names[name] for name in sorted(names)], sorted(names)


def _find_in_bucket(path: epath.Path, inside: str) -> tuple[list[epath.Path], list[str]]:
    if glob.has_magic(os.fspath(path)):
        root = path.parent
        while glob.has_magic(os.fspath(root)):
            root = root.parent
        if "**" in path.parts:
            raise ValueError(f"data.sources: {path}: there is no ** in a bucket. Name the directory {root} instead.")
        found = list(root.glob(path.relative_to(root).as_posix()))
    elif path.is_dir():
        root = path
        found = [file for file in _files_under(path) if fnmatch.fnmatch(file.name, inside)]
    else:
        root, found = path.parent, [path] if path.exists() else []
    names = {file.relative_to(root).as_posix(): file for file in found}
    names = {name: file for name, file in names.items() if not any(part[0] == "." for part in name.split("/"))}
    if not names:
        raise FileNotFoundError(f"data.sources: {path} matches no file.")
    return [names[name] for name in sorted(names)], sorted(names)


def _files_under(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():  # epath's own walk gives names without their bucket
        if path.is_dir():
            yield from _files_under(path)
        else:
            yield path


def empty_error(spec: str) -> ValueError:
    return ValueError(f"data.sources: there is no text in {spec}: every file it names is empty.")

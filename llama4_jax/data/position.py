"""Few documents: cut by position instead of dealt out whole.

A single text has no second document to hold out, and fewer documents than rows would leave rows alike. So each is cut
into parts, at a space or line end where there is one near: the last part is held out, the others are for the rows.
Conversations and documents with pictures cannot be cut; of these whole ones are held out, and rows share them.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from llama4_jax.data.documents import Document, Documents, Subset, Tokens, hash64

_NEAR = 64  # characters within which a cut is moved to the end of a word
MANY = 20  # documents of which whole ones can be held out


class Parts(Documents):
    """Parts of documents, from one fraction of each to another; those that would be empty are left out."""

    def __init__(self, documents: Documents, spans: Sequence[tuple[float, float]]):
        cuts = [(i, *span) for i in range(len(documents)) for span in spans]
        self._documents = documents
        self._cuts = [cut for cut in cuts if _length(_cut(documents[cut[0]], *cut[1:]))]
        hashes = [hash64(f"{documents.hashes[i]} {start} {stop}".encode()) for i, start, stop in self._cuts]
        super().__init__(hashes, stamps=documents.stamps)
        spelled = hashlib.blake2b(repr(self._cuts).encode(), digest_size=8).hexdigest()
        self.identity = f"{documents.identity}-{spelled}"

    def __getitem__(self, index: int) -> Document:
        i, start, stop = self._cuts[index]
        return _cut(self._documents[i], start, stop)


def split_few(documents: Documents, heldout_fraction: float) -> tuple[Documents, Documents]:
    """To train on, and held out: neither is empty if that can be."""
    if can_be_cut(documents) and len(documents) < MANY:
        kept = 1 - heldout_fraction
        return Parts(documents, [(0.0, kept)]), Parts(documents, [(kept, 1.0)])
    count = min(max(1, round(heldout_fraction * len(documents))), len(documents) - 1)
    order = np.argsort(documents.hashes, kind="stable")
    return Subset(documents, np.sort(order[count:])), Subset(documents, np.sort(order[:count]))


def enough(sources: Sequence[Documents], rows: int) -> list[Documents]:
    """Sources of as many documents as rows, or more, cut into parts if there are fewer and they can be."""
    total = sum(map(len, sources))
    if total >= rows:
        return list(sources)
    count = -(-rows // total)
    spans = [(i / count, (i + 1) / count) for i in range(count)]
    return [Parts(documents, spans) if can_be_cut(documents) else documents for documents in sources]


def can_be_cut(documents: Documents) -> bool:
    return isinstance(documents[0], str | Tokens)


def _cut(document: Document, start: float, stop: float) -> Document:
    if isinstance(document, Tokens):
        count = len(document.ids)
        return document._replace(ids=document.ids[int(start * count) : int(stop * count)])
    return document[_place(document, start) : _place(document, stop)]


def _place(text: str, fraction: float) -> int:
    at = int(fraction * len(text))
    if at in (0, len(text)):
        return at
    near = (place for place in range(at, min(at + _NEAR, len(text))) if text[place - 1].isspace())
    return next(near, at)


def _length(document: Document) -> int:
    return len(document.ids if isinstance(document, Tokens) else document)

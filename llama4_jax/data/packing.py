"""Documents, one after another, cut into rows of T tokens; batch.py shows a row."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int32

from llama4_jax.data.batch import Batch, empty_batch
from llama4_jax.inputs.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A whole document or a part of one, as inputs and targets."""

    tokens: Int32[np.ndarray, "T"]
    targets: Int32[np.ndarray, "T"]
    target_bytes: Int32[np.ndarray, "T"]


def encode_document(text: str, tokenizer: Tokenizer) -> Piece:
    """A document of n tokens gives n + 1 inputs, begin_of_text the first, and n + 1 targets, end_of_text the last."""
    ids = np.array(tokenizer.encode(text, bos=True, eos=True), np.int32)
    return Piece(ids[:-1], ids[1:], tokenizer.token_bytes(ids[1:]))


class DocumentStream:
    """A sequence of documents, read piece by piece.

    `place` is all its state: the number of the current document and how many of its tokens are already given. Setting
    it is cheap; the document is read and tokenized when the next piece is asked for.
    """

    def __init__(self, documents: grain.MapDataset[str], tokenizer: Tokenizer):
        self._documents = documents
        self._tokenizer = tokenizer
        self.place = (0, 0)

    @property
    def place(self) -> tuple[int, int]:
        return self._document, self._offset

    @place.setter
    def place(self, place: tuple[int, int]) -> None:
        self._document, self._offset = place
        self._encoded: Piece | None = None

    def take(self, limit: int) -> Piece | None:
        """The rest of the current document, or its next `limit` tokens if it has more; None after the last one."""
        if self._document == len(self._documents):
            return None
        if self._encoded is None:
            text = self._documents[self._document]
            assert text is not None  # which grain gives for what a filter has dropped, and there is none
            self._encoded = encode_document(text, self._tokenizer)
        start, stop = self._offset, self._offset + limit
        piece = Piece(*(field[start:stop] for field in self._encoded))
        if stop < len(self._encoded.tokens):
            self._offset = stop
        else:
            self.place = (self._document + 1, 0)
        return piece


def fill_row(batch: Batch, row: int, stream: DocumentStream) -> None:
    """Fill one row of an empty batch from the stream, as far as it reaches."""
    seq_len = batch.tokens.shape[1]
    start, segment = 0, 0
    while start < seq_len and (piece := stream.take(seq_len - start)) is not None:
        here = (row, slice(start, start + len(piece.tokens)))
        segment += 1
        batch.tokens[here] = piece.tokens
        batch.targets[here] = piece.targets
        batch.target_bytes[here] = piece.target_bytes
        batch.positions[here] = np.arange(len(piece.tokens))
        batch.segment_ids[here] = segment
        batch.weights[here] = 1.0
        start += len(piece.tokens)


class PackedBatches(grain.IterDataset[Batch]):
    """Batches of rows filled in order, each from a named stream of documents.

    - documents: name of a stream to its documents
    - turns: which stream fills each row, in the first batch, the second, …, and then from the first again. A stream
      that fills several rows of a batch fills them one after another.
    - kept: the rows to give
    - max_batches: end after so many

    Ends when a batch would hold nothing. The state is how many batches were given, and the place of each stream.
    """

    def __init__(
        self,
        documents: Mapping[str, grain.MapDataset[str]],
        turns: Sequence[Sequence[str]],
        kept: slice,
        tokenizer: Tokenizer,
        seq_len: int,
        max_batches: int | None = None,
    ):
        super().__init__()
        self.documents = documents
        self.turns = turns
        self.kept = kept
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.max_batches = max_batches

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self)


class _PackedIterator(grain.DatasetIterator[Batch]):
    def __init__(self, dataset: PackedBatches):
        super().__init__()
        self._dataset = dataset
        self._batches = 0
        self._streams = {
            name: DocumentStream(documents, dataset.tokenizer) for name, documents in dataset.documents.items()
        }

    def __next__(self) -> Batch:
        dataset = self._dataset
        if self._batches == dataset.max_batches:
            raise StopIteration
        rows = dataset.turns[self._batches % len(dataset.turns)]
        batch = empty_batch(len(rows), dataset.seq_len, dataset.tokenizer.pad_id)
        for row, name in enumerate(rows):
            fill_row(batch, row, self._streams[name])
        if not batch.segment_ids.any():
            raise StopIteration
        self._batches += 1
        return Batch(*(field[dataset.kept] for field in batch))

    def get_state(self) -> dict[str, Any]:
        return {
            "batches": self._batches,
            "streams": {name: list(stream.place) for name, stream in self._streams.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches = state["batches"]
        for name, stream in self._streams.items():
            document, offset = state["streams"][name]
            stream.place = (document, offset)

"""Documents, one after another, cut into rows of T tokens; batch.py shows a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from llama4_jax.data.batch import Batch, empty_batch
from llama4_jax.data.documents import Conversation, Document
from llama4_jax.data.encode import Encoder, Piece


class DocumentStream:
    """A sequence of documents, read piece by piece.

    `place` is all its state: the number of the current document and how many of its tokens are already given. Setting
    it is cheap; the document is read and tokenized when the next piece is asked for.
    """

    def __init__(self, documents: grain.MapDataset[Document], encoder: Encoder):
        self._documents = documents
        self._encoder = encoder
        self._whole = False  # the current document is not to be cut
        self.place = (0, 0)

    @property
    def place(self) -> tuple[int, int]:
        return self._document, self._offset

    @place.setter
    def place(self, place: tuple[int, int]) -> None:
        self._document, self._offset = place
        self._encoded: Piece | None = None

    def take(self, limit: int, *, tiles: int = 0, row: int = 0, row_tiles: int = 0) -> Piece | None:
        """The rest of the current document, or its next `limit` tokens if it has more; None after the last one.

        A document with pictures is given whole, or None if it does not fit into `limit` tokens and that many `tiles`.
        Raises ValueError if it does not even fit into `row` tokens and `row_tiles`, an empty row. A conversation
        without pictures is cut only if it is longer than a row: a reply is not to be learnt without its question.
        """
        if self._document == len(self._documents):
            return None
        if self._encoded is None:
            document = self._documents[self._document]
            assert document is not None  # which grain gives for what a filter has dropped, and there is none
            self._encoded = self._encoder(document)
            _check_fits(document, self._encoded, row, row_tiles)
            fits = isinstance(document, Conversation) and len(self._encoded) <= row
            self._whole = fits or self._encoded.num_tiles > 0
        if self._whole:
            if len(self._encoded) > limit or self._encoded.num_tiles > tiles:
                return None
            piece, self.place = self._encoded, (self._document + 1, 0)
            return piece
        start, stop = self._offset, self._offset + limit
        piece = self._encoded.part(start, stop)
        if stop < len(self._encoded):
            self._offset = stop
        else:
            self.place = (self._document + 1, 0)
        return piece


def _check_fits(document: Document, piece: Piece, row: int, row_tiles: int) -> None:
    if not piece.num_tiles or (len(piece) <= row and piece.num_tiles <= row_tiles):
        return
    raise ValueError(
        f"{getattr(document, 'where', 'a document')}: with its pictures it has {len(piece)} tokens and "
        f"{piece.num_tiles} tiles, and a row has room for {row} and {row_tiles}: raise data.seq_len or "
        f"data.tiles_per_row, or lower data.max_tiles, so that its pictures are cut into fewer."
    )


def fill_row(batch: Batch, row: int, stream: DocumentStream) -> None:
    """Fill one row of an empty batch from the stream, as far as it reaches."""
    seq_len = batch.tokens.shape[1]
    row_tiles = 0 if batch.images is None else batch.images.shape[1]
    start, segment, tiles = 0, 0, 0
    while start < seq_len:
        piece = stream.take(seq_len - start, tiles=row_tiles - tiles, row=seq_len, row_tiles=row_tiles)
        if piece is None:
            break
        here = (row, slice(start, start + len(piece)))
        segment += 1
        batch.tokens[here] = piece.tokens
        batch.targets[here] = piece.targets
        batch.target_bytes[here] = piece.target_bytes
        batch.positions[here] = np.arange(len(piece))
        batch.segment_ids[here] = segment
        batch.weights[here] = piece.weights
        if piece.tiles is not None:
            batch.images[row, tiles : tiles + piece.num_tiles] = piece.tiles
            tiles += piece.num_tiles
        start += len(piece)


class PackedBatches(grain.IterDataset[Batch]):
    """Batches of rows filled in order, each from a named stream of documents.

    - documents: name of a stream to its documents
    - turns: which stream fills each row, in the first batch, the second, …, and then from the first again. A stream
      that fills several rows of a batch fills them one after another.
    - kept: the rows to give
    - tiles_per_row: room for tiles of pictures
    - max_batches: end after so many

    Ends when a batch would hold nothing. The state is how many batches were given, and the place of each stream.
    """

    def __init__(
        self,
        documents: Mapping[str, grain.MapDataset[Document]],
        turns: Sequence[Sequence[str]],
        kept: slice,
        encoder: Encoder,
        seq_len: int,
        *,
        tiles_per_row: int = 0,
        max_batches: int | None = None,
    ):
        super().__init__()
        self.documents = documents
        self.turns = turns
        self.kept = kept
        self.encoder = encoder
        self.seq_len = seq_len
        self.tiles_per_row = tiles_per_row
        self.max_batches = max_batches

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self)


class _PackedIterator(grain.DatasetIterator[Batch]):
    def __init__(self, dataset: PackedBatches):
        super().__init__()
        self._dataset = dataset
        self._batches = 0
        self._streams = {
            name: DocumentStream(documents, dataset.encoder) for name, documents in dataset.documents.items()
        }

    def __next__(self) -> Batch:
        dataset = self._dataset
        if self._batches == dataset.max_batches:
            raise StopIteration
        rows = dataset.turns[self._batches % len(dataset.turns)]
        encoder, tiles = dataset.encoder, dataset.tiles_per_row
        tile_size = encoder.pictures.tile_size if tiles else 0
        batch = empty_batch(len(rows), dataset.seq_len, encoder.tokenizer.pad_id, tiles=tiles, tile_size=tile_size)
        for row, name in enumerate(rows):
            fill_row(batch, row, self._streams[name])
        if not batch.segment_ids.any():
            raise StopIteration
        self._batches += 1
        return Batch(*(None if field is None else field[dataset.kept] for field in batch))

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

"""The batch: what the data gives and the losses take. The one contract between them.

A row holds pieces of documents, one after another, and then perhaps padding. A document is the sequence

    begin_of_text, its tokens …, end_of_text

of which all but the last are inputs and all but the first are targets, so that every token of the text is predicted
exactly once, from the first on, and so is its end. A document that does not fit is cut at the end of the row and goes
on in another, as a piece of its own: it loses its past there (positions begin at 0 again), but no target, since the
target at the cut is the true next token.

    tokens       BOS  t   h   e  BOS  a   b  PAD
    targets       t   h   e  EOS  a   b  EOS PAD
    positions     0   1   2   3   0   1   2   0
    segment_ids   1   1   1   1   2   2   2   0
    weights       1   1   1   1   1   1   1   0
    target_bytes  1   1   1   0   1   1   0   0

Pictures are tokens, too, and their tiles stand beside the row, in order. A document with pictures is never cut: it goes
on in the next row if this one has no room for all its tokens and tiles. Nor is a conversation that fits in a row. No
token of a picture is a target with weight.

Bits per byte is the whole negative log likelihood, ends of documents included, in bits, over the sum of `target_bytes`.
The lengths are in the batch, rather than in a table in the loss, because they belong to the tokenizer, which the
training side need not know.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8


class Batch(NamedTuple):
    """Arrays of one shape; numpy from the loader, and jax arrays by the same names once they are on devices.

    - tokens: inputs; the tokenizer's `pad_id` in padding
    - targets: the next token of the same document; `pad_id` in padding
    - positions: from 0 in each piece of a document; 0 in padding
    - segment_ids: 1, 2, … for the pieces of a row in order; 0 in padding
    - weights: of each target in the loss: 1, and 0 in padding, for tokens of pictures, and for what is not to be learnt
    - target_bytes: bytes of UTF-8 that each target stands for; 0 for special tokens, and where the weight is 0
    - images: tiles of the pictures of each row, in order, and then zeros; None in a run without pictures
    """

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]
    weights: Float32[np.ndarray, "B T"]
    target_bytes: Int32[np.ndarray, "B T"]
    images: UInt8[np.ndarray, "B tiles S S c"] | None = None


def empty_batch(rows: int, seq_len: int, pad_id: int, *, tiles: int = 0, tile_size: int = 0) -> Batch:
    """A batch of nothing but padding, to be filled in; with room for so many tiles a row."""
    shape = (rows, seq_len)
    return Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        target_bytes=np.zeros(shape, np.int32),
        images=np.zeros((rows, tiles, tile_size, tile_size, 3), np.uint8) if tiles else None,
    )

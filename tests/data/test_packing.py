"""The packer against the obvious one: lists of numbers, one token at a time."""

import itertools
from typing import NamedTuple

import grain
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data.batch import Batch
from llama4_jax.data.encode import Encoder
from llama4_jax.data.packing import DocumentStream, PackedBatches
from llama4_jax.inputs.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id

TEXTS = st.lists(st.text("abé", max_size=12), min_size=1, max_size=8)


class Slot(NamedTuple):
    token: int = PAD
    target: int = PAD
    position: int = 0
    segment: int = 0
    weight: float = 0.0
    bytes: int = 0


def obvious_rows(texts, seq_len):
    """All texts in rows of `seq_len`, the last one padded."""
    rows = [[]]
    for text in texts:
        ids = [BOS, *text.encode(), EOS]
        position = 0
        for token, target in itertools.pairwise(ids):
            if len(rows[-1]) == seq_len:
                rows.append([])
                position = 0
            if position == 0:
                segment = rows[-1][-1].segment + 1 if rows[-1] else 1
            rows[-1].append(Slot(token, target, position, segment, 1.0, int(target != EOS)))
            position += 1
    rows[-1] += [Slot()] * (seq_len - len(rows[-1]))
    return rows


def pack(texts, seq_len, rows=1):
    documents = grain.MapDataset.source(list(texts))
    return list(PackedBatches({"all": documents}, [["all"] * rows], slice(None), Encoder(TOKENIZER), seq_len))


def assert_rows(batch: Batch, rows):
    for field, slots in zip(batch[:-1], zip(*(zip(*row, strict=True) for row in rows), strict=True), strict=True):
        np.testing.assert_array_equal(field, slots)


@settings(max_examples=100, deadline=None)
@given(texts=TEXTS, seq_len=st.integers(1, 9), rows=st.integers(1, 3))
def test_rows_are_those_of_the_obvious_packer(texts, seq_len, rows):
    expected = obvious_rows(texts, seq_len)
    batches = pack(texts, seq_len, rows)
    assert len(batches) == -(-len(expected) // rows)
    expected += [[Slot()] * seq_len] * (len(batches) * rows - len(expected))
    for i, batch in enumerate(batches):
        assert_rows(batch, expected[i * rows : (i + 1) * rows])


def test_a_row_is_as_drawn_in_the_contract():
    (batch,) = pack(["the", "ab"], 8)
    assert_rows(batch, obvious_rows(["the", "ab"], 8))
    t, h, e, a, b = b"theab"
    assert batch.tokens.tolist() == [[BOS, t, h, e, BOS, a, b, PAD]]
    assert batch.targets.tolist() == [[t, h, e, EOS, a, b, EOS, PAD]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]
    assert batch.target_bytes.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert [field.dtype.name for field in batch[:-1]] == ["int32"] * 4 + ["float32", "int32"]


def test_the_target_at_a_cut_is_the_true_next_token():
    first, second = pack(["abcdef"], 4)
    assert first.tokens[0].tolist() == [BOS, *b"abc"]
    assert first.targets[0].tolist() == [*b"abcd"]
    assert second.tokens[0].tolist() == [*b"def", PAD]
    assert second.targets[0].tolist() == [*b"ef", EOS, PAD]
    assert second.positions[0].tolist() == [0, 1, 2, 0]


@settings(max_examples=100, deadline=None)
@given(texts=TEXTS, seq_len=st.integers(1, 9))
def test_no_target_belongs_to_another_document(texts, seq_len):
    """Each segment reads on in itself, up to where it is cut; and only a document's end ends it."""
    for batch in pack(texts, seq_len, 2):
        for row in range(2):
            inside = (batch.segment_ids[row, 1:] == batch.segment_ids[row, :-1]) & (batch.segment_ids[row, 1:] > 0)
            np.testing.assert_array_equal(batch.targets[row, :-1][inside], batch.tokens[row, 1:][inside])
            np.testing.assert_array_equal(np.diff(batch.positions[row])[inside], 1)
            new = (batch.segment_ids[row, 1:] > batch.segment_ids[row, :-1]).nonzero()[0]
            assert (batch.targets[row, new] == EOS).all()
            assert (batch.tokens[row, new + 1] == BOS).all()


@settings(max_examples=50, deadline=None)
@given(texts=TEXTS, seq_len=st.integers(1, 9), rows=st.integers(1, 3))
def test_every_byte_and_every_end_is_a_target_exactly_once(texts, seq_len, rows):
    batches = pack(texts, seq_len, rows)
    targets = [t for batch in batches for t in batch.targets[batch.weights > 0].tolist()]
    assert targets == [t for text in texts for t in (*text.encode(), EOS)]
    assert sum(batch.target_bytes.sum() for batch in batches) == sum(len(text.encode()) for text in texts)
    for batch in batches:
        assert (batch.weights == (batch.segment_ids > 0)).all()
        assert not batch.target_bytes[batch.weights == 0].any()


def test_a_document_is_read_only_when_it_is_needed():
    read = []

    class Counted(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    stream = DocumentStream(grain.MapDataset.source(Counted(["abc", "def", "ghi"])), Encoder(TOKENIZER))
    stream.place = (1, 2)
    assert read == []
    assert stream.take(1).tokens.tolist() == [*b"e"]
    assert stream.take(9).tokens.tolist() == [*b"f"]
    assert stream.place == (2, 0)
    assert read == [1]

"""Orders: each epoch has every document once, and is another order than the one before."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data.documents import Documents
from llama4_jax.data.mixture import heldout_documents, training_streams
from llama4_jax.data.shuffle import Shuffled


class Numbered(Documents):
    """Texts that say their number."""

    def __init__(self, count, name="", blocks=None):
        super().__init__(np.arange(count, dtype=np.uint64), blocks=blocks)
        self._name = name

    def __getitem__(self, index):
        return f"{self._name}{range(len(self))[index]}"


def names(count, name=""):
    return [f"{name}{i}" for i in range(count)]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**32), epoch=st.integers(0, 10**6)
)
def test_an_epoch_has_every_document_once_and_blocks_stay_together(sizes, seed, epoch):
    begins = np.cumsum([0, *sizes])
    documents = Shuffled(Numbered(begins[-1], blocks=begins), (seed,))
    order = [int(documents[epoch * len(documents) + i]) for i in range(len(documents))]
    assert sorted(order) == list(range(len(documents)))
    blocks = np.searchsorted(begins, order, side="right")
    assert (np.diff(blocks) != 0).sum() == len(sizes) - 1


def test_epochs_and_seeds_differ_and_an_order_can_be_had_again():
    def order(seed, epoch):
        documents = Shuffled(Numbered(100), (seed,))
        return tuple(documents[epoch * 100 + i] for i in range(100))

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(1, 2) in orders
    assert tuple(names(100)) not in orders


def test_blocks_come_in_another_order_each_epoch():
    documents = Shuffled(Numbered(100, blocks=np.arange(0, 101, 10)), (0,))
    orders = [tuple(int(documents[i]) // 10 for i in range(epoch * 100, epoch * 100 + 100, 10)) for epoch in range(3)]
    assert len(set(orders)) == 3


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    """Recorded: a change of it would change every run."""
    documents = Shuffled(Numbered(10, blocks=np.array([0, 6, 10])), (7, 0))
    assert " ".join(documents[i] for i in range(20)) == "8 7 9 6 3 0 4 5 2 1 7 9 8 6 3 0 1 4 2 5"


def test_an_empty_data_set_cannot_be_shuffled():
    with pytest.raises(ValueError, match="nothing to shuffle in an empty data set"):
        Shuffled(Numbered(0), (0,))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 7), epochs=st.integers(1, 3))
def test_the_rows_together_read_every_document_once_an_epoch(count, batch_size, epochs):
    rows = training_streams([Numbered(count)], (), 3, batch_size)
    read = [rows[i % batch_size][i // batch_size] for i in range(count * epochs)]
    for epoch in range(epochs):
        assert sorted(read[epoch * count : (epoch + 1) * count], key=int) == names(count)


@pytest.mark.parametrize(("weights", "expected"), [((), 0.25), ((1.0, 1.0), 0.5), ((0.9, 0.1), 0.9)])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_row_draws_from_the_sources_by_weight(weights, expected, batch_size):
    rows = training_streams([Numbered(30, "a"), Numbered(90, "b")], weights, 0, batch_size)
    for row in rows:
        drawn = [row[i][0] for i in range(100)]
        assert abs(drawn.count("a") / 100 - expected) <= 0.01


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_held_out_has_every_document_once_with_the_sources_evenly_spread(counts):
    sources = [Numbered(count, "abc"[i]) for i, count in enumerate(counts)]
    documents = heldout_documents(sources)
    assert isinstance(documents, grain.MapDataset)
    order = [documents[i] for i in range(len(documents))]
    assert sorted(order) == sorted(name for i, count in enumerate(counts) for name in names(count, "abc"[i]))
    for i, count in enumerate(counts):
        so_far = np.cumsum([name[0] == "abc"[i] for name in order])
        fair = np.arange(1, len(order) + 1) * count / len(order)
        assert np.abs(so_far - fair).max() <= len(counts)

"""The loader as a run uses it: the same data on any number of processes, resumed at any moment, evaluated once each."""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data.config import DataConfig
from llama4_jax.data.documents import split
from llama4_jax.data.encode import Encoder
from llama4_jax.data.loader import make_loader, merge_states
from llama4_jax.data.mixture import training_streams
from llama4_jax.data.packing import PackedBatches
from llama4_jax.data.sources import open_source
from llama4_jax.inputs.tokenizer import ByteTokenizer, load_tokenizer

TOKENIZER = ByteTokenizer()
BATCH = 6
TURNS = 3  # documents that a row has open
LONG = 15  # batches: more than two epochs of training, more than an evaluation


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Sixty documents of 3 to 63 bytes, in two sources: eight batches or so are an epoch."""
    folder = tmp_path_factory.mktemp("data")
    for name, lengths in (("a", range(0, 60, 2)), ("b", range(1, 60, 2))):
        lines = (json.dumps({"text": f"{name}{n}:" + "x" * n}) + "\n" for n in lengths)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return DataConfig(
        sources=(f"jsonl:{folder}/a.jsonl", f"jsonl:{folder}/b.jsonl"),
        seq_len=32,
        batch_size=BATCH,
        heldout_fraction=0.3,
        open_documents=TURNS,
        prefetch=2,
    )


def loader(config, split="train", **more):
    return make_loader(config, TOKENIZER, split=split, **more)


def wide(config, **fields):
    """Rows of more than an epoch of documents."""
    return dataclasses.replace(config, seq_len=1024, prefetch=0, open_documents=1, **fields)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(ours, expected):
    assert len(ours) == len(expected)
    for batch, other in zip(ours, expected, strict=True):
        for field, other_field in zip(batch[:-1], other[:-1], strict=True):
            np.testing.assert_array_equal(field, other_field, strict=True)


def documents(batches):
    """The texts in some batches' rows, which must be whole."""
    return [
        TOKENIZER.decode(row.targets[(row.segment_ids == segment) & (row.weights > 0)], skip_special=True)
        for batch in batches
        for row in (type(batch)(*fields) for fields in zip(*batch[:-1], strict=True))
        for segment in range(1, row.segment_ids.max() + 1)
    ]


def texts(config, held):
    return [
        part[i] for spec in config.sources for part in [split(open_source(spec), 0.3)[held]] for i in range(len(part))
    ]


def test_training_rows_are_packed_without_gaps_and_hold_the_training_documents(config):
    (batch,) = take(loader(wide(config)), 1)
    assert (batch.segment_ids > 0).all()
    found = documents([batch])
    assert len(found) > 2 * 42
    whole = set(texts(config, held=False))
    assert whole <= set(found)
    assert all(text in whole or any(other.startswith(text) for other in whole) for text in found)


def test_a_row_of_the_loader_is_that_row_of_the_data(config):
    sources = [split(open_source(spec), 0.3)[0] for spec in config.sources]
    streams = training_streams(sources, (), config.shuffle_seed, TURNS * BATCH)
    got = take(loader(config), LONG)
    for row in range(BATCH):
        for turn in range(TURNS):
            stream = streams[turn * BATCH + row]
            alone = PackedBatches({"": stream}, [[""]], slice(None), Encoder(TOKENIZER), config.seq_len)
            own = [type(batch)(*(field[row : row + 1] for field in batch[:-1])) for batch in got[turn::TURNS]]
            assert_equal(own, take(alone, LONG // TURNS))


def test_the_pieces_of_a_long_document_are_as_many_batches_apart_as_a_row_has_open(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(name * 1000)
    config = DataConfig(sources=(f"files:{tmp_path}/*.txt",), seq_len=64, batch_size=2, heldout_fraction=0.0)
    for asked, got in ((1, 1), (3, 3), (16, 4)):  # of eight documents, each of two rows can have four
        batches = take(loader(dataclasses.replace(config, open_documents=asked)), 3 * got)
        letters = [TOKENIZER.decode(batch.targets[0, :1]) for batch in batches]
        assert len(set(letters)) == got and letters == 3 * letters[:got]


@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("part", ["train", "heldout"])
def test_the_batches_do_not_depend_on_the_number_of_processes(config, processes, part):
    alone = take(loader(config, part), LONG)
    shares = [take(loader(config, part, process_index=i, process_count=processes), LONG) for i in range(processes)]
    assert {share[0].tokens.shape for share in shares} == {(BATCH // processes, config.seq_len)}
    joined = [
        type(parts[0])(*map(np.concatenate, zip(*(part[:-1] for part in parts), strict=True)))
        for parts in zip(*shares, strict=True)
    ]
    assert_equal(joined, alone)


@pytest.fixture(scope="module")
def whole(config):
    return {part: take(loader(config, part), LONG) for part in ("train", "heldout")}


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 7), min_size=1, max_size=2),
    part=st.sampled_from(["train", "heldout"]),
    prefetch=st.sampled_from([0, 1, 3]),
    new=st.booleans(),
)
def test_a_restored_loader_goes_on_with_the_same_batches(config, whole, cuts, part, prefetch, new):
    """Wherever it is cut, whatever was read ahead, in a loader that is new or has gone on elsewhere, across epochs."""
    config = dataclasses.replace(config, prefetch=prefetch)
    ours, got = loader(config, part), []
    for cut in cuts:
        got += [batch for _ in range(cut) if (batch := next(ours, None)) is not None]
        state = json.loads(json.dumps(ours.get_state()))
        if new:
            ours = loader(config, part)
        next(ours, None)
        ours.set_state(state)
        assert ours.get_state() == state
    got += [batch for _ in range(LONG - len(got)) if (batch := next(ours, None)) is not None]
    assert_equal(got, whole[part])


def test_a_state_goes_on_with_another_number_of_processes(config):
    expected = take(loader(config), 9)[5:]
    states = []
    for i in range(3):
        ours = loader(config, process_index=i, process_count=3)
        take(ours, 5)
        states.append(ours.get_state())
    merged = json.loads(json.dumps(merge_states(states)))
    alone = loader(config)
    alone.set_state(merged)
    assert_equal(take(alone, 4), expected)
    for i in range(2):
        half = loader(config, process_index=i, process_count=2)
        half.set_state(merged)
        rows = slice(3 * i, 3 * i + 3)
        assert_equal(take(half, 4), [type(batch)(*(field[rows] for field in batch[:-1])) for batch in expected])


def test_states_of_different_moments_are_not_merged(config):
    first, second = (loader(config, process_index=i, process_count=2) for i in range(2))
    next(first)
    with pytest.raises(ValueError, match="not of one moment: after batch 1 of .* and after batch 0 of"):
        merge_states([first.get_state(), second.get_state()])


def test_a_state_is_small(config):
    ours = loader(config)
    take(ours, 10)
    assert len(json.dumps(ours.get_state())) < 50 + 20 * BATCH * TURNS


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 33},
        {"batch_size": 5},
        {"shuffle_seed": 1},
        {"heldout_fraction": 0.2},
        {"weights": (1.0, 2.0)},
        {"open_documents": 1},
        {"sources": ("stdlib",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_state_of_other_data_is_refused_and_nothing_is_lost(config, change):
    other = loader(dataclasses.replace(config, **change))
    take(other, 3)
    ours = loader(config)
    got = take(ours, 2)
    with pytest.raises(ValueError, match=r"the saved place in the data is of other data \(\w+\) than this"):
        ours.set_state(other.get_state())
    assert_equal(got + take(ours, 3), take(loader(config), 5))


def test_a_state_that_lacks_rows_is_refused_and_nothing_is_lost(config):
    half = loader(config, process_index=1, process_count=2)
    ours = loader(config)
    got = take(ours, 2)
    with pytest.raises(ValueError, match=r"lacks the streams 0\.0, 1\.0, .* of this process, and has 3\.0, .*: merge"):
        ours.set_state(half.get_state())
    assert_equal(got + take(ours, 3), take(loader(config), 5))


def test_a_changed_file_is_noticed(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("x" * 100)
    config = DataConfig(sources=(f"files:{tmp_path}",), seq_len=8, batch_size=1)
    state = loader(config).get_state()
    loader(config).set_state(state)
    (tmp_path / "7.txt").write_text("x" * 101)
    with pytest.raises(ValueError, match="of other data"):
        loader(config).set_state(state)


@pytest.mark.parametrize("seq_len", [7, 32, 1000])
@pytest.mark.parametrize("processes", [1, 3])
def test_every_held_out_byte_is_counted_exactly_once(config, seq_len, processes):
    config = dataclasses.replace(config, seq_len=seq_len)
    shares = [list(loader(config, "heldout", process_index=i, process_count=processes)) for i in range(processes)]
    heldout = texts(config, held=True)
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert sum(batch.target_bytes.sum() for batch in batches) == sum(len(text.encode()) for text in heldout)
    assert sum(batch.weights.sum() for batch in batches) == sum(len(text.encode()) + 1 for text in heldout)
    assert {batch.tokens.shape for batch in batches} == {(BATCH // processes, seq_len)}
    if seq_len == 1000:
        assert sorted(documents(batches)) == sorted(heldout)


def test_every_evaluation_is_the_same_and_can_be_left_early(config):
    ours = loader(config, "heldout")
    whole = list(ours)
    assert len(whole) > 3
    assert_equal(list(ours), whole)
    for count in (1, 3):
        assert_equal(take(ours, count), whole[:count])
    assert_equal(list(ours), whole)
    threads = threading.active_count()
    for _ in range(5):
        next(iter(ours))
    assert threading.active_count() <= threads + 1
    assert_equal(list(loader(dataclasses.replace(config, shuffle_seed=9), "heldout")), whole)


@pytest.mark.parametrize("limit", [1, 2, 1000])
def test_an_evaluation_can_be_limited_to_its_first_batches(config, limit):
    whole = list(loader(config, "heldout"))
    limited = loader(config, "heldout", max_batches=limit)
    assert_equal(list(limited), whole[:limit])
    assert_equal(list(limited), whole[:limit])


def test_what_is_held_out_is_never_trained_on(config):
    seen = set(documents(take(loader(wide(config)), 2)))
    assert seen
    assert not seen & set(texts(config, held=True))


def test_another_seed_is_another_order_of_the_same_documents(config):
    first, second = (take(loader(wide(config, shuffle_seed=seed)), 1) for seed in (0, 1))
    assert not np.array_equal(first[0].tokens, second[0].tokens)
    whole = set(texts(config, held=False))
    assert whole <= set(documents(first))
    assert whole <= set(documents(second))


def test_reading_ahead_changes_nothing(config):
    expected = take(loader(dataclasses.replace(config, prefetch=0)), 12)
    assert_equal(take(loader(dataclasses.replace(config, prefetch=4)), 12), expected)


def test_an_error_while_reading_ahead_reaches_the_reader(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("x" * 100)
    ours = loader(DataConfig(sources=(f"files:{tmp_path}",), seq_len=8, batch_size=1))
    next(ours)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"\.txt"):
        take(ours, 200)


def test_a_closed_loader_says_so(config):
    ours = loader(config)
    next(ours)
    ours.close()
    ours.close()
    with pytest.raises(ValueError, match="this loader is closed"):
        next(ours)


def test_a_program_that_ends_while_batches_are_made_ends_silently():
    code = (
        "from llama4_jax.data.config import DataConfig\n"
        "from llama4_jax.data.loader import make_loader\n"
        "from llama4_jax.inputs.tokenizer import ByteTokenizer\n"
        "config = DataConfig(seq_len=64, batch_size=2)\n"
        "loaders = [make_loader(config, ByteTokenizer(), split=split) for split in ('train', 'heldout')]\n"
        "for loader in loaders: print(next(loader).tokens.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(2, 64)\n(2, 64)\n", "")


@pytest.mark.parametrize(
    ("fields", "arguments", "said"),
    [
        ({}, {"process_count": 4}, "data.batch_size must be a multiple of the number of processes, 4, got 6"),
        ({}, {"process_index": 2, "process_count": 2}, r"process_index must be in \[0, 2\), got 2"),
        ({}, {"max_batches": 3}, "max_batches is for held-out data, and at least 1, got 3 for train"),
        ({}, {"split": "heldout", "max_batches": 0}, "max_batches is for .*, and at least 1, got 0 for heldout"),
        ({"heldout_fraction": 0.0}, {"split": "heldout"}, "none of the 60 documents of data.sources is held out"),
        ({"heldout_fraction": 0.999}, {}, r"all documents of jsonl:.*a\.jsonl are held out"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_at_once(config, fields, arguments, said):
    with pytest.raises(ValueError, match=said):
        loader(dataclasses.replace(config, **fields), **arguments)


def test_bytes_are_counted_alike_by_both_tokenizers(config):
    """So that bits per byte compares models of different vocabularies."""
    model = pathlib.Path(importlib.util.find_spec("llama_models").origin).parent / "llama4" / "tokenizer.model"
    counts = []
    for tokenizer in (TOKENIZER, load_tokenizer(model)):
        batches = list(make_loader(config, tokenizer, split="heldout"))
        counts.append((sum(batch.target_bytes.sum() for batch in batches), len(batches)))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] > counts[1][1]

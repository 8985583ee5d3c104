"""Token files, texts too small for the usual split, held-out sources, and files that change while they are read."""

import io
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data import watch
from llama4_jax.data.config import DataConfig
from llama4_jax.data.encode import Encoder
from llama4_jax.data.loader import make_loader
from llama4_jax.data.sources import open_source
from llama4_jax.inputs.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
HAPPY = "All happy families are alike. "


def config(*sources, **fields):
    return DataConfig(**{"sources": sources, "seq_len": 32, "batch_size": 4, "prefetch": 0, **fields})


def spelled(documents):
    return [TOKENIZER.decode(documents[i].ids) for i in range(len(documents))]


def stream(*parts):
    """Ids of texts, with single ids between them."""
    return [i for part in parts for i in (TOKENIZER.encode(part) if isinstance(part, str) else [part])]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "i4", "i8", "u8"])
def test_a_stream_of_ids_is_cut_at_each_end_of_text(dtype, tmp_path):
    ids = stream(EOS, BOS, "one", EOS, "two", EOS, EOS, BOS, EOS, BOS, "three")
    np.save(tmp_path / "a.npy", np.array(ids, dtype))
    documents = open_source(f"tokens:{tmp_path}/a.npy", TOKENIZER)
    assert spelled(documents) == ["one", "two", "three"]
    encode = Encoder(TOKENIZER)
    for i, text in enumerate(("one", "two", "three")):
        ours, same = encode(documents[i]), encode(text)
        for field in ("tokens", "targets", "weights", "target_bytes"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(same, field), strict=True)


def test_a_run_reads_the_same_of_tokens_as_of_the_text_they_are_of(tmp_path):
    texts = [f"document {i} " * (i + 1) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save(tmp_path / "a.npy", np.array(stream(*(x for text in texts for x in (text, EOS))), np.uint16))
    of_text, of_tokens = (config(f"{kind}:{tmp_path}/a.{end}", heldout_fraction=0.0, open_documents=1)
                          for kind, end in (("jsonl", "jsonl"), ("tokens", "npy")))  # fmt: skip

    def seen(config):
        loader = make_loader(config, TOKENIZER, split="train")
        rows = np.concatenate([next(loader).targets.ravel() for _ in range(60)])
        return {bytes(row[row < 256].astype(np.uint8)) for row in np.split(rows, np.flatnonzero(rows == EOS) + 1)}

    assert {text.encode() for text in texts[:2]} <= seen(of_text) & seen(of_tokens)


def test_a_file_without_an_end_of_text_is_cut_into_pieces_and_copies_are_on_one_side(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40_000) % 250)
    documents = open_source(f"tokens:{tmp_path}", TOKENIZER)
    assert [len(documents[i].ids) for i in range(len(documents))] == [16_384, 16_384, 7_232]
    np.save(tmp_path / "b.npy", np.array((np.arange(40_000) % 250), np.uint8))
    both = open_source(f"tokens:{tmp_path}", TOKENIZER)
    assert both.hashes[:3].tolist() == both.hashes[3:].tolist()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones(9), "should be an array of integers in one dimension.*float64"),
        (np.ones((3, 3), int), r"should be an array of integers in one dimension.*\(3, 3\)"),
        (np.ones(3, bool), "should be an array of integers"),
        (np.array([5, -1, 3]), "holds the id -1, and data.tokenizer has 320 ids, 0 to 319"),
        (np.array([5, 320]), "holds the id 320, and data.tokenizer has 320 ids"),
        (np.array([2**63], np.uint64), "holds the id 9223372036854775808"),
        (np.array([], int), "there is no text in tokens:"),
        (np.array([EOS, EOS]), "there is no text in tokens:"),
        (np.array([{}, []], object), "integers in one dimension.*object"),
    ],
)
def test_an_array_that_is_no_stream_of_ids_is_refused(array, says, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=says):
        open_source(f"tokens:{tmp_path}/a.npy", TOKENIZER)


def test_a_header_that_promises_more_than_there_is_is_refused_without_memory(tmp_path):
    for shape in ("(1000000000000000,)", "(-1,)", "(" * 300 + "1,", "(1,)" + " " * 60_000):
        text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\x05\x00" * 9)
        with pytest.raises(ValueError, match=r"a\.npy") as error:
            open_source(f"tokens:{tmp_path}/a.npy", TOKENIZER)
        assert len(str(error.value)) < 500


@settings(max_examples=1000, deadline=5000)
@given(edits=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), min_size=1, max_size=6),
       length=st.integers(0, 200))  # fmt: skip
def test_a_mutated_npy_file_is_refused_or_read(edits, length, tmp_path_factory):
    file = io.BytesIO()
    np.save(file, np.arange(36, dtype=np.uint16))
    content = bytearray(file.getvalue())
    for place, byte in edits:
        content[place] = byte
    path = tmp_path_factory.getbasetemp() / "mutated.npy"
    path.write_bytes(content[: len(content) if length % 3 else length])
    try:
        documents = open_source(f"tokens:{path}", TOKENIZER)
    except ValueError as error:
        assert len(str(error)) < 500
        return
    assert all(documents[i].ids.min() >= 0 and documents[i].ids.max() < 320 for i in range(len(documents)))


@settings(max_examples=1000, deadline=5000)
@given(line=st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "x"]), inner, max_size=2),
    max_leaves=6,
).map(lambda row: json.dumps(row).encode()))  # fmt: skip
def test_any_line_is_a_document_or_named(line, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "mutated.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    try:
        documents = open_source(f"jsonl:{path}")
    except ValueError as error:
        assert f"{path}, line " in str(error) and len(str(error)) < 500
        return
    assert documents[0] == "good"


def test_a_text_of_100_kilobytes_has_both_splits_and_rows_that_differ(tmp_path):
    (tmp_path / "own.txt").write_text("".join(f"{i} {HAPPY}" for i in range(3000)))
    whole = config(f"text:{tmp_path}/own.txt", batch_size=8)
    train, heldout = (make_loader(whole, TOKENIZER, split=split) for split in ("train", "heldout"))
    assert len({row.tobytes() for row in next(train).tokens}) == 8
    assert sum(batch.target_bytes.sum() for batch in heldout) > 1000


@pytest.mark.parametrize("size", [40, 400, 10_000])
@pytest.mark.parametrize("kind", ["text", "tokens", "files", "jsonl"])
def test_one_document_is_split_by_position_and_shared_by_rows(kind, size, tmp_path):
    text = "".join(f"{i} " for i in range(size))[:size]
    path = tmp_path / f"own.{ {'tokens': 'npy', 'jsonl': 'jsonl'}.get(kind, 'txt') }"
    if kind == "tokens":
        np.save(path, np.frombuffer(text.encode(), np.uint8))
    else:
        path.write_text(json.dumps({"text": text}) if kind == "jsonl" else text)
    whole = config(f"{kind}:{path}", heldout_fraction=0.1)
    heldout = list(make_loader(whole, TOKENIZER, split="heldout"))
    held = b"".join(bytes(b.targets[b.targets < 256].astype(np.uint8)) for b in heldout).decode()
    assert text.endswith(held) and 0.02 * size < len(held) < 0.12 * size + 1
    train = make_loader(whole, TOKENIZER, split="train")
    first = next(train)
    rows = [TOKENIZER.decode(row, skip_special=True) for row in first.tokens]
    assert len(set(rows)) == 4
    state = train.get_state()
    again = make_loader(whole, TOKENIZER, split="train")
    again.set_state(state)
    np.testing.assert_array_equal(next(again).tokens, next(train).tokens)


def test_few_conversations_are_held_out_whole_and_rows_share_the_rest(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x"}]} for i in "ab"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = config(f"chat:{tmp_path}/c.jsonl", heldout_fraction=0.01, batch_size=8)
    said = {}
    for split in ("train", "heldout"):
        batch = next(make_loader(whole, TOKENIZER, split=split))
        said[split] = {name for name in "ab" if f"{name}?" in TOKENIZER.decode(batch.tokens.ravel())}
    assert len(said["train"]) == len(said["heldout"]) == 1 and said["train"] != said["heldout"]


def test_documents_that_suffice_are_dealt_out_as_ever(tmp_path):
    """By their hashes alone: what was held out yesterday is so today."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(60)))
    loader = make_loader(config(f"jsonl:{tmp_path}/a.jsonl", heldout_fraction=0.3), TOKENIZER, split="heldout")
    documents = open_source(f"jsonl:{tmp_path}/a.jsonl")
    held = [documents[i] for i in np.flatnonzero(documents.hashes < np.uint64(int(0.3 * 2**64))).tolist()]
    assert sum(batch.target_bytes.sum() for batch in loader) == sum(map(len, held)) > 0


def test_held_out_sources_are_measured_whole_and_nothing_else_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text(HAPPY * 3)
    (tmp_path / "b.txt").write_text("something else")
    whole = config(f"text:{tmp_path}/a.txt", heldout_sources=(f"text:{tmp_path}/b.txt",), batch_size=1)
    (batch,) = make_loader(whole, TOKENIZER, split="heldout")
    assert TOKENIZER.decode(batch.targets[0], skip_special=True).rstrip("\0") == "something else"
    train = make_loader(whole, TOKENIZER, split="train")
    assert sum(int(next(train).target_bytes.sum()) for _ in range(3)) >= len(HAPPY * 3)
    assert whole.holds_out and config("stdlib").holds_out and not config("stdlib", heldout_fraction=0.0).holds_out
    with pytest.raises(ValueError, match="'txt:x' is of no known kind"):
        config("stdlib", heldout_sources=("txt:x",))


def rewritten(path):
    stamp = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: os.truncate(path, 100), "was changed while the run reads it: it had .* bytes and has 100"),
        (lambda path: path.unlink(), "can no longer be read while the run reads it"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "was changed while the run reads it"),
        (rewritten, "was written anew while the run reads it"),
    ],
    ids=["cut short", "gone", "longer", "rewritten"],
)
@pytest.mark.parametrize("kind", ["text", "jsonl", "files", "tokens"])
def test_a_file_that_changes_while_it_is_read_is_noticed_soon(kind, change, says, tmp_path, monkeypatch):
    path = tmp_path / ("a.npy" if kind == "tokens" else "a.txt")
    if kind == "tokens":
        np.save(path, np.arange(2000) % 250)
    else:
        path.write_text("".join(json.dumps({"text": f"{i} " + HAPPY}) + "\n" for i in range(300)))
    loader = make_loader(config(f"{kind}:{path}"), TOKENIZER, split="train")
    monkeypatch.setattr(watch, "_SECONDS", 0.0)
    next(loader)
    change(path)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        next(loader)
    assert str(path) in str(error.value) and "Nothing that was saved is lost" in str(error.value)


def test_a_document_is_as_many_bytes_in_memory_as_it_has_ids_in_small_integers(tmp_path):
    text = "word " * 400_000
    piece = Encoder(TOKENIZER)(text)
    assert piece.ids.nbytes == 2 * (len(text) + 2)
    part = piece.part(5, 9)
    assert part.tokens.tolist() == piece.tokens[5:9].tolist() and part.targets.tolist() == piece.targets[5:9].tolist()
    assert part.target_bytes.tolist() == [1, 1, 1, 1] and part.weights.tolist() == [1.0] * 4

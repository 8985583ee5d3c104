"""Each kind of source, its split, and what is said of a bad one."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.data.config import DataConfig
from llama4_jax.data.documents import Subset, split
from llama4_jax.data.sources import open_source, parse_source


def texts(documents):
    return [documents[i] for i in range(len(documents))]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_default_is_the_standard_library_without_tests_and_packages():
    documents = open_source("stdlib")
    library = Path(sysconfig.get_path("stdlib"))
    assert len(documents) > 300
    everything = set(texts(documents))
    assert (library / "argparse.py").read_text() in everything
    assert (library / "json" / "decoder.py").read_text() in everything
    for skipped in ("test/test_argparse.py", "idlelib/run.py", "encodings/cp037.py"):
        if (library / skipped).exists():
            assert (library / skipped).read_text() not in everything
    assert not any("site-packages" in str(path) for path in documents._paths)


def test_files_are_whole_documents_in_the_order_of_their_names(tmp_path):
    for name, content in {
        "b.md": "two",
        "a/z.md": "one\r\n",
        "c.txt": "three",
        "a/.hidden": "no",
        "empty.md": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "d.md").write_bytes(b"\xffour \xe6\x97")
    assert texts(open_source(f"files:{tmp_path}")) == ["one\r\n", "two", "three", "\ufffdour \ufffd"]
    assert texts(open_source(f"files:{tmp_path}/**/*.md")) == ["one\r\n", "two", "\ufffdour \ufffd"]
    assert texts(open_source(f"files:{tmp_path}/b.md")) == ["two"]


def test_a_file_keeps_its_side_of_the_split_when_the_data_move_or_grow(tmp_path):
    for place, count in (("here", 40), ("there/deeper", 60)):
        (tmp_path / place).mkdir(parents=True)
        for i in range(count):
            (tmp_path / place / f"{i:02}.txt").write_text(f"{i:02}")
    here, there = (open_source(f"files:{tmp_path / place}") for place in ("here", "there/deeper"))
    heldout_here, heldout_there = (set(texts(split(documents, 0.3)[1])) for documents in (here, there))
    assert heldout_here
    assert heldout_here == {text for text in heldout_there if int(text) < 40}


@settings(max_examples=30, deadline=None)
@given(
    content=st.lists(
        st.sampled_from([b"\n\n", b"\n", b" ", b"word" * 700, "日".encode() * 1500, b"\xff" * 900, b"x" * 9000]),
        min_size=1,
    )
)
def test_pieces_of_a_text_joined_are_the_text(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    content = b"".join(content)
    path.write_bytes(content)
    documents = open_source(f"text:{path}")
    assert "".join(texts(documents)) == content.decode(errors="replace")
    for text in texts(documents)[:-1]:
        assert len(text) // 4 <= 16_384 - 3
        assert len(text.encode(errors="replace")) >= 16_384 // 2


def test_a_text_is_cut_at_empty_lines_then_lines_then_spaces(tmp_path):
    paragraph, line = "p" * 99 + "\n\n", "l" * 99 + "\n"
    for name, unit in {"paragraphs": paragraph, "lines": line, "words": "w" * 99 + " ", "none": "é" * 99}.items():
        (tmp_path / name).write_text(unit * 600)
        pieces = texts(open_source(f"text:{tmp_path / name}"))
        assert len(pieces) > 3
        for piece in pieces[:-1]:
            assert 16_384 - 110 <= len(piece.encode()) <= 16_384
            assert piece.endswith(unit[-2:])


def test_jsonl_gives_a_document_a_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one\ntwo", "n": 1}, {"text": "日本"}, {"text": ""}])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n  \n{"text": "last, without a line end"}')
    assert texts(open_source(f"jsonl:{tmp_path}/a.jsonl")) == ["one\ntwo", "日本", "last, without a line end"]
    write_jsonl(tmp_path / "b.jsonl", [{"body": "three"}])
    assert texts(open_source(f"jsonl:{tmp_path}/b.jsonl#body")) == ["three"]
    write_jsonl(tmp_path / "b.jsonl", [{"text": "three"}])
    assert texts(open_source(f"jsonl:{tmp_path}")) == ["one\ntwo", "日本", "last, without a line end", "three"]


def test_copies_of_a_text_are_on_one_side_of_the_split(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i % 30}"} for i in range(300)])
    train, heldout = (set(texts(part)) for part in split(open_source(f"jsonl:{tmp_path}/a.jsonl"), 0.3))
    assert train
    assert heldout
    assert not train & heldout


@pytest.fixture
def parquet(tmp_path):
    for name, count in (("a", 25), ("b", 7)):
        table = pa.table({"text": [f"{name}{i}" for i in range(count)], "n": list(range(count))})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=10)
    return tmp_path


def test_parquet_gives_a_document_a_row_and_a_block_a_row_group(parquet):
    documents = open_source(f"parquet:{parquet}/*.parquet")
    assert texts(documents) == [f"a{i}" for i in range(25)] + [f"b{i}" for i in range(7)]
    assert documents.blocks.tolist() == [0, 10, 20, 25, 32]
    train, heldout = split(documents, 0.3)
    for part in (train, heldout):
        for first, stop in zip(part.blocks, part.blocks[1:], strict=False):
            groups = {(text[0], int(text[1:]) // 10) for text in texts(part)[first:stop]}
            assert len(groups) == 1
    assert sorted(texts(train) + texts(heldout)) == sorted(texts(documents))


def test_a_parquet_row_group_is_read_once_while_it_is_in_use(parquet, monkeypatch):
    documents = open_source(f"parquet:{parquet}/a.parquet#text")
    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: read.append(a[1]) or original(*a, **k))
    assert documents[3] == "a3"
    assert read == [0]
    texts(documents)
    assert read == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(fraction=st.floats(0, 0.999), more=st.floats(0, 0.999))
def test_the_splits_are_disjoint_and_whole_and_grow_with_the_fraction(fraction, more):
    documents = open_source("stdlib")
    train, heldout = split(documents, fraction)
    assert sorted([*train._indices, *heldout._indices]) == list(range(len(documents)))
    assert abs(len(heldout) / len(documents) - fraction) < 0.1
    if more >= fraction:
        assert set(heldout._indices) <= set(split(documents, more)[1]._indices)


def test_the_split_is_the_same_in_every_version(tmp_path):
    """Recorded: a change of it would put what was held out into training."""
    numbers = [f"{i} " for i in range(40)]
    for number in numbers:
        (tmp_path / f"{number.strip()}.txt").write_text(number)
    write_jsonl(tmp_path / "all.jsonl", [{"text": number} for number in numbers])
    pq.write_table(pa.table({"text": numbers}), tmp_path / "all.parquet")

    def heldout(kind, pattern):
        return "".join(sorted(texts(split(open_source(f"{kind}:{tmp_path}/{pattern}"), 0.2)[1]), key=int)).strip()

    assert heldout("files", "*.txt") == "14 19 32"
    assert heldout("jsonl", "all.jsonl") == "1 4 9 11 17 38 39"
    assert heldout("parquet", "all.parquet") == "2 4 22 27 29 31 32 35 37"


def test_a_subset_is_itself_a_data_set(parquet):
    documents = Subset(open_source(f"parquet:{parquet}"), np.array([3, 12, 13, 30]))
    assert texts(documents) == ["a3", "a12", "a13", "b5"]
    assert documents.blocks.tolist() == [0, 1, 3, 4]
    assert len({documents.identity, open_source(f"parquet:{parquet}").identity}) == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("jsnl:x", r"'jsnl:x' is of no known kind\. Did you mean jsonl:PATH"),
        ("/data/x.txt", "is of no known kind. Known are stdlib, text:PATH"),
        ("text:", "should have the form text:PATH"),
        ("stdlib:x", "should have the form stdlib"),
        ("jsonl:x#", r"should have the form jsonl:PATH\[#FIELD\]"),
    ],
)
def test_a_source_of_no_known_form_is_refused_before_anything_is_opened(spec, said):
    with pytest.raises(ValueError, match=f"data.sources: .*{said}"):
        parse_source(spec)
    with pytest.raises(ValueError, match=said):
        DataConfig(sources=(spec,), seq_len=8, batch_size=1)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "files"])
def test_a_path_that_matches_nothing_is_named(kind, tmp_path):
    for path in (tmp_path / "nowhere.txt", tmp_path, tmp_path / "**" / "*.zip"):
        with pytest.raises(FileNotFoundError, match="data.sources: .* matches no file") as error:
            open_source(f"{kind}:{path}")
        assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["text", "jsonl", "files"])
def test_an_empty_data_set_is_an_error(kind, tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(
        ValueError, match=f"data.sources: there is no text in {kind}:{tmp_path}/a.*: every file .* empty"
    ):
        open_source(f"{kind}:{tmp_path}/a")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'text': 1}", "is no valid JSON"),
        ('"just a string"', "should be a JSON object with the field 'text', and is a str"),
        ('{"body": "x", "n": 1}', "has no field 'text', but 'body', 'n'"),
        ('{"text": null}', "the field 'text' should be a string, and is None"),
        ("[" * 100_000, "is no valid JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number_when_the_file_is_opened(line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"{path}, line 3:? {said}"):
        open_source(f"jsonl:{path}")


def test_a_bad_parquet_file_is_named_when_it_is_opened(parquet):
    (parquet / "c").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=f"{parquet}/c is no Parquet file, or damaged"):
        open_source(f"parquet:{parquet}/c")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'body', but 'text', 'n'"):
        open_source(f"parquet:{parquet}/a.parquet#body")
    with pytest.raises(ValueError, match="the column 'n' should hold strings, and holds int64"):
        open_source(f"parquet:{parquet}/a.parquet#n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), parquet / "d")
    with pytest.raises(ValueError, match="there is no text in parquet:"):
        open_source(f"parquet:{parquet}/d")


def test_a_null_in_parquet_is_an_error_at_once_or_when_it_is_met(parquet):
    table = pa.table({"text": ["a", None]})
    pq.write_table(table, parquet / "counted")
    with pytest.raises(ValueError, match="counted: the column 'text' has nulls"):
        open_source(f"parquet:{parquet}/counted")
    pq.write_table(table, parquet / "uncounted", write_statistics=False)
    documents = open_source(f"parquet:{parquet}/uncounted")
    assert documents[0] == "a"
    with pytest.raises(ValueError, match="uncounted: the column 'text' has nulls"):
        documents[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sources": ()}, "data.sources is empty"),
        ({"weights": (1.0, 2.0)}, "data.weights has 2 numbers for 1 data.sources"),
        ({"weights": (0.0,)}, "data.weights must be positive numbers, got 0.0"),
        ({"weights": (float("nan"),)}, "data.weights must be positive numbers, got nan"),
        ({"seq_len": 0}, "data.seq_len must be at least 1, got 0"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"shuffle_seed": -1}, "data.shuffle_seed must be at least 0, got -1"),
        ({"prefetch": -1}, "data.prefetch must be at least 0, got -1"),
        ({"heldout_fraction": 1.0}, r"data.heldout_fraction must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(**{"seq_len": 8, "batch_size": 1, **fields})

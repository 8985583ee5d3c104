"""What a run reads and writes may be in a bucket: gs:// paths, against a bucket in memory that stands in for Google's.

What is beneath epath is not tested here: Google's client, and TensorStore, which writes and reads the arrays of a
checkpoint.
"""

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from etils.epath import backend
from flax import nnx
from fsspec.implementations.memory import MemoryFileSystem
from micro_run import picture_directory

from llama4_jax.atomic import write_atomically
from llama4_jax.data.sources import open_source
from llama4_jax.inputs.tokenizer import ByteTokenizer, load_tokenizer
from llama4_jax.train.loop import copy_files
from llama4_jax.train.metrics import Log
from llama4_jax.weights.load import from_pretrained
from llama4_jax.weights.source import open_weights


class Bucket(MemoryFileSystem):
    """Names begin with that of the bucket, not with a slash; nothing can be appended."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]  # not those of all memory

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def glob(self, path, **kwargs):
        return [name.lstrip("/") for name in super().glob(path, **kwargs)]

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode, "an object cannot be appended to"
        return super()._open(path, mode=mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    """A folder of an empty one."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    google = Bucket()
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: google)
    return epath.Path("gs://bucket/folder")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


LINES = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(9)).encode()


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("jsonl:gs://bucket/folder/deep/a.jsonl", 9),
        ("jsonl:gs://bucket/folder", 18),
        ("jsonl:gs://bucket/folder/*/?.jsonl", 9),
        ("text:gs://bucket/folder/b.txt", 4),
        ("files:gs://bucket/folder/deep", 1),
        ("parquet:gs://bucket/rows", 5),
        ("pictures:gs://bucket/rows", 5),
    ],
)
def test_sources_are_read_from_a_bucket_as_from_a_disk(bucket, source, count, tmp_path):
    write(bucket / "deep" / "a.jsonl", LINES)
    write(bucket / "c.jsonl", LINES)
    write(bucket / ".hidden.jsonl", LINES)
    write(bucket / "b.txt", b"words of a book\n" * 4000)
    table = pa.table({"text": [f"row {n}" for n in range(5)]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write(epath.Path("gs://bucket/rows/part.parquet"), sink.getvalue().to_pybytes())
    copy = tmp_path / "bucket"
    for name, content in Bucket.store.items():
        write(copy / name.removeprefix("/bucket/"), content.getvalue())
    there, here = open_source(source), open_source(source.replace("gs://bucket", str(copy)))
    assert len(there) == len(here) == count
    assert there.identity == here.identity

    def words(document):
        return document if isinstance(document, str) else document.content

    assert [words(there[i]) for i in range(count)] == [words(here[i]) for i in range(count)]


def test_a_source_that_is_not_in_the_bucket_is_named(bucket):
    with pytest.raises(FileNotFoundError, match="gs://bucket/folder/none.txt matches no file"):
        open_source("text:gs://bucket/folder/none.txt")
    with pytest.raises(ValueError, match=r"no \*\* in a bucket. Name the directory gs://bucket/folder"):
        open_source("text:gs://bucket/folder/**/a.txt")


def test_the_files_of_a_run_are_written_to_a_bucket_and_metrics_are_kept_at_each_checkpoint(bucket, tmp_path):
    write_atomically(bucket / "config.json", "{}")
    ByteTokenizer().save(bucket)
    assert load_tokenizer(str(bucket)).vocab_size == ByteTokenizer().vocab_size
    (tmp_path / "trace" / "inner").mkdir(parents=True)
    (tmp_path / "trace" / "inner" / "t.json").write_text("trace")
    copy_files(tmp_path / "trace", bucket / "profile")
    names = sorted(path.name for path in bucket.iterdir())
    assert names == ["byte_tokenizer.json", "config.json", "profile"]
    assert (bucket / "profile" / "inner" / "t.json").read_text() == "trace"

    log = Log(bucket, first_step=0, steps=9)
    log._board = NoBoard()
    log.write(1, {"loss": 2.0})
    assert not (bucket / "metrics.jsonl").exists()
    log.flush()
    log.write(2, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in (bucket / "metrics.jsonl").read_text().splitlines()] == [1]
    log.close()
    log = Log(bucket, first_step=1, steps=9)  # resumed before the second
    log._board = NoBoard()
    log.write(2, {"loss": 1.5})
    log.close()
    lines = [json.loads(line) for line in (bucket / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 1.5)]


class NoBoard:
    """TensorBoard's writer has a client of its own for buckets."""

    def add_scalar(self, *_):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model as `transformers` writes it."""
    return picture_directory(tmp_path_factory.mktemp("published"))


def uploaded(directory, bucket):
    for file in directory.iterdir():
        if file.is_file():
            write(bucket / file.name, file.read_bytes())
    return bucket


def test_weights_of_hugging_faces_format_are_read_from_a_bucket(published, bucket):
    here, there = open_weights(published), open_weights(str(uploaded(published, bucket)))
    assert here.names == there.names and here.config == there.config
    for name in here.names:
        np.testing.assert_array_equal(there.read(name), here.read(name))
    part = (slice(0, 1), slice(1, 2), slice(3, 9), slice(0, 4))
    name = "layers.0.moe.gate_up"
    np.testing.assert_array_equal(there.read(name, part), here.read(name, part))


def test_from_pretrained_reads_a_bucket(published, bucket):
    model = from_pretrained(uploaded(published, bucket), dtype="float32")
    expected = from_pretrained(published, dtype="float32")
    for mine, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, expected)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_file_cut_short_in_a_bucket_is_named(published, bucket):
    uploaded(published, bucket)
    file = bucket / "model.safetensors"
    write(file, file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="gs://bucket/folder/model.safetensors is truncated"):
        open_weights(bucket)


def test_metas_files_in_a_bucket_are_refused_with_what_to_do(bucket):
    write(bucket / "params.json", b"{}")
    with pytest.raises(ValueError, match="torch maps from a disk: copy the directory, or convert it once"):
        open_weights(bucket)

"""What a run reads and writes may be in a bucket: gs:// paths, against a bucket in memory that stands in for Google's.

What is beneath epath is not tested here: Google's client, and TensorStore, which writes and reads the arrays of a
checkpoint.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from buckets import Bucket, write
from etils import epath

from llama4_jax.atomic import write_atomically
from llama4_jax.data.sources import open_source
from llama4_jax.inputs.tokenizer import ByteTokenizer, load_tokenizer
from llama4_jax.train.loop import copy_files
from llama4_jax.train.metrics import Log

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

    def write(self, *_):
        pass

    def close(self):
        pass

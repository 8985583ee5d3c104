"""Weights may be in a bucket: gs:// paths, against a bucket in memory that stands in for Google's."""

import io

import jax
import numpy as np
import pytest
import torch
from buckets import uploaded, write
from flax import nnx
from make_checkpoints import META, write_meta
from micro_run import picture_directory

from llama4_jax.weights.load import from_pretrained
from llama4_jax.weights.meta_files import read_pth
from llama4_jax.weights.source import open_weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model as `transformers` writes it."""
    return picture_directory(tmp_path_factory.mktemp("published"))


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


def test_weights_of_metas_format_are_read_from_a_bucket(bucket, tmp_path):
    write_meta(META, tmp_path / "meta", 2)
    here, there = open_weights(tmp_path / "meta"), open_weights(uploaded(tmp_path / "meta", bucket))
    assert here.names == there.names and here.config == there.config
    for name in here.names:
        np.testing.assert_array_equal(there.read(name), here.read(name))


def test_a_tensor_that_is_stored_transposed_is_read_from_a_bucket(bucket):
    values = torch.arange(24.0).reshape(4, 6)
    torch.save({"first": values, "w": values.T}, file := io.BytesIO())
    write(bucket / "w.pth", file.getvalue())
    np.testing.assert_array_equal(read_pth(bucket / "w.pth")["w"].map(), values.T)
    write(bucket / "w.pth", file.getvalue()[:-300])
    with pytest.raises(ValueError, match=r"gs://bucket/folder/w.pth cannot be read: it is truncated"):
        read_pth(bucket / "w.pth")

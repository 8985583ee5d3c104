"""Reading what `save_pretrained` writes, and refusing what is damaged, by the name of the file."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import hf
from oracles.cases import MAVERICK
from safetensors.torch import save_file

from llama4_jax.weights.hf_config import model_config
from llama4_jax.weights.safetensors import HFCheckpoint, SafetensorsFile
from llama4_jax.weights.table import from_hf


@pytest.fixture
def single(tmp_path):
    hf.reference(MAVERICK).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    hf.reference(MAVERICK).save_pretrained(tmp_path, shards=3)
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_tensor_is_the_one_that_transformers_saved(layout, request):
    checkpoint = HFCheckpoint(request.getfixturevalue(layout))
    expected = hf.reference(MAVERICK).state_dict
    assert sorted(checkpoint.tensors) == sorted(expected)
    for name, array in expected.items():
        assert checkpoint.tensors[name].shape == array.shape
        assert checkpoint.tensors[name].dtype == np.float32
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_a_directory_of_transformers_loads_through_the_table(sharded):
    checkpoint = HFCheckpoint(sharded)
    loaded = dict(from_hf(model_config(checkpoint.config), checkpoint))
    np.testing.assert_array_equal(
        loaded["embed.embedding"], hf.reference(MAVERICK).state_dict["model.embed_tokens.weight"]
    )


def test_a_tensor_is_a_view_of_the_file_and_cannot_be_written(single):
    array = HFCheckpoint(single).read("model.norm.weight")
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        (torch.float64, np.float64),
        (torch.float16, np.float16),
        (torch.bfloat16, ml_dtypes.bfloat16),
        (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
        (torch.int8, np.int8),
        (torch.int64, np.int64),
    ],
    ids=str,
)
def test_every_number_format_is_read_as_itself(tmp_path, theirs, mine):
    values = torch.tensor([[0.5, -1.5, 2.0], [7.0, -0.0, 12.0]]).to(theirs)
    save_file({"odd": torch.ones(3, dtype=torch.uint8), "x": values, "scalar": values[0, 0].clone()}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    assert file.tensors["x"].dtype == mine
    np.testing.assert_array_equal(file.tensors["x"].map().astype(np.float64), values.to(torch.float64).numpy())
    assert file.tensors["scalar"].map().shape == ()


def test_no_directory_no_config_and_no_weights_are_each_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        HFCheckpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        HFCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no valid JSON"):
        HFCheckpoint(tmp_path)


def test_a_missing_shard_is_named(sharded):
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing shard.*{lost.name}"):
        HFCheckpoint(sharded)


def edit_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_an_index_that_promises_a_tensor_its_shard_lacks_is_an_error(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0].name
    edit_index(sharded, lambda weight_map: weight_map.update({"model.extra.weight": shard}))
    with pytest.raises(ValueError, match=rf"model\.extra\.weight is in {shard}, but it is not"):
        HFCheckpoint(sharded)


def test_a_shard_with_a_tensor_that_the_index_does_not_list_is_an_error(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in no shard, but model-.* holds one"):
        HFCheckpoint(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000, -1], ids="first {} bytes".format)
def test_a_file_cut_short_anywhere_is_an_error_that_names_it(single, keep):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        HFCheckpoint(single)


def test_garbage_is_an_error_that_names_the_file(single):
    path = single / "model.safetensors"
    path.write_bytes((8).to_bytes(8, "little") + b"not json" + path.read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt"):
        HFCheckpoint(single)

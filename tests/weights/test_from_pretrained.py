"""A Hugging Face directory becomes a model that computes what Hugging Face's does."""

import dataclasses
import json
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from oracles import hf, ours
from oracles.cases import BY_NAME, MAVERICK, SCOUT, tokens

import llama4_jax
from llama4_jax.model.config import Precision
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import PRESETS, preset
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.weights.hf_config import model_config, to_hf_config
from llama4_jax.weights.load import load, named_variables, preset_differences
from llama4_jax.weights.source import FileWeights
from llama4_jax.weights.table import InMemory, plan, rows


@pytest.mark.parametrize(("name", "shards"), [("scout", 1), ("scout", 5), ("irregular", 1), ("global", 3)])
def test_logits_are_those_of_hugging_face(name, shards, tmp_path):
    case = BY_NAME[name]
    hf.reference(case).save_pretrained(tmp_path, shards=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if shards > 1 else (tmp_path / "model.safetensors").exists()
    logits = jax.jit(llama4_jax.from_pretrained(tmp_path, dtype="float32"))(tokens(case).astype(np.int32))
    expected = hf.logits(case)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_every_parameter_is_claimed_by_exactly_one_row_of_the_table():
    for name in ("scout", "maverick", "dense_1b"):
        config = dataclasses.replace(preset(name), num_layers=4)
        table = [row.ours for row in rows(config)]
        variables = named_variables(nnx.eval_shape(lambda config=config: Llama4(config, scan_layers=False)))
        assert len(table) == len(set(table)) and set(table) == set(variables)
        for row in rows(config):
            assert variables[row.ours].get_value().shape == row.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_that_of_parameters_and_computation(dtype, tmp_path):
    hf.reference(SCOUT).save_pretrained(tmp_path)
    model = llama4_jax.from_pretrained(tmp_path, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}
    assert model.precision == Precision(params=dtype, compute=dtype, logits="float32")
    source = hf.reference(SCOUT).state_dict["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.embed.embedding[...], jnp.asarray(source).astype(dtype))


def test_on_a_mesh_each_device_holds_its_part_and_the_logits_are_the_same(tmp_path):
    case = dataclasses.replace(MAVERICK, vocab=96)
    hf.reference(case).save_pretrained(tmp_path)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    model = llama4_jax.from_pretrained(tmp_path, mesh=mesh, dtype="float32")
    gate_up = model.decoder.rest[1].moe.gate_up[...]
    assert gate_up.sharding == NamedSharding(mesh, PartitionSpec("expert", None, "fsdp", "tensor"))
    assert {shard.data.size for shard in gate_up.addressable_shards} == {gate_up.size // 8}
    with jax.set_mesh(mesh):
        logits = jax.jit(model)(tokens(case).astype(np.int32))
    expected = hf.logits(case)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_mesh_that_does_not_divide_a_parameter_is_said_before_anything_is_read(tmp_path):
    hf.reference(SCOUT).save_pretrained(tmp_path)  # 97 token ids
    with pytest.raises(ValueError, match=r"embed.embedding: its 'vocab' axis has size 97, which mesh.tensor=2"):
        llama4_jax.from_pretrained(tmp_path, mesh=make_mesh(MeshConfig(data=4, tensor=2)))


def weights_of(case, arrays: dict[str, np.ndarray], source=InMemory) -> FileWeights:
    """These tensors, under Hugging Face's names, as if they were a checkpoint's."""
    config, tensors = ours.config(case), source(arrays)
    return FileWeights(Path("memory"), "hf", config, {}, (tensors,), plan(config, "hf", tensors.shapes()))


def test_the_host_holds_one_tensor_at_a_time():
    earlier = []

    class Watched(FileWeights):
        def read(self, name, part=None):
            assert not any(array() is not None for array in earlier)
            array = super().read(name, part).copy()
            earlier.append(weakref.ref(array))
            return array

    weights = weights_of(SCOUT, hf.reference(SCOUT).state_dict)
    load(Watched(**vars(weights)), precision=Precision(), mesh=None)
    assert len(earlier) == len(rows(ours.config(SCOUT)))


def test_of_a_tensor_on_a_mesh_only_the_parts_of_the_devices_are_read_and_each_once():
    case = dataclasses.replace(MAVERICK, vocab=96)
    reads = []

    class Recorded(FileWeights):
        def read(self, name, part=None):
            reads.append((name, part))
            return super().read(name, part)

    weights = weights_of(case, hf.reference(case).state_dict)
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    load(Recorded(**vars(weights)), precision=Precision(), mesh=mesh)
    parts = [part for name, part in reads if name == "layers.1.moe.down"]
    E, F = case.experts // 2, case.expert_mlp // 2
    assert len(parts) == 4  # copies of a part on the two halves of `data` are read once
    assert {(p[0].start, p[1].start) for p in parts} == {(0, 0), (0, F), (E, 0), (E, F)}


def test_layers_come_one_by_one_as_decoding_wants_them(tmp_path):
    hf.reference(SCOUT).save_pretrained(tmp_path)
    model = llama4_jax.from_pretrained(tmp_path)
    assert model.unscanned() is model and len(model.decoder.rest) == SCOUT.layers


def test_a_run_whose_arrays_are_not_the_models_is_told_which():
    class Other(FileWeights):
        """As an array store might be: not checked against the table."""

        names = ("embed.embedding", "layers.0.extra", *(row.ours for row in rows(ours.config(SCOUT))[1:-1]))

        def shape(self, name):
            return (3,) if name in ("final_norm.scale", "layers.0.extra") else super().shape(name)

    weights = weights_of(SCOUT, hf.reference(SCOUT).state_dict)
    with pytest.raises(ValueError, match=r"3 point\(s\)") as error:
        load(Other(**vars(weights)), precision=Precision(), mesh=None)
    assert "lm_head.kernel got no tensor" in str(error.value)
    assert "no place for layers.0.extra" in str(error.value)
    assert "final_norm.scale has the shape (3,), but the config makes it (64,)" in str(error.value)


def test_config_json_wins_over_the_preset_of_its_sizes_and_the_difference_is_said():
    scout = preset("scout")
    assert preset_differences(scout) == []
    written = to_hf_config(scout) | {"max_position_embeddings": 262_144, "rope_parameters": {"rope_theta": 10_000.0}}
    lines = preset_differences(model_config(written))
    assert lines == [
        "the config differs from the preset 'scout', and wins (config != preset):",
        "  rope_theta: 10000.0 != 500000.0",
        f"  rope_scaling: None != {scout.rope_scaling}",
        "  context_length: 262144 != 10485760",
    ]
    other_pattern = dataclasses.replace(model_config(to_hf_config(scout)), rope_layers=(True,) * 48)
    assert any("rope_layers" in line for line in preset_differences(other_pattern))
    assert preset_differences(ours.config(SCOUT)) == []  # of no preset's sizes


def test_a_difference_from_the_preset_is_printed_when_loading(tmp_path, capsys, monkeypatch):
    hf.reference(SCOUT).save_pretrained(tmp_path)
    like = dataclasses.replace(ours.config(SCOUT), rope_theta=5.0)
    monkeypatch.setitem(PRESETS, "like_scout", like)
    model = llama4_jax.from_pretrained(tmp_path)
    assert model.config.rope_theta == 10_000.0
    assert "the preset 'like_scout', and wins" in (err := capsys.readouterr().err)
    assert "rope_theta: 10000.0 != 5.0" in err


def test_a_path_that_is_not_a_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such directory: {tmp_path / 'nothing'}"):
        llama4_jax.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        llama4_jax.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"no weights|gpt2"):
        llama4_jax.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="precision.params must be float32 or bfloat16, got 'int8'"):
        llama4_jax.from_pretrained(tmp_path, dtype="int8")


def test_importing_the_package_loads_nothing_heavy():
    """Neither jax, which workers that only tokenize must not start, nor, later, what training alone needs."""
    loaded = "sys.exit(' '.join(m for m in {modules} if m in sys.modules) or 0)"
    slow = ["tensorboardX", "grain", "orbax", "tyro"]
    first = "import sys, llama4_jax; " + loaded.format(modules=["jax", *slow])
    then = "import sys, llama4_jax as l; l.generate, l.from_pretrained, l.Llama4, l.ModelConfig; "
    for code in (first, then + loaded.format(modules=slow)):
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_public_surface_fits_a_line():
    names = ["Engine", "from_pretrained", "generate", "Llama4", "ModelConfig", "Processor", "save"]
    assert llama4_jax.__all__ == names
    with pytest.raises(AttributeError, match="module 'llama4_jax' has no attribute 'nothing'"):
        _ = llama4_jax.nothing

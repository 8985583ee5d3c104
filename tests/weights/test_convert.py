"""Weights go from format to format and come back bit for bit, whatever happens on the way."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from make_checkpoints import META, VISION, meta_tensors, write_meta, write_vision
from oracles import hf, meta, ours, pictures
from oracles.cases import MAVERICK, SCOUT, tokens
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4ForConditionalGeneration

import llama4_jax
from llama4_jax.config import RunConfig, to_json
from llama4_jax.data.config import DataConfig
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import preset
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.weights import checkpoint, workplace
from llama4_jax.weights.checkpoint import Checkpoints, named_leaves
from llama4_jax.weights.convert import Done, convert, export
from llama4_jax.weights.load import named_variables
from llama4_jax.weights.orbax_arrays import StoredArray, stored_arrays
from llama4_jax.weights.safetensors import HFCheckpoint, SafetensorsFile, create_safetensors
from llama4_jax.weights.source import open_weights
from llama4_jax.weights.table import InMemory, from_hf


def read_hf(directory: Path) -> dict[str, np.ndarray]:
    """By the safetensors package."""
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same(actual: dict, expected: dict) -> None:
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def run(*arguments, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llama4_jax.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **kwargs)


@pytest.fixture(scope="module")
def scout_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scout") / "hf"
    hf.reference(SCOUT).save_pretrained(directory, shards=3)
    return directory


@pytest.fixture
def source(scout_dir, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(scout_dir, tmp_path / "hf"))


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_to_ours_to_hugging_face_is_bit_exact_and_loads_in_transformers(shards, tmp_path):
    hf.reference(MAVERICK).save_pretrained(tmp_path / "hf", shards=shards)
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    convert(tmp_path / "hf", tmp_path / "run", verify=True)
    export(tmp_path / "run", tmp_path / "out", format="hf", shards=shards, verify=True)
    assert_same(read_hf(tmp_path / "out"), hf.reference(MAVERICK).state_dict)
    model, loading = Llama4ForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens(MAVERICK)), use_cache=False).logits.numpy()
    assert np.abs(logits - hf.logits(MAVERICK)).max() < 1e-5 * np.abs(hf.logits(MAVERICK)).max()
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").read_text() == (
        tmp_path / "hf" / "generation_config.json"
    ).read_text()
    files = {file.name for file in (tmp_path / "out").glob("*.safetensors")}
    if shards == 1:
        assert files == {"model.safetensors"}
    else:
        assert files == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == files
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in hf.reference(MAVERICK).state_dict.values())


@pytest.mark.parametrize(("ranks", "nested"), [(1, False), (2, True), (8, False)])
def test_meta_to_ours_to_meta_is_bit_exact_and_computes_what_metas_code_does(ranks, nested, tmp_path):
    write_meta(META, tmp_path / "meta", ranks, nested=nested)
    convert(tmp_path / "meta", tmp_path / "run", verify=True)
    weights = dict(from_hf(ours.config(META), InMemory(hf.reference(META).state_dict)))
    for path in ("meta", "run"):
        assert_same({name: w.read(name) for w in [open_weights(tmp_path / path)] for name in w.names}, weights)
    if nested:
        model = llama4_jax.from_pretrained(tmp_path / "meta", dtype="float32")
        logits = jax.jit(model)(tokens(META).astype(np.int32))
        assert np.abs(logits - meta.logits(META)).max() < 1e-5 * np.abs(meta.logits(META)).max()
    export(tmp_path / "run", tmp_path / "out", format="meta", shards=ranks, verify=True)
    for rank in range(ranks):
        written = torch.load(tmp_path / "out" / f"consolidated.{rank:02d}.pth", weights_only=True)
        assert_same(
            {name: tensor.numpy() for name, tensor in written.items()},
            {name: tensor.numpy() for name, tensor in meta_tensors(META, rank, ranks).items()},
        )
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert llama4_jax.weights.meta_config.model_config(params) == open_weights(tmp_path / "meta").config


def test_hugging_face_to_ours_to_meta_loads_in_metas_code_and_comes_back(tmp_path):
    hf.reference(META).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "meta", format="meta", shards=1)
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    logits = meta.prefill(meta.build(META, state), tokens(META))
    np.testing.assert_array_equal(logits, meta.logits(META))
    export(tmp_path / "run", tmp_path / "meta8", format="meta", shards=8)
    convert(tmp_path / "meta8", tmp_path / "again")
    ByteTokenizer().save(tmp_path / "again")
    (tmp_path / "again" / "generation_config.json").unlink()
    export(tmp_path / "again", tmp_path / "out", format="hf", shards=1)
    assert_same(read_hf(tmp_path / "out"), hf.reference(META).state_dict)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [256, 97, 98]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["top_p"] == 0.9 and generation["bos_token_id"] == 256


@pytest.mark.parametrize("through_meta", [0, 1, 4])
def test_a_model_with_pictures_keeps_its_encoder_and_projector(through_meta, tmp_path):
    expected = write_vision(tmp_path / "hf", shard_size="300KB", case=META)
    convert(tmp_path / "hf", tmp_path / "run")
    if through_meta:
        export(tmp_path / "run", tmp_path / "meta", format="meta", shards=through_meta)
        if through_meta == 1:
            state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
            meta.build(META, state, vision=json.loads((tmp_path / "meta" / "params.json").read_text())["vision_args"])
        convert(tmp_path / "meta", tmp_path / "again")
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "again").rename(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", format="hf")
    renamed = {name.replace("model.vision_model", "vision_model"): array for name, array in expected.items()}
    assert {array.shape for array in renamed.values()}  # transformers names them as files do
    assert_same(read_hf(tmp_path / "out"), read_hf(tmp_path / "hf"))
    _, loading = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written["vision_config"][key] for key in VISION} == VISION


def test_bfloat16_stays_and_dtype_changes_it(tmp_path):
    hf.reference(MAVERICK).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "half", dtype="bfloat16")
    weights = open_weights(tmp_path / "half")
    assert {weights.dtype(name).name for name in weights.names} == {"bfloat16"}
    export(tmp_path / "half", tmp_path / "out", format="hf")
    expected = {n: a.astype(ml_dtypes.bfloat16) for n, a in hf.reference(MAVERICK).state_dict.items()}
    written = HFCheckpoint(tmp_path / "out")
    assert_same({name: written.read(name) for name in written.tensors}, expected)
    assert written.config["dtype"] == "bfloat16"
    export(tmp_path / "half", tmp_path / "wide", format="hf", dtype="float32")
    assert_same(read_hf(tmp_path / "wide"), {name: array.astype(np.float32) for name, array in expected.items()})


def write_run(directory, config, *, scan=True):
    """A run's directory with a checkpoint of a new model, and the model."""
    model = Llama4(config, scan_layers=scan, seed=3)
    directory.mkdir()
    run_config = RunConfig(
        name="run", model=config, data=DataConfig(seq_len=8, batch_size=1, max_tiles=5), steps=1, scan_layers=scan
    )
    (directory / "config.json").write_text(to_json(run_config))
    checkpoints = Checkpoints(directory)
    arrays = {f"params.{name}": leaf for name, leaf in named_leaves(nnx.state(model)).items()}
    checkpoints.save(7, arrays, {"x": np.zeros(1)}, {"step": 7})
    checkpoints.wait()
    return model


def test_a_trained_run_with_pictures_is_exported_and_computes_the_same(tmp_path):
    config = dataclasses.replace(pictures.config(MAVERICK), moe_layers=None, rope_layers=None, moe_interval=2)
    model = write_run(tmp_path / "run", config)
    assert model.decoder.repeats and model.vision.repeats
    export(tmp_path / "run", tmp_path / "out", format="hf", verify=True)
    theirs = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.image_token_index == pictures.PATCH
    ids, tiles = pictures.ids(MAVERICK), pictures.tiles()
    own = np.concatenate([row[: len(places)] for row, places in zip(tiles, pictures.PLACES, strict=True)])
    with torch.no_grad():
        given = torch.from_numpy(own.transpose(0, 3, 1, 2).copy())
        expected = theirs(torch.from_numpy(ids), pixel_values=given, use_cache=False).logits.numpy()
    logits = jax.jit(lambda ids, tiles: model(ids, images=tiles))(ids.astype(np.int32), tiles)
    np.testing.assert_allclose(logits, expected, atol=2e-6 * np.abs(expected).max())
    cut = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (cut["max_patches"], cut["size"]) == (5, {"height": 24, "width": 24})


@pytest.mark.parametrize("scan", [True, False])
def test_a_trained_run_is_exported_whether_its_layers_are_stacked_or_not(scan, tmp_path):
    config = dataclasses.replace(ours.config(SCOUT), moe_layers=None, rope_layers=None)
    model = write_run(tmp_path / "run", config, scan=scan)
    assert bool(model.decoder.repeats) == scan
    export(tmp_path / "run", tmp_path / "out", format="hf", verify=True)
    ids = tokens(SCOUT)
    theirs = Llama4ForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), use_cache=False).logits.numpy()
    logits = jax.jit(model)(ids.astype(np.int32))
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    loaded, exported = (llama4_jax.from_pretrained(tmp_path / path, dtype="float32") for path in ("run", "out"))
    for name, variable in named_variables(loaded).items():
        np.testing.assert_array_equal(variable[...], named_variables(exported)[name][...], err_msg=name)


def test_stacked_layers_are_stored_in_chunks_that_can_be_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SAVE_ARGS", ocp.SaveArgs(chunk_byte_size=2048))
    checkpoints = Checkpoints(tmp_path)
    stack = np.random.default_rng(0).standard_normal((3, 16, 32), np.float32)
    checkpoints.save(1, {"params.decoder.group.0.x": jax.numpy.asarray(stack)}, {"x": np.zeros(1)}, {"step": 1})
    checkpoints.wait()
    store = stored_arrays(tmp_path / "checkpoints" / "1")["params.decoder.group.0.x"]
    step = StoredArray(store, 2)
    assert np.prod(step.chunk) * 4 <= 2048
    np.testing.assert_array_equal(step.read((slice(1, 9), slice(0, 32))), stack[2, 1:9])


def test_what_was_converted_is_restored_on_any_mesh_straight_into_its_shards(tmp_path):
    case = dataclasses.replace(MAVERICK, vocab=96)
    hf.reference(case).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run")
    expected = open_weights(tmp_path / "hf")
    for axes in ({}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 4, "data": 2}):
        model = llama4_jax.from_pretrained(tmp_path / "run", mesh=make_mesh(MeshConfig(**axes)), dtype="float32")
        gate_up = model.decoder.rest[1].moe.gate_up[...]
        ways = axes.get("fsdp", 1) * axes.get("expert", 1) * axes.get("tensor", 1)
        assert {shard.data.size for shard in gate_up.addressable_shards} == {gate_up.size // ways}
        for name, variable in named_variables(model).items():
            np.testing.assert_array_equal(variable[...], expected.read(name), err_msg=name)


def test_orbax_itself_restores_what_was_converted(scout_dir, tmp_path):
    convert(scout_dir, tmp_path / "run")
    with_orbax = Checkpoints(tmp_path / "run", read_only=True).newest()
    weights = open_weights(scout_dir)
    assert len(with_orbax.model) == len(weights.names)
    np.testing.assert_array_equal(
        with_orbax.model["params.decoder.rest.3.moe.gate_up"], weights.read("layers.3.moe.gate_up")
    )


def test_a_model_that_the_format_cannot_express_is_refused_before_anything_is_written(tmp_path):
    config = dataclasses.replace(ours.config(SCOUT), router_bias=True)
    (tmp_path / "run").mkdir()
    run_config = RunConfig(name="run", model=config, data=DataConfig(seq_len=8, batch_size=1), steps=1)
    (tmp_path / "run" / "config.json").write_text(to_json(run_config))
    checkpoints = Checkpoints(tmp_path / "run")
    model = Llama4(config, scan_layers=False)
    checkpoints.save(1, {f"params.{n}": x for n, x in named_leaves(nnx.state(model)).items()}, {"x": np.zeros(1)}, {})
    checkpoints.wait()
    with pytest.raises(ValueError, match="router_bias must be False"):
        export(tmp_path / "run", tmp_path / "out", format="hf")
    with pytest.raises(ValueError, match=r"Meta's Llama 4 cannot be this model: .*router_bias must be False"):
        export(tmp_path / "run", tmp_path / "out", format="meta")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_ranks_that_do_not_divide_a_tensor_are_refused_before_anything_is_written(scout_dir, tmp_path):
    hf.reference(META).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight: 5 ranks do not divide its axis V of 96"):
        export(tmp_path / "run", tmp_path / "out", format="meta", shards=5)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "run"}


@pytest.mark.parametrize("name", ["up_proj", "q_proj"])
def test_parts_of_one_tensor_in_different_dtypes_are_never_mixed(name, tmp_path):
    hf.reference(META).save_pretrained(tmp_path / "hf")
    where = {"up_proj": "feed_forward.up_proj", "q_proj": "self_attn.q_proj"}[name]

    def narrow(tensors):
        tensors[f"model.layers.0.{where}.weight"] = tensors[f"model.layers.0.{where}.weight"].astype(np.float16)

    edit(tmp_path / "hf" / "model.safetensors", narrow)
    if name == "up_proj":  # beside gate_proj in ours
        with pytest.raises(ValueError, match=r"different dtypes: \['float32', 'float16'\]"):
            convert(tmp_path / "hf", tmp_path / "run")
        return
    convert(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.k\.kernel is float32, but other parts of .*wqkv"):
        export(tmp_path / "run", tmp_path / "out", format="meta")


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions


class Stop(Exception):
    pass


@pytest.mark.parametrize("into", ["run", "hf", "meta"])
def test_an_interrupted_conversion_goes_on_and_does_not_redo_what_is_finished(into, scout_dir, tmp_path, monkeypatch):
    source = scout_dir if into == "run" else tmp_path / "source"
    if into == "meta":
        hf.reference(META).save_pretrained(tmp_path / "hf")
        convert(tmp_path / "hf", source)
    elif into == "hf":
        convert(scout_dir, source)

    def go(out, report=lambda done, total: None) -> Done:
        if into == "run":
            return convert(source, out, report=report)
        return export(source, out, format=into, shards=2, report=report)

    go(tmp_path / "undisturbed")

    def stop_in_the_middle(done, total):
        if done > total / 2:
            raise Stop

    with pytest.raises(Stop):
        go(tmp_path / "out", stop_in_the_middle)
    assert not (tmp_path / "out").exists()
    journal = (tmp_path / "out.unfinished" / "finished.jsonl").read_text().splitlines()[1:]
    prepared = []
    original = workplace.parts_of
    monkeypatch.setattr(workplace, "parts_of", lambda *a: prepared.append(a) or original(*a))
    done = go(tmp_path / "out")
    assert len(journal) > 10 and done.resumed == len(journal) and len(prepared) == done.tensors - len(journal)
    assert not (tmp_path / "out.unfinished").exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def contents(directory: Path) -> dict[str, bytes]:
    """Of a directory's files, but for what tells the time, or where it was made."""
    times = re.compile(rb'"(init|commit)_timestamp_nsecs": \d+')
    return {
        str(path.relative_to(directory)): times.sub(b"", path.read_bytes())
        for path in directory.rglob("*")
        if path.is_file() and path.name != "commit_success.txt"
    }


def test_a_conversion_stopped_while_it_is_put_together_goes_on(scout_dir, tmp_path, monkeypatch):
    convert(scout_dir, tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        patched.setattr(workplace, "copy_companions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(scout_dir, tmp_path / "out")
    assert list((tmp_path / "out.unfinished" / "made").rglob(".zarray"))  # moved there already
    done = convert(scout_dir, tmp_path / "out")
    assert done.resumed == done.tensors
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_conversion_killed_at_any_moment_goes_on_by_the_same_command(tmp_path):
    config = llama4_jax.ModelConfig(
        vocab_size=4096, embed_dim=256, num_layers=16, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=512,
        expert_mlp_dim=512, num_experts=16,
    )  # fmt: skip
    source, out = tmp_path / "hf", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(llama4_jax.weights.hf_config.to_hf_config(config)))
    shapes = {n: row.file_shape(row.hf[0]) for row in llama4_jax.weights.table.rows(config) for n in row.hf[0].names}
    rng = np.random.default_rng(0)
    for name, tensor in create_safetensors(
        source / "model.safetensors", {n: (np.dtype(np.float32), s) for n, s in shapes.items()}
    ).items():
        tensor.map("r+")[...] = rng.standard_normal(shapes[name], np.float32)
    journal, kills = tmp_path / "out.unfinished" / "finished.jsonl", []
    for enough in (2, 40, 120):
        process = subprocess.Popen([sys.executable, "-m", "llama4_jax.cli", "convert", str(source), str(out)])
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and len(journal.read_text().splitlines()) > enough:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        if process.wait() == -signal.SIGKILL:
            kills.append(enough)
            assert not out.exists()
            with pytest.raises(FileNotFoundError, match="no such directory"):
                llama4_jax.from_pretrained(out)
            with pytest.raises(FileNotFoundError, match="neither config.json nor params.json"):
                llama4_jax.from_pretrained(tmp_path / "out.unfinished")
    assert kills
    finished = run("convert", source, out) if not out.exists() else None
    assert finished is None or (finished.returncode == 0 and "from before it was interrupted" in finished.stdout)
    converted, original = open_weights(out), open_weights(source)
    for name in original.names:
        np.testing.assert_array_equal(converted.read(name), original.read(name))


def test_another_conversion_is_not_taken_for_the_interrupted_one(source, tmp_path):
    def stop(done, total):
        if done:
            raise Stop

    with pytest.raises(Stop):
        convert(source, tmp_path / "out", report=stop)
    with pytest.raises(ValueError, match=r"out\.unfinished is of another conversion that was interrupted"):
        convert(source, tmp_path / "out", dtype="bfloat16")
    os.utime(source / "config.json", (1, 1))
    with pytest.raises(ValueError, match=r"out\.unfinished is of another conversion"):
        convert(source, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong. Every error names what it is about, and leaves the source and the destination as they were.


def edit(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def single(case, directory: Path) -> Path:
    hf.reference(case).save_pretrained(directory)
    return directory / "model.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"model.layers.2.extra": np.zeros(3)}), r"unknown: model\.layers\.2\.extra"),
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3)}), r"wrong shape: model\.norm\.weight is \[3\]"),
        (
            lambda t: t.update({"language_model.model.norm.weight": t["model.norm.weight"].copy()}),
            r"the same weights twice, as language_model\.model\.norm\.weight, model\.norm\.weight",
        ),
        (
            lambda t: t.update({"vision_model.class_embedding": np.zeros(3)}),
            r"1 tensors of a vision encoder .* its config describes none",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)}),
            r"lm_head\.weight is float8_e4m3fn, but there is no scale for it: expected lm_head\.weight_scale",
        ),
    ],
    ids=["unknown", "missing", "shape", "doubled", "vision", "unscaled"],
)
def test_a_tensor_that_does_not_belong_is_named_before_anything_is_written(change, said, tmp_path):
    edit(single(MAVERICK, tmp_path / "hf"), change)
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "hf", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_value_that_is_not_finite_is_an_error_that_names_the_tensor(value, dtype, tmp_path):
    def damage(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)
        tensors["model.layers.3.feed_forward.experts.down_proj"][-1, -1, -1] = value

    edit(single(MAVERICK, tmp_path / "hf"), damage)
    with pytest.raises(ValueError, match=r"layers\.3\.moe\.down holds a value that is not finite"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_in_one_line_what_is_wrong(source, tmp_path):
    (tmp_path / "there").mkdir()
    shard = sorted(source.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()

    def said(*arguments) -> str:
        result = run(*arguments)
        assert result.returncode == 2 and result.stdout == "", result
        lines = [line for line in result.stderr.splitlines() if line.startswith("llama4: ")]
        assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
        return lines[0]

    assert "there exists already" in said("convert", source, tmp_path / "there")
    assert "no such directory" in said("convert", tmp_path / "absent", tmp_path / "out")
    assert "has neither config.json nor params.json" in said("inspect", tmp_path / "there")
    assert "is no directory of ours" in said("export", source, tmp_path / "out", "--format", "hf")
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard.name} is truncated" in said("convert", source, tmp_path / "out")
    shard.unlink()
    assert f"missing shard: {source}/model.safetensors.index.json names {shard.name}" in said(
        "convert", source, tmp_path / "out"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "there"}


def test_metas_files_that_are_missing_damaged_or_hostile_are_named(tmp_path):
    directory = write_meta(META, tmp_path / "meta", 2)
    second = directory / "consolidated.01.pth"
    whole = second.read_bytes()

    def said(error, match) -> None:
        with pytest.raises(error, match=match):
            convert(directory, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    for keep in (0, 100, len(whole) // 2, len(whole) - 1000):
        second.write_bytes(whole[:keep])
        said(ValueError, r"consolidated\.01\.pth cannot be read: it is truncated, corrupt")
    second.rename(directory / "consolidated.02.pth")
    said(FileNotFoundError, r"missing shard: consolidated\.01\.pth is not in")

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (directory / "consolidated.02.pth").unlink()
    torch.save({"norm.weight": Hostile()}, second)
    said(ValueError, r"consolidated\.01\.pth cannot be read: .*holds more than tensors")
    assert not (tmp_path / "executed").exists()
    state = dict(torch.load(directory / "consolidated.00.pth", weights_only=False))
    torch.save({**state, "steps": 3}, second)
    said(ValueError, r"steps is a int, expected a tensor")
    renamed = {("w" + k if k == "norm.weight" else k): v for k, v in state.items() if "_extra" not in k}
    torch.save(renamed, second)
    said(ValueError, r"missing: norm\.weight\n  unknown: wnorm\.weight")


def test_a_full_disk_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"no room for .*out: 0\.00 GiB are to be written, and 0\.00 GiB are free"):
        convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from llama4_jax.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("into", ["run", "hf"])
def test_a_disk_that_fills_up_on_the_way_is_an_error_and_the_same_command_goes_on(into, source, tmp_path):
    if into == "run":
        command = ["convert", source, tmp_path / "out"]
    else:
        convert(source, tmp_path / "run")
        command = ["export", tmp_path / "run", tmp_path / "out", "--format", "hf"]
    # no file may be larger than this: writing then fails as it does on a full disk
    limited = [sys.executable, "-c", LIMITED, "20000", *map(str, command)]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "File too large" in result.stderr
    assert not (tmp_path / "out").exists()
    result = run(*command)
    assert result.returncode == 0, result.stderr
    converted, original = open_weights(tmp_path / "out"), open_weights(source)
    for name in original.names:
        np.testing.assert_array_equal(converted.read(name), original.read(name))


def test_a_chunk_that_is_lost_does_not_become_zeros(source, tmp_path):
    convert(source, tmp_path / "out")
    chunks = tmp_path / "out" / "checkpoints" / "0" / "model" / "params.decoder.rest.3.moe.gate_up"
    next(path for path in (chunks / "c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(ValueError, match="all are damaged"):
        llama4_jax.from_pretrained(tmp_path / "out")


def test_a_config_of_ours_that_is_wrong_is_no_damaged_checkpoint(source, tmp_path, capsys):
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["model"]["top_k"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing fields model\.top_k"):
        llama4_jax.from_pretrained(tmp_path / "out")
    assert "damaged" not in capsys.readouterr().err


def test_a_disk_that_returns_other_bytes_is_noticed_when_verifying(scout_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(StoredArray, "read", lambda self, part: np.zeros(0, self.dtype))
    with pytest.raises(OSError, match=r"reads back otherwise than it was written"):
        convert(scout_dir, tmp_path / "out", verify=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_inspect_says_format_config_with_provenance_differences_and_sizes(scout_dir, tmp_path):
    config = json.loads((scout_dir / "config.json").read_text())
    result = run("inspect", scout_dir)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{scout_dir}: Hugging Face\n")
    assert re.search(r"rope_theta +10000\.0 +config\.json: rope_parameters", result.stdout)
    assert re.search(r"attention_chunk +8 +config\.json: ", result.stdout)
    parameters = sum(array.size for array in hf.reference(SCOUT).state_dict.values())
    assert re.search(rf"in all +{parameters:,} +{parameters * 4 / 2**20:,.1f}", result.stdout)
    assert re.search(r"layers\.\*\.moe\.gate_up +8 +4 × 2 × 64 × 24 +float32", result.stdout)
    convert(scout_dir, tmp_path / "run")
    converted = run("inspect", tmp_path / "run", "--tensors")
    assert converted.stdout.startswith(f"{tmp_path}/run: Orbax (ours), checkpoint 0\n")
    assert re.search(r"rope_theta +10000\.0 +config\.json: rope_parameters", converted.stdout)
    assert "layers.7.moe.gate_up" in converted.stdout
    assert config["model_type"] == "llama4_text"


def test_convert_and_export_work_from_the_command_line_without_torch(scout_dir, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run("convert", scout_dir, tmp_path / "run", "--verify", env=environment)
    assert result.returncode == 0, result.stderr
    assert re.search(r"run: \d+ tensors, [\d.]+ GiB, in [\d.]+ s", result.stdout)
    result = run("export", tmp_path / "run", tmp_path / "out", "--format", "hf", "--shards", "2", env=environment)
    assert result.returncode == 0, result.stderr
    assert_same(read_hf(tmp_path / "out"), hf.reference(SCOUT).state_dict)
    result = run("export", tmp_path / "run", tmp_path / "meta", "--format", "meta", env=environment)
    assert result.returncode == 2
    assert "rope_scaling must have a low_freq_factor of 1 and an original_context of 8192" in result.stderr


def test_a_config_that_differs_from_the_preset_of_its_sizes_is_said_while_it_is_converted(tmp_path):
    config = dataclasses.replace(preset("tiny"), router_bias=True, rope_theta=1e4)
    directory, said = tmp_path / "hf", []
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(llama4_jax.weights.hf_config.to_hf_config(config)))
    shapes = {n: row.file_shape(row.hf[0]) for row in llama4_jax.weights.table.rows(config) for n in row.hf[0].names}
    create_safetensors(directory / "model.safetensors", {n: (np.dtype(np.float32), s) for n, s in shapes.items()})
    convert(directory, tmp_path / "run", say=said.append)
    assert said[0] == "the config differs from the preset 'tiny', and wins (config != preset):"
    assert "  rope_theta: 10000.0 != 500000.0" in said and "  router_bias: True != False" in said


def test_metas_files_without_torch_say_what_to_install(tmp_path):
    directory = write_meta(META, tmp_path / "meta", 1)
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    result = run("inspect", directory, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2 and "need torch: pip install 'llama4-jax[convert]'" in result.stderr


def test_a_safetensors_file_of_ours_is_one_to_the_package(tmp_path):
    dtypes = {"a": np.float32, "b": ml_dtypes.bfloat16, "c": ml_dtypes.float8_e4m3fn, "d": np.int64}
    file = tmp_path / "x.safetensors"
    made = create_safetensors(file, {name: (np.dtype(dtype), (3, 5)) for name, dtype in dtypes.items()})
    for tensor in made.values():
        tensor.map("r+")[...] = np.arange(15).reshape(3, 5).astype(tensor.dtype)
    from safetensors.torch import load_file as load_torch

    for name, tensor in load_torch(file).items():
        np.testing.assert_array_equal(tensor.float().numpy(), np.arange(15).reshape(3, 5))
        assert SafetensorsFile(file).tensors[name].offset % tensor.element_size() == 0

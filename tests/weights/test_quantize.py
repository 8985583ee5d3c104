"""`llama4 quantize` streams any directory into one of few bits, which loads as the model quantized in memory."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from make_checkpoints import META
from make_quantized import quantized_hf, quantized_meta
from micro_run import PICTURES
from oracles import hf
from oracles.cases import MAVERICK, tokens

import llama4_jax
from llama4_jax import cli
from llama4_jax.config import RunConfig, to_json
from llama4_jax.data.config import DataConfig
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.model.llama4 import Llama4
from llama4_jax.ops.quantization import Scheme, unpack_int4
from llama4_jax.ops.quantization import quantize as quantize_array
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.weights import quantize as module
from llama4_jax.weights import workplace
from llama4_jax.weights.checkpoint import Checkpoints, named_leaves
from llama4_jax.weights.convert import convert, export
from llama4_jax.weights.inspect import describe
from llama4_jax.weights.load import initial_weights, named_variables
from llama4_jax.weights.quantize import quantize
from llama4_jax.weights.source import open_weights

CASE = dataclasses.replace(MAVERICK, vocab=96, layers=2, nope_interval=2)  # 64 wide, 48 and 24 in feed-forwards
INT8, INT4, FP8 = Scheme("int8"), Scheme("int4", 8), Scheme("fp8")


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hf") / "hf"
    hf.reference(CASE).save_pretrained(directory, shards=2)
    ByteTokenizer().save(directory)
    return directory


@pytest.fixture(scope="module")
def run_dir(hf_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "run"
    convert(hf_dir, directory)
    return directory


@pytest.mark.parametrize("scheme", [INT8, INT4, FP8, Scheme("int4")], ids=str)
@pytest.mark.parametrize("part_bytes", [2048, workplace.PART_BYTES])
def test_what_is_stored_is_what_is_quantized_in_memory(scheme, part_bytes, hf_dir, tmp_path, monkeypatch):
    """However small the parts are in which it is read."""
    monkeypatch.setattr(module, "PART_BYTES", part_bytes)
    quantize(hf_dir, tmp_path / "q", scheme, verify=True)
    before, after = open_weights(hf_dir), open_weights(tmp_path / "q")
    wheres = {"gate_up": {"start": 2}, "down": {"start": 1}, "o.kernel": {"num_contract": 2}}
    count = 0
    for name in before.names:
        w, stored = before.read(name), after.read(name)
        if name + "_scale" not in after.names:
            np.testing.assert_array_equal(stored, w)
            continue
        where = next((where for end, where in wheres.items() if name.endswith("." + end)), {})
        where = {"start": 0, "num_contract": 1, **where}
        expected = quantize_array(w, scheme, **where)
        if scheme.weights == "int4":
            stored = unpack_int4(stored, where["start"] + where["num_contract"] - 1)
        np.testing.assert_array_equal(stored.astype(np.float32), expected.values.astype(np.float32), err_msg=name)
        np.testing.assert_array_equal(after.read(name + "_scale"), expected.scale)
        count += 1
    assert count == sum(4 + (4 if spec.moe else 2) for spec in before.config.layers)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization"] == {
        "weights": scheme.weights,
        "group": scheme.group,
    }
    assert (tmp_path / "q" / "byte_tokenizer.json").read_bytes() == (hf_dir / "byte_tokenizer.json").read_bytes()


@pytest.mark.parametrize("scheme", [INT8, INT4, FP8], ids=str)
def test_it_loads_with_nothing_dequantized_and_is_as_near_to_the_reference_as_its_format(scheme, hf_dir, tmp_path):
    quantize(hf_dir, tmp_path / "q", scheme, dtype="bfloat16")  # of a Hugging Face directory directly
    model = llama4_jax.from_pretrained(tmp_path / "q", dtype="float32", activations="float")
    layer = named_variables(model)
    assert layer["layers.0.attention.q.kernel"].get_value().dtype == scheme.number.dtype
    assert layer["layers.1.moe.gate_up"].get_value().dtype == scheme.number.dtype
    logits = jax.jit(lambda m, t: m(t))(model, tokens(CASE).astype(np.int32))
    reference = hf.logits(CASE)
    error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
    least, most = {"int8": (0.01, 0.017), "fp8": (0.05, 0.085), "int4": (0.13, 0.2)}[scheme.weights]
    assert least < error < most  # measured 0.013, 0.069 and 0.165


@pytest.mark.parametrize("published", ["compressed-tensors", "meta fp8"])
def test_published_weights_of_few_bits_load_as_they_are(published, tmp_path):
    """Meta's fp8 of two ranks has two scales an output of `down`, and its last layer in full."""
    source, case = tmp_path / "source", CASE if published == "compressed-tensors" else META
    if case is CASE:
        quantized_hf(source, kind=published, case=case)
    else:
        quantized_meta(source, 2, "fp8")
    convert(source, tmp_path / "run", keep_quantized=True)
    how = {"dtype": "float32", "activations": "float"}
    kept = llama4_jax.from_pretrained(source, keep_quantized=True, **how)
    converted = llama4_jax.from_pretrained(tmp_path / "run", **how)
    for ours, theirs in zip(*(named_variables(m).items() for m in (kept, converted)), strict=True):
        assert ours[0] == theirs[0] and ours[1].get_value().dtype == theirs[1].get_value().dtype
        np.testing.assert_array_equal(*(np.asarray(v.get_value(), np.float32) for _, v in (ours, theirs)))
    down, scale = (named_variables(kept)[f"layers.1.moe.down{end}"].get_value() for end in ("", "_scale"))
    assert down.dtype == jax.numpy.float8_e4m3fn and scale.shape[1] == (1 if case is CASE else 2)
    plain = llama4_jax.from_pretrained(source, dtype="float32")  # dequantized, to bfloat16
    logits, expected = (jax.jit(lambda m, t: m(t))(m, tokens(case).astype(np.int32)) for m in (kept, plain))
    assert np.linalg.norm(logits - expected) < 0.01 * np.linalg.norm(expected)


def test_on_a_mesh_each_device_reads_its_part_of_values_and_scales(run_dir, tmp_path):
    quantize(run_dir, tmp_path / "q", Scheme("int4", 4))
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    whole, parts = (llama4_jax.from_pretrained(tmp_path / "q", mesh=m) for m in (None, mesh))
    for a, b in zip(named_variables(whole).values(), named_variables(parts).values(), strict=True):
        assert a.get_value().dtype == b.get_value().dtype
        np.testing.assert_array_equal(np.asarray(a.get_value(), np.float32), np.asarray(b.get_value(), np.float32))
    gate_up = named_variables(parts)["layers.1.moe.gate_up"].get_value()
    assert {shard.data.size for shard in gate_up.addressable_shards} == {gate_up.size // 4}


def trained_run(directory: Path) -> Path:
    """A run of `train.py` whose checkpoint stacks the layers that repeat."""
    config = dataclasses.replace(PICTURES, router_bias=True, num_layers=4)
    run = RunConfig(name="run", model=config, data=DataConfig(seq_len=8, batch_size=1, max_tiles=5), steps=1)
    directory.mkdir()
    (directory / "config.json").write_text(to_json(run))
    ByteTokenizer().save(directory)
    abstract, rng = nnx.state(nnx.eval_shape(lambda: Llama4(config, scan_layers=True))), np.random.default_rng(0)
    arrays = {f"params.{n}": rng.normal(size=x.shape).astype(np.float32) for n, x in named_leaves(abstract).items()}
    checkpoints = Checkpoints(directory)
    checkpoints.save(7, jax.tree.map(jax.numpy.asarray, arrays), {"x": np.zeros(1)}, {"step": 7})
    checkpoints.wait()
    return directory


def test_a_run_that_was_trained_keeps_what_is_no_matrix_and_how_it_cuts_pictures(tmp_path):
    quantize(trained_run(tmp_path / "run"), tmp_path / "q", INT8, dtype="bfloat16")
    before, after = open_weights(tmp_path / "run"), open_weights(tmp_path / "q")
    assert set(before.names) <= set(after.names) and after.shape("layers.3.attention.q.kernel") == (32, 4, 8)
    assert after.dtype("layers.0.moe.bias") == np.float32 and after.dtype("embed.embedding") == ml_dtypes.bfloat16
    assert after.dtype("vision.layers.0.attention.q.kernel") == ml_dtypes.bfloat16
    assert llama4_jax.Processor.from_pretrained(tmp_path / "q").pictures.max_tiles == 5
    model = llama4_jax.from_pretrained(tmp_path / "q", dtype="float32")
    assert model.vision.rest[0].attention.q.kernel_scale is None
    assert model.decoder.rest[0].attention.q.kernel[...].dtype == np.int8
    np.testing.assert_array_equal(model.decoder.rest[2].moe.bias[...], before.read("layers.2.moe.bias"))


def test_an_interrupted_quantization_goes_on_and_ends_the_same(hf_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(workplace, "_SEAL_BYTES", 2**12)
    expected = quantize(hf_dir, tmp_path / "undisturbed", INT4).done

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(hf_dir, tmp_path / "q", INT4, report=stop)
    assert not (tmp_path / "q").exists()
    with pytest.raises(ValueError, match="q.unfinished is of another conversion that was interrupted"):
        quantize(hf_dir, tmp_path / "q", INT8)
    totals = []
    made = quantize(hf_dir, tmp_path / "q", INT4, report=lambda done, total: totals.append((done, total)))
    assert 0 < made.done.resumed < made.done.tensors == expected.tensors
    assert totals[-1] == (expected.bytes, expected.bytes)  # scales and half bytes are counted
    one, other = (open_weights(tmp_path / name) for name in ("undisturbed", "q"))
    assert one.names == other.names
    for name in one.names:
        np.testing.assert_array_equal(one.read(name), other.read(name))


def test_the_command_lists_every_tensor_with_what_it_became(hf_dir, tmp_path, capsys):
    assert cli.main(["quantize", str(hf_dir), str(tmp_path / "q"), "--weights", "int4", "--group", "8"]) == 0
    text = capsys.readouterr().out
    for name in open_weights(hf_dir).names:
        [line] = [x for x in text.splitlines() if x.startswith(re.sub(r"layers\.\d+", "layers.*", name) + " ")]
        matrix = name.startswith("layers.") and "norm" not in name and "router" not in name
        assert ("int4, groups of 8" in line) == matrix and ("float32, not quantized" in line) != matrix, line
    files = [file for file in (tmp_path / "q" / "checkpoints").rglob("*") if file.is_file() and file.name[0].isdigit()]
    stored = sum(file.stat().st_size for file in files)
    in_all = float(text.splitlines()[-2].split()[-1])
    assert abs(stored / 2**20 - in_all) < 0.06 and "tensors" in text.splitlines()[-1]
    assert cli.main(["inspect", str(tmp_path / "q")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"layers\.\*\.moe\.gate_up +1 +8 × 2 × 64 × 24 +int4 +24,576 +0\.0", shown)
    assert re.search(r"layers\.\*\.moe\.gate_up_scale +1 +8 × 2 × 8 × 24 +bfloat16 +0\.0", shown)
    before = describe(hf_dir).splitlines()[-1].split()[2]
    assert shown.splitlines()[-1].split()[2] == before  # as many parameters


def test_what_cannot_be_quantized_says_so_before_anything_is_written(hf_dir, run_dir, tmp_path, capsys):
    def says(*arguments: str) -> str:
        assert cli.main(["quantize", *map(str, arguments)]) == 2
        assert not (tmp_path / "no").exists() and not (tmp_path / "no.unfinished").exists()
        return capsys.readouterr().err

    error = says(hf_dir, tmp_path / "no", "--weights", "int4")
    assert "layers.0.attention.q.kernel has 64 inputs, which groups of 128 do not divide" in error
    error = says(hf_dir, tmp_path / "no", "--weights", "int4", "--group", "64")
    assert "layers.0.mlp.down.kernel has 48 inputs" in error and "such as 16, 8" in error
    quantize(run_dir, tmp_path / "q", FP8)
    error = says(tmp_path / "q", tmp_path / "no", "--weights", "int8")
    assert "q is quantized already: 14 tensors, such as layers.0.attention.q.kernel. Quantize what it was" in error
    assert "q exists already: choose another destination" in says(run_dir, tmp_path / "q", "--weights", "int8")
    assert "no such directory" in says(tmp_path / "nothing", tmp_path / "no", "--weights", "int8")


def test_quantized_weights_are_not_trained_nor_exported(run_dir, tmp_path):
    quantize(run_dir, tmp_path / "q", FP8)
    with pytest.raises(ValueError, match=r"q is quantized \(layers.0.attention.q.kernel …\), and quantized weights do"):
        initial_weights(tmp_path / "q", open_weights(run_dir).config, {})
    with pytest.raises(ValueError, match="14 quantized tensors"):
        export(tmp_path / "q", tmp_path / "out", format="hf")


def test_values_without_their_scales_are_not_taken_for_weights(run_dir, tmp_path):
    quantize(run_dir, tmp_path / "q", INT8)
    store = tmp_path / "q" / "checkpoints" / "0" / "model"
    metadata = json.loads((store / "_METADATA").read_text())
    key = next(
        key for key in metadata["tree_metadata"] if "layers.0" not in key and "0.attention.q.kernel_scale" in key
    )
    del metadata["tree_metadata"][key]
    (store / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"layers.0.attention.q.kernel is int8, but there are no scales for it"):
        llama4_jax.from_pretrained(tmp_path / "q")
    with pytest.raises(ValueError, match="activations must be one of auto, float, int8, got 'fp8'"):
        llama4_jax.from_pretrained(run_dir, activations="fp8")

"""`llama4 plan` of few bits: quantized weights and caches by category, and training in fp8."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import pytest
from flax import nnx

from llama4_jax import plan
from llama4_jax.cli import main
from llama4_jax.mesh_search import Work, _weights, estimate
from llama4_jax.model.config import Precision
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import preset
from llama4_jax.model.quantized import quantized
from llama4_jax.ops.quantization import Scheme, is_quantized_dtype
from llama4_jax.sharding import MeshConfig
from llama4_jax.sharding.chips import topology

ONE = MeshConfig(data=1)


def work(name: str, *rest: str, **options) -> Work:
    options = {"topology": "h100:1", "step": "decode", "batch": 1, "context": 8192, **options}
    return plan.work_of(plan.PlanOptions(name=name, **options), list(rest))


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8"), Scheme("fp8")], ids=str)
def test_weights_by_category_are_those_of_the_model_itself(scheme):
    model = dataclasses.replace(preset("tiny"), num_layers=4)
    precision = Precision(params="bfloat16", compute="bfloat16")
    built = nnx.eval_shape(lambda: quantized(Llama4(model, precision=precision, scan_layers=False), scheme))
    counted = {"values": 0.0, "scales": 0.0, "kept": 0.0}
    for path, variable in nnx.to_flat_state(nnx.state(built, nnx.Param)):
        array = variable.get_value()
        scale = str(path[-1]).endswith("_scale")
        kind = "scales" if scale else "values" if is_quantized_dtype(array.dtype) else "kept"
        counted[kind] += math.prod(array.shape) * jax.dtypes.itemsize_bits(array.dtype) / 8
    served = work("tiny", "--model.num-layers", "4", weights=scheme.weights, group=scheme.group, context=256)
    assert served.weights == scheme
    values, scales, kept = _weights(served, ONE).values()
    assert {"values": values, "scales": scales, "kept": kept} == counted
    # Each chip of four has its part; attention is whole on each of `expert`.
    parts = _weights(served, MeshConfig(data=1, fsdp=2, expert=2))
    assert counted["values"] / 4 < parts[f"values, {scheme.weights}"] < counted["values"] / 2


def test_scout_in_int4_fits_one_h100_with_its_cache_and_maverick_in_fp8_a_host_of_eight(capsys, tmp_path):
    file = tmp_path / "plan.json"
    serve = ["--step", "decode", "--context", "131072", "--json", str(file)]
    assert main(["plan", "scout", "--topology", "h100:1", "--batch", "1", "--weights", "int4", *serve]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("values, int4", "scales", "kept in bfloat16", "cache", "fits"))
    scout = json.loads(file.read_text())
    cache = scout["arguments"].pop("cache")
    assert sum(scout["arguments"].values()) <= 60e9 and "weights of 58.6 GB in all" in out
    assert cache == 2 * 8 * 128 * 2 * (12 * 131072 + 36 * 8192)  # global layers keep all, the others a chunk
    assert main(["plan", "scout", "--topology", "h100:1", "--batch", "1", *serve]) == 1  # in bfloat16 it does not
    assert main(["plan", "maverick", "--topology", "h100:8", "--batch", "8", "--weights", "fp8", *serve]) == 0
    assert json.loads(file.read_text())["bytes"] < 80e9


def test_a_cache_of_int8_is_half_as_large_but_for_its_scales():
    where = topology("h100:1")
    cache = {kind: estimate(work("scout", weights="int4", cache=kind), ONE, where).arguments["cache"]
             for kind in (None, "int8")}  # fmt: skip
    assert cache["int8"] == cache[None] / 2 * (1 + 4 / 128)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_a_quantized_step_is_compiled_for_tpus_as_it_runs(capsys, tmp_path):
    file = tmp_path / "plan.json"
    mesh = ["--mesh.data", "1", "--mesh.expert", "2", "--mesh.tensor", "2"]
    small = ["--model.num-layers", "2", "--context", "256", "--batch", "4", "--step", "decode"]
    few = ["--weights", "int4", "--group", "32", "--cache", "int8"]
    assert main(["plan", "tiny", "--topology", "v5e:2x2", *mesh, *small, *few, "--json", str(file)]) == 0
    arguments = json.loads(file.read_text())["arguments"]
    served = work("tiny", "--model.num-layers", "2", weights="int4", group=32, cache="int8", batch=4, context=256)
    whole = estimate(served, ONE, topology("h100:1")).arguments
    split = estimate(served, MeshConfig(data=1, expert=2, tensor=2), topology("h100:4")).arguments
    assert arguments["values, int4"] == split["values, int4"]
    assert arguments["cache"] == whole["cache"] / 4 + 4 * 4  # and each row's length
    assert "weights of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "train", "--weights", "int4"], "--weights int4 is for serving.*--precision.matmul fp8"),
        (["--step", "train", "--cache", "int8"], "--cache int8 is for serving"),
        (["--step", "decode", "--group", "64"], "--group 64 is of quantized weights: add --weights"),
        (["--step", "decode", "--weights", "int4", "--group", "100"], "groups of 100 do not divide"),
    ],
)
def test_few_bits_that_cannot_be_are_refused_in_words(capsys, arguments, words):
    assert main(["plan", "scout", "--topology", "h100:8", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("llama4: ")
    assert re.search(words, said), said


def test_training_in_fp8_saves_time_only_on_chips_that_have_units_for_it():
    mesh = MeshConfig(data=2, fsdp=64)
    seconds = {}
    for matmul in ("default", "fp8", "fp8_block"):
        train = work("scout", "--precision.matmul", matmul, step="train", batch=128)
        for name in ("h100:16x8", "v5p:4x4x8", "tpu7x:4x4x4"):
            made = estimate(train, mesh, topology(name))
            seconds[matmul, name] = made.compute_seconds
            said = any("saves memory there, not time" in line for line in made.assumptions)
            assert said == (matmul == "fp8" and name.startswith("v5p"))
    for name, gain in (("h100:16x8", 1.5), ("tpu7x:4x4x4", 1.5), ("v5p:4x4x8", 1)):
        assert seconds["default", name] / seconds["fp8", name] == pytest.approx(gain, abs=0.4 if gain > 1 else 1e-6)
        assert seconds["fp8_block", name] == seconds["default", name]  # which imitates it only

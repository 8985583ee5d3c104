"""`llama4 parity` of a quantized run: what rounding its weights does is reported, what is wrong is a difference."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from make_quantized import EXPERTS, quantized_hf, quantized_meta
from oracles import hf
from oracles.cases import SCOUT
from safetensors.torch import load_file, save_file

import llama4_jax
from llama4_jax.cli import main
from llama4_jax.model import moe as moe_module
from llama4_jax.ops.quantization import Scheme
from llama4_jax.weights.convert import convert
from llama4_jax.weights.parity import ParityOptions, Report, run
from llama4_jax.weights.quantize import quantize

TWO = dataclasses.replace(SCOUT, name="two", layers=2)
ROUNDING = 1.5e-6  # as in test_parity_tool.py


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A model as published; float8 experts made of it, as published; and as we keep them."""
    made = tmp_path_factory.mktemp("quantized")
    hf.reference(TWO).save_pretrained(made / "parent")
    quantized_hf(made / "published", kind="compressed-tensors", case=TWO)
    convert(made / "published", made / "run", keep_quantized=True)
    return made


@pytest.fixture(scope="module")
def beside(directories) -> Report:
    return run(ParityOptions(path=directories / "parent", against=directories / "run", decode=4))


def broken(directories, to, change):
    """A kept directory of the published one, whose tensors `change` has been at."""
    quantized_hf(to / "published", kind="compressed-tensors", case=TWO)
    tensors = load_file(to / "published" / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "published" / "model.safetensors")
    convert(to / "published", to / "run", keep_quantized=True)
    return run(ParityOptions(path=directories / "parent", against=to / "run", decode=0))


def test_a_quantized_run_beside_its_parent_is_not_called_different(beside):
    assert beside.passed and beside.divergence is None and beside.quantized == "fp8"
    text = beside.text()
    assert "QUANTIZED, and otherwise the same: the candidate's weights are fp8." in text
    assert "4 matrices are the reference's, rounded: off by at most 0.5" in text and "DIFFERENT" not in text
    for layer in beside.layers:
        assert 1e-3 < layer.alone.max < 0.1  # three bits of mantissa
        assert layer.own.max < ROUNDING and layer.decode.max < ROUNDING
        assert layer.rounding.tensors == 2 and 0.4 < layer.rounding.steps < 0.6 and layer.rounding.others == []
    assert beside.logits.difference.max > 1e-3


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 8)], ids=str)
def test_what_llama4_quantize_makes_is_its_source_rounded(scheme, directories, tmp_path):
    quantize(directories / "parent", tmp_path / "run", scheme)
    report = run(ParityOptions(path=directories / "parent", against=tmp_path / "run", reference="ours", decode=0))
    assert report.passed and report.quantized == str(scheme)
    assert report.tolerance == (5e-2 if scheme.weights == "int8" else 1e-5)  # a CPU rounds what int8 multiplies
    for layer in report.layers:
        assert layer.rounding.tensors == 8 and 0.4 < layer.rounding.steps < 0.51  # q, k, v, o, gate_up and down twice
        assert layer.own.max < (3e-2 if scheme.weights == "int8" else ROUNDING)
    assert f"QUANTIZED, and otherwise the same: the candidate's weights are {scheme}." in report.text()


def test_top1_kl_and_perplexity_by_position_are_those_of_the_two_models_logits(beside, directories):
    ids = np.random.default_rng(0).integers(0, TWO.vocab, (2, 64))
    right = hf.reference(TWO).logits(ids).astype(np.float64)
    ours = np.asarray(llama4_jax.from_pretrained(directories / "run", dtype="float32")(jnp.asarray(ids, jnp.int32)))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (right, ours.astype(np.float64)))
    logits = beside.logits
    np.testing.assert_allclose(logits.kl_by_position, (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(0), rtol=1e-2)
    same = (right.argmax(-1) == ours.argmax(-1)).mean(0)
    assert logits.top1_by_position == same.tolist() and logits.top1 == same.mean() < 1
    nats = [-np.take_along_axis(log[:, :-1], ids[:, 1:, None], -1)[..., 0] for log in (log_q, log_p)]
    np.testing.assert_allclose(logits.loss_by_position, np.stack([n.mean(0) for n in nats], axis=1), rtol=1e-5)
    np.testing.assert_allclose(logits.perplexity, [np.exp(n.mean()) for n in nats], rtol=1e-5)
    spans = logits.spans()
    assert [span.positions for span in spans] == [(first, first + 7) for first in range(0, 64, 8)]
    assert spans[5].top1 == pytest.approx(same[40:48].mean())
    assert spans[5].kl == pytest.approx(np.mean(logits.kl_by_position[40:48]))
    np.testing.assert_allclose(spans[7].perplexity, [np.exp(n[:, 56:].mean()) for n in nats], rtol=1e-5)


def test_spans_are_no_shorter_than_a_position(beside):
    last = {name: getattr(beside.logits, name)[-3:] for name in ("kl_by_position", "top1_by_position")}
    few = dataclasses.replace(beside.logits, **last, loss_by_position=beside.logits.loss_by_position[-2:])
    spans = few.spans()
    assert [span.positions for span in spans] == [(0, 0), (1, 1), (2, 2)]
    assert math.isnan(spans[2].perplexity[0]) and not math.isnan(spans[1].perplexity[0])  # the last predicts nothing


def test_the_order_of_the_directories_makes_no_difference(directories, tmp_path, capsys):
    out = tmp_path / "r.json"
    arguments = ["--against", str(directories / "parent"), "--decode", "0", "--json", str(out)]
    assert main(["parity", str(directories / "run"), *arguments]) == 0
    text, read = capsys.readouterr().out, json.loads(out.read_text())
    assert "reference  transformers" in text and "candidate  ours in float32 on weights of fp8" in text
    assert read["passed"] and read["quantized"] == "fp8" and len(read["logits"]["spans"]) == 8
    assert read["layers"][1]["own"]["max"] < ROUNDING < read["layers"][1]["alone"]["max"]
    assert len(read["logits"]["perplexity"]) == 2 and read["logits"]["spans"][7]["positions"] == [56, 63]
    assert "positions" in text and "perplexity" in text and "56–63" in text


def test_a_quantized_run_alone_is_held_against_its_own_weights_dequantized(directories):
    report = run(ParityOptions(path=directories / "run", decode=4))
    assert report.passed and report.quantized is None and "SAME within 1e-05" in report.text()
    assert "weights of fp8, dequantized" in report.reference and report.logits.difference.max < ROUNDING


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_metas_quantized_experts_of_two_ranks_compute_what_their_weights_say(kind, tmp_path):
    """In fp8 their down matrices have two groups, the ranks', and the last layer of experts is not quantized."""
    quantized_meta(tmp_path / "meta", 2, kind, 4)
    convert(tmp_path / "meta", tmp_path / "run", keep_quantized=True)
    report = run(ParityOptions(path=tmp_path / "run", decode=0, tokens=24))
    assert report.passed and max(layer.alone.max for layer in report.layers) < ROUNDING
    assert f"weights of {kind}" in report.candidate


def test_the_published_directory_and_what_is_kept_of_it_differ_by_bfloat16(directories):
    report = run(ParityOptions(path=directories / "published", against=directories / "run", reference="ours", decode=0))
    assert report.passed and all(layer.rounding.steps < 0.07 for layer in report.layers)


def test_weights_that_are_not_the_parents_rounded_are_named(directories, tmp_path):
    def swap(tensors):
        one, other = (EXPERTS.format(1) + f"{e}.down_proj.weight" for e in (2, 3))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    report = broken(directories, tmp_path, swap)
    assert not report.passed and report.divergence.where.startswith("the weights of layer 1 (")
    assert report.layers[1].rounding.worst == "layers.1.moe.down" and report.layers[1].rounding.steps > 10
    assert all(layer.own.max < ROUNDING for layer in report.layers)
    for words in (
        "DIFFERENT, first in the weights of layer 1",
        "quantized, and not from the reference's: layers.1.moe.",
    ):
        assert words in report.text()


def test_a_tensor_that_is_not_quantized_and_differs_is_named(directories, tmp_path):
    def change(tensors):
        tensors["model.layers.0.feed_forward.router.weight"][1] *= 1.5

    report = broken(directories, tmp_path, change)
    assert not report.passed and "the weights differ: layers.0.moe.router.kernel" in report.text()


def test_products_that_forget_the_scales_are_called_wrong(directories, monkeypatch):
    right = moe_module.quantized_experts

    def forgetful(x, expert, gate, gate_up, down, **options):
        return right(x, expert, gate, gate_up, down._replace(scale=down.scale * 2), **options)

    monkeypatch.setattr(moe_module, "quantized_experts", forgetful)
    report = run(ParityOptions(path=directories / "parent", against=directories / "run", decode=0))
    assert not report.passed and report.failures[0].startswith("layer 0 on its own weights: ")
    assert report.divergence.layer == 0 and report.divergence.cause.stage == "feed-forward output"
    assert "unknown: no single change of the published formula gives the output of ours" in report.text()


def test_gradients_of_quantized_weights_are_refused(directories):
    with pytest.raises(ValueError, match=r"--grads has nothing to compare with: .*run is quantized"):
        run(ParityOptions(path=directories / "parent", against=directories / "run", grads=True))

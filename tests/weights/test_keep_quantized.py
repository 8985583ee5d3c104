"""`llama4 convert --keep-quantized`: published quantized checkpoints keep values bit for bit, and their scales."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from make_checkpoints import META
from make_quantized import EXPERTS, MOE_LAYERS, quantized_hf, quantized_meta
from oracles import hf
from oracles.cases import MAVERICK
from safetensors.numpy import save_file
from safetensors.torch import load_file

from llama4_jax.cli import main
from llama4_jax.ops.quantization import unpack_int4
from llama4_jax.weights.convert import convert, export
from llama4_jax.weights.dequantize import dequantized
from llama4_jax.weights.safetensors import SafetensorsFile
from llama4_jax.weights.source import Weights, open_weights
from llama4_jax.weights.table import rows

HALVES = {"w1": (slice(None), 0), "w3": (slice(None), 1), "w2": (...,)}  # of ours, that Meta's modules are
WIDTH = MAVERICK.expert_mlp


def products(weights: Weights) -> dict[str, np.ndarray]:
    """values · scales of the quantized tensors, in float32, by our names."""
    table = {row.ours: row for row in rows(weights.config)}
    names = [name for name in weights.names if name + "_scale" in weights.names]
    return {name: dequantized(table[name], weights) for name in names}


def change_file(directory, change) -> None:
    """Has `change` at the tensors of a Hugging Face directory."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.map().copy() for name, tensor in SafetensorsFile(file).tensors.items()}
    change(tensors)
    save_file(tensors, file)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face


@pytest.mark.parametrize("kind", ["compressed-tensors", "fbgemm"])
def test_float8_experts_keep_their_bits_and_their_scales(kind, tmp_path):
    expected = quantized_hf(tmp_path / "hf", kind=kind)
    convert(tmp_path / "hf", tmp_path / "run", keep_quantized=True, verify=True)
    weights = open_weights(tmp_path / "run")
    actual = products(weights)
    assert sorted(actual) == sorted(f"layers.{i}.moe.{name}" for i in MOE_LAYERS for name in ("gate_up", "down"))
    for i in MOE_LAYERS:
        gate_up, down = (expected[EXPERTS.format(i) + name] for name in ("gate_up_proj", "down_proj"))
        np.testing.assert_array_equal(actual[f"layers.{i}.moe.gate_up"][:, 0], gate_up[..., :WIDTH])
        np.testing.assert_array_equal(actual[f"layers.{i}.moe.gate_up"][:, 1], gate_up[..., WIDTH:])
        np.testing.assert_array_equal(actual[f"layers.{i}.moe.down"], down)
        for name, shape in {"gate_up": (MAVERICK.experts, 2, 1, WIDTH), "down": (MAVERICK.experts, 1, 64)}.items():
            assert weights.dtype(f"layers.{i}.moe.{name}") == ml_dtypes.float8_e4m3fn
            assert weights.dtype(f"layers.{i}.moe.{name}_scale") == np.float32
            assert weights.shape(f"layers.{i}.moe.{name}_scale") == shape
    files = load_file(tmp_path / "hf" / "model.safetensors")
    mine = weights.read("layers.3.moe.gate_up")[5, 1].view(np.uint8)
    if kind == "fbgemm":
        theirs = files[EXPERTS.format(3) + "gate_up_proj"].view(torch.uint8)[5, :, WIDTH:]
    else:
        theirs = files[EXPERTS.format(3) + "5.up_proj.weight"].view(torch.uint8).T
    np.testing.assert_array_equal(mine, theirs)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["quantization"] == {
        "weights": "fp8",
        "group": None,
    }


def test_what_the_checkpoint_has_in_another_dtype_stays_or_takes_the_dtype_asked_for(tmp_path):
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")
    convert(tmp_path / "hf", tmp_path / "run", keep_quantized=True)
    convert(tmp_path / "hf", tmp_path / "bfloat16", keep_quantized=True, dtype="bfloat16")
    as_it_is, cast = open_weights(tmp_path / "run"), open_weights(tmp_path / "bfloat16")
    assert as_it_is.names == cast.names
    for name in as_it_is.names:
        kept = name.removesuffix("_scale").endswith(("moe.gate_up", "moe.down"))
        assert cast.dtype(name) == (as_it_is.dtype(name) if kept else ml_dtypes.bfloat16), name
        np.testing.assert_array_equal(cast.read(name), as_it_is.read(name).astype(cast.dtype(name)), err_msg=name)
    router = "layers.1.moe.router.kernel"
    theirs = hf.reference(MAVERICK).state_dict["model.layers.1.feed_forward.router.weight"]
    np.testing.assert_array_equal(as_it_is.read(router), theirs.T)


def test_every_linear_layer_may_be_quantized_and_heads_share_the_inputs_of_o(tmp_path):
    """As a quantizer writes them that leaves out router and output head only."""
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")
    expected = {}

    def quantize_attention(tensors):
        for name in [name for name in tensors if ".self_attn." in name or ".shared_expert." in name]:
            weight = tensors[name]
            scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
            tensors[name] = np.rint(weight / scale).astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale"] = scale
            expected[name] = tensors[name].astype(np.float32) * scale

    change_file(tmp_path / "hf", quantize_attention)
    convert(tmp_path / "hf", tmp_path / "run", keep_quantized=True)
    weights = open_weights(tmp_path / "run")
    actual, heads = products(weights), (MAVERICK.heads, MAVERICK.head_dim)
    assert weights.shape("layers.0.attention.q.kernel_scale") == (1, *heads)
    assert weights.shape("layers.0.attention.o.kernel_scale") == (1, MAVERICK.embed)
    assert weights.shape("layers.1.moe.shared.gate_up.kernel_scale") == (1, 2, WIDTH)
    q, o = (expected[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qo")
    up = expected["model.layers.1.feed_forward.shared_expert.up_proj.weight"]
    np.testing.assert_array_equal(actual["layers.0.attention.q.kernel"], q.T.reshape(-1, *heads))
    np.testing.assert_array_equal(actual["layers.0.attention.o.kernel"], o.T.reshape(*heads, -1))
    np.testing.assert_array_equal(actual["layers.1.moe.shared.gate_up.kernel"][:, 1], up.T)


@pytest.mark.parametrize(
    ("blocks", "groups"), [((), 1), ((1,), 1), ((24,), 1), ((1, 1), 1), ((3, 4), 4), ((24, 8), 8)], ids=str
)
def test_scales_of_a_whole_layer_and_of_blocks_become_scales_of_outputs_and_groups(blocks, groups, tmp_path):
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")
    name = EXPERTS.format(1) + "{}.gate_proj.weight"
    scales = {e: np.random.default_rng(e).uniform(1, 2, blocks).astype(np.float32) for e in range(MAVERICK.experts)}

    def change(tensors):
        for key in [key for key in tensors if key.startswith(EXPERTS.format(1)) and key.endswith("_proj.weight_scale")]:
            e, outputs = int(key.removeprefix(EXPERTS.format(1)).split(".")[0]), len(tensors[key])
            tensors[key] = scales[e] if outputs == WIDTH else np.ones((outputs, 1), np.float32)

    change_file(tmp_path / "hf", change)
    values = load_file(tmp_path / "hf" / "model.safetensors")[name.format(2)].float().numpy()  # [out, in]
    padded = (*blocks, 1, 1)[:2]
    each = np.repeat(scales[2].reshape(padded), WIDTH // padded[0], axis=0).repeat(MAVERICK.embed // padded[1], axis=1)
    convert(tmp_path / "hf", tmp_path / "run", keep_quantized=True)
    weights = open_weights(tmp_path / "run")
    assert weights.shape("layers.1.moe.gate_up_scale") == (MAVERICK.experts, 2, groups, WIDTH)
    np.testing.assert_array_equal(products(weights)["layers.1.moe.gate_up"][2, 0], (values * each).T)
    ordinary = open_weights(tmp_path / "hf").read("layers.1.moe.gate_up")[2, 0]
    np.testing.assert_array_equal(ordinary, (values * each).astype(ml_dtypes.bfloat16).T)


# ---------------------------------------------------------------------------------------------------------------------
# Meta


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_experts_keep_their_bits_and_the_scales_of_every_rank(kind, ranks, tmp_path):
    group = 4
    expected = quantized_meta(tmp_path / "meta", ranks, kind, group)
    convert(tmp_path / "meta", tmp_path / "run", keep_quantized=True, verify=True)
    weights = open_weights(tmp_path / "run")
    actual = products(weights)
    for name, array in expected.items():
        layer, key = name.split(".")[1], name[-2:]
        ours = f"layers.{layer}.moe.{'down' if key == 'w2' else 'gate_up'}"
        np.testing.assert_array_equal(actual[ours][HALVES[key]], array, err_msg=name)
    experts, width, embed = META.experts, META.expert_mlp, META.embed
    halved, groups_in, groups_down = (2, embed // group, width // group) if kind == "int4" else (1, 1, ranks)
    quantized = "layers.1.moe."
    assert weights.dtype(quantized + "gate_up").name == {"fp8": "float8_e4m3fn", "int4": "uint8"}[kind]
    assert weights.shape(quantized + "gate_up") == (experts, 2, embed // halved, width)
    assert weights.shape(quantized + "gate_up_scale") == (experts, 2, groups_in, width)
    assert weights.shape(quantized + "down") == (experts, width // halved, embed)
    assert weights.shape(quantized + "down_scale") == (experts, groups_down, embed)
    last = f"layers.{META.layers - 1}.moe.down"
    assert weights.dtype(last) == np.float32 and last + "_scale" not in weights.names
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["quantization"]
    assert stored == {"weights": kind, "group": {"int4": group, "fp8": {1: None, 2: None}[ranks]}[kind]}


def test_the_first_of_two_inputs_is_in_the_low_half_of_a_byte(tmp_path):
    """By Meta's own numbers, not by way of our unpacking."""
    quantized_meta(tmp_path / "meta", 1, "int4", 4)
    convert(tmp_path / "meta", tmp_path / "run", keep_quantized=True)
    packed = open_weights(tmp_path / "run").read("layers.1.moe.gate_up")[3, 1]  # bytes [D/2, F] of w3
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=False)
    theirs = state["layers.1.feed_forward.experts.moe_w_swiglu_eD_F"].view(torch.uint8).numpy()
    np.testing.assert_array_equal(packed, theirs.reshape(META.experts, -1, META.expert_mlp)[3])
    low = (packed & 0xF).astype(np.int8)
    np.testing.assert_array_equal(unpack_int4(packed, 0)[::2].astype(np.int8), np.where(low > 7, low - 16, low))


def test_a_part_of_packed_weights_is_that_part_of_all_wherever_it_begins(tmp_path):
    quantized_meta(tmp_path / "meta", 2, "int4", 4)
    weights = open_weights(tmp_path / "meta")
    for name, part in {
        "layers.1.moe.gate_up": (slice(1, 4), slice(1, 2), slice(3, 21), slice(5, 17)),
        "layers.1.moe.down": (slice(0, 2), slice(11, 14), slice(0, 64)),  # of both ranks
    }.items():
        whole = weights.read(name)
        assert whole.dtype == ml_dtypes.bfloat16 and whole.shape == weights.shape(name)
        np.testing.assert_array_equal(weights.read(name, part), whole[part])


# ---------------------------------------------------------------------------------------------------------------------
# Conversion as any other


def test_without_the_flag_the_same_directory_becomes_bfloat16(tmp_path):
    quantized_hf(tmp_path / "hf", kind="fbgemm")
    ordinary, kept = open_weights(tmp_path / "hf"), open_weights(tmp_path / "hf", keep_quantized=True)
    assert not any(name.endswith("_scale") for name in ordinary.names) and len(kept.names) > len(ordinary.names)
    for name, product in products(kept).items():
        np.testing.assert_array_equal(ordinary.read(name), product.astype(ml_dtypes.bfloat16))


def test_an_interrupted_conversion_goes_on_and_keeps_the_same(tmp_path):
    quantized_meta(tmp_path / "meta", 2, "int4", 4)
    convert(tmp_path / "meta", tmp_path / "undisturbed", keep_quantized=True)

    def stop_in_the_middle(done, total):
        if done > total / 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        convert(tmp_path / "meta", tmp_path / "out", keep_quantized=True, report=stop_in_the_middle)
    with pytest.raises(ValueError, match="is of another conversion that was interrupted"):
        convert(tmp_path / "meta", tmp_path / "out")
    assert convert(tmp_path / "meta", tmp_path / "out", keep_quantized=True).resumed > 10
    right, made = open_weights(tmp_path / "undisturbed"), open_weights(tmp_path / "out")
    assert right.names == made.names
    for name in right.names:
        np.testing.assert_array_equal(made.read(name).view(np.uint8), right.read(name).view(np.uint8), err_msg=name)


def test_the_command_takes_the_flag_and_export_says_what_it_does_not_do(tmp_path, capsys):
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "run"), "--keep-quantized"]) == 0
    assert open_weights(tmp_path / "run").dtype("layers.1.moe.down") == ml_dtypes.float8_e4m3fn
    with pytest.raises(ValueError, match=r"run holds 8 quantized tensors \(layers\.1\.moe\.gate_up …\).*Export the"):
        export(tmp_path / "run", tmp_path / "out", format="hf")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "meta"]) == 2
    assert "are not exported" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be kept


def test_weights_that_are_not_quantized_have_nothing_to_keep(tmp_path):
    hf.reference(MAVERICK).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"is not quantized, so there is nothing to keep: leave --keep-quantized out"):
        convert(tmp_path / "hf", tmp_path / "out", keep_quantized=True)


LINEAR = EXPERTS.format(1) + "0.gate_proj.weight"


def _along_inputs(tensors):
    for key in [key for key in tensors if re.search(r"layers\.1\..*\.(gate|up)_proj\.weight_scale", key)]:
        tensors[key] = np.ones((1, MAVERICK.embed), np.float32)


def _e5m2(tensors):
    for key in [key for key in tensors if "layers.1.feed_forward.experts" in key and key.endswith(".weight")]:
        tensors[key] = tensors[key].astype(ml_dtypes.float8_e5m2)


def _router(tensors):
    name = "model.layers.1.feed_forward.router.weight"
    tensors[name + "_scale"] = np.ones((len(tensors[name]), 1), np.float32)
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)


def _some_int8(tensors):
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name + "_scale"] = np.ones((MAVERICK.embed, 1), np.float32)
    tensors[name] = np.sign(tensors[name]).astype(np.int8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_along_inputs, r"layers\.1\.moe\.gate_up has scales along its inputs: .*Leave --keep-quantized out"),
        (_e5m2, r"layers\.1\.moe\.\w+ has scales, but is float8_e5m2: expected int8, .* Leave"),
        (_router, r"layers\.1\.moe\.router\.kernel is quantized, which the model has in high precision only\. Leave"),
        (_some_int8, r"quantized in several ways, layers\.0\.attention\.o\.kernel as int8, .* as fp8, and one"),
    ],
)
def test_what_the_model_cannot_hold_is_named_and_can_still_be_converted(change, says, tmp_path):
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")
    change_file(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / "hf", tmp_path / "out", keep_quantized=True)
    convert(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(LINEAR + "_scale"), r"0\.gate_proj\.weight is float8_e4m3fn, but there is no scale for it"),
        (lambda t: t.update({LINEAR + "_scale": np.ones((5, 1), np.float32)}), r"weight_scale is \[5, 1\], but"),
        (
            lambda t: t.update({LINEAR + "_scale": np.ones((24, 2, 2), np.float32)}),
            r"weight_scale is \[24, 2, 2\], but",
        ),
        (
            lambda t: t.update({"model.norm.weight_scale": np.ones((64, 1), np.float32)}),
            r"unknown: model\.norm\.weight_",
        ),
    ],
)
def test_scales_that_do_not_fit_are_named(change, says, tmp_path):
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")
    change_file(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=says):
        convert(tmp_path / "hf", tmp_path / "out", keep_quantized=True)


def test_what_another_quantizer_wrote_is_named_with_what_to_do(tmp_path):
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")
    change_file(tmp_path / "hf", lambda t: t.update({LINEAR + "_packed": t.pop(LINEAR).view(np.int32)}))
    for options in ({}, {"keep_quantized": True}):
        with pytest.raises(ValueError, match=r"0\.gate_proj\.weight_packed is of a quantization .* Dequantize it with"):
            convert(tmp_path / "hf", tmp_path / "out", **options)


def test_groups_that_do_not_divide_the_inputs_are_named(tmp_path):
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")

    def change(tensors):
        for key in [key for key in tensors if ".experts." in key and key.endswith("gate_proj.weight_scale")]:
            tensors[key] = np.ones((len(tensors[key]), 7), np.float32)

    change_file(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=r"0\.gate_proj\.weight_scale has 7 groups, which do not divide 64 inputs"):
        convert(tmp_path / "hf", tmp_path / "out", keep_quantized=True)


def test_a_nan_among_kept_values_is_an_error(tmp_path):
    quantized_hf(tmp_path / "hf", kind="compressed-tensors")

    def change(tensors):
        tensors[LINEAR][3, 2] = np.nan

    change_file(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=r"layers\.1\.moe\.gate_up holds a value that is not finite"):
        convert(tmp_path / "hf", tmp_path / "out", keep_quantized=True)

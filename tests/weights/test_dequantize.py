"""Published quantized checkpoints become the numbers that their formats define."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from make_checkpoints import META
from make_quantized import EXPERTS, quantized_hf, quantized_meta
from oracles import hf
from oracles.cases import MAVERICK, tokens
from safetensors.numpy import save_file

import llama4_jax
from llama4_jax.cli import main
from llama4_jax.weights.convert import convert, export
from llama4_jax.weights.dequantize import steps
from llama4_jax.weights.inspect import describe
from llama4_jax.weights.safetensors import HFCheckpoint, SafetensorsFile
from llama4_jax.weights.source import open_weights
from llama4_jax.weights.table import Row


def bfloat16(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}


@pytest.mark.parametrize("kind", ["compressed-tensors", "fbgemm"])
def test_hugging_faces_float8_experts_are_multiplied_by_their_scales(kind, tmp_path):
    expected = bfloat16(quantized_hf(tmp_path / "hf", kind=kind))
    convert(tmp_path / "hf", tmp_path / "run", verify=True)
    export(tmp_path / "run", tmp_path / "out", format="hf")
    written = HFCheckpoint(tmp_path / "out")
    for name, array in {**hf.reference(MAVERICK).state_dict, **expected}.items():
        assert written.tensors[name].dtype == array.dtype, name
        np.testing.assert_array_equal(written.read(name), array, err_msg=name)
    assert "quantization_config" not in written.config


def test_a_quantized_directory_is_a_model_at_once(tmp_path):
    expected = bfloat16(quantized_hf(tmp_path / "hf", kind="compressed-tensors"))
    model = llama4_jax.from_pretrained(tmp_path / "hf", dtype="float32")
    fused = expected[EXPERTS.format(1) + "gate_up_proj"].astype(np.float32)
    np.testing.assert_array_equal(model.decoder.rest[1].moe.gate_up[...].swapaxes(1, 2).reshape(fused.shape), fused)
    logits = jax.jit(model)(tokens(MAVERICK).astype(np.int32))
    error = np.abs(logits - hf.logits(MAVERICK)).max() / np.abs(hf.logits(MAVERICK)).max()
    assert 1e-3 < error < 0.5  # three bits of mantissa; router choices may flip


def test_scales_of_a_wrong_shape_are_an_error_that_names_the_tensor(tmp_path):
    quantized_hf(tmp_path / "hf", kind="fbgemm")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = {name: tensor.map().copy() for name, tensor in SafetensorsFile(file).tensors.items()}
    name = EXPERTS.format(3) + "gate_up_proj"
    tensors[name + "_scale"] = tensors[name + "_scale"][..., :-1].copy()
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"wrong shape: .*experts\.gate_up_proj_scale is \[8, 1, 47\], .* \[8, 1, 48\]"
    ):
        convert(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_quantized_experts_are_multiplied_by_the_scales_of_their_own_rank(kind, ranks, tmp_path):
    # inputs of w2 on one rank: 24 or 12, which the groups of int4 must divide
    expected = bfloat16(quantized_meta(tmp_path / "meta", ranks, kind, group=4))
    convert(tmp_path / "meta", tmp_path / "run", verify=True)
    weights = open_weights(tmp_path / "run")
    for name, array in expected.items():
        layer, key = name.split(".")[1], name[-2:]
        stored = weights.read(f"layers.{layer}.moe.{'down' if key == 'w2' else 'gate_up'}")
        part = {"w1": (slice(None), 0), "w3": (slice(None), 1), "w2": (...,)}[key]
        assert stored.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored[part], array, err_msg=name)
    last = f"layers.{META.layers - 1}.moe.down"
    assert weights.dtype(last) == np.float32
    np.testing.assert_array_equal(
        weights.read(last), hf.reference(META).state_dict[EXPERTS.format(META.layers - 1) + "down_proj"]
    )


def test_scales_that_are_missing_for_a_rank_or_have_no_tensor_are_named(tmp_path):
    quantized_meta(tmp_path / "meta", 2, "fp8")
    second = tmp_path / "meta" / "fp8_scales_1.pt"
    scales = torch.load(second, weights_only=True)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: .*fp8_scales_1\.pt, though other ranks have their scales"):
        convert(tmp_path / "meta", tmp_path / "out")
    torch.save({**scales, "layers.9.feed_forward.experts.w1": torch.ones(4, 3)}, second)
    with pytest.raises(ValueError, match=r"rank 1 has scales for layers\.9\.feed_forward\.experts\.w1, which it does"):
        convert(tmp_path / "meta", tmp_path / "out")


def test_a_step_is_the_distance_to_the_next_number_of_the_format():
    """Of every finite number of float8, found by sorting them all; of int8 and int4 it is the scale."""
    row = Row("m", "D F", {"D": 256, "F": 1}, (), (), "D")

    class Stored:
        def __init__(self, values: np.ndarray, groups: int):
            self.arrays = {"m": values, "m_scale": np.linspace(0.5, 3, groups, dtype=np.float32)[:, None]}

        def shape(self, name):
            return self.arrays[name].shape

        def read(self, name, part=None):
            return self.arrays[name][part]

    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = np.where(np.isnan(every), np.float32(1), every)
    numbers = np.unique(np.abs(every))
    above = {a: b - a for a, b in itertools.pairwise(numbers)} | {numbers[-1]: 32.0}  # after 448 480 would come
    expected = np.array([above[abs(x)] for x in every], np.float32)[:, None] * np.repeat([0.5, 3], 128)[:, None]
    stored = Stored(every.astype(ml_dtypes.float8_e4m3fn)[:, None], 2)
    np.testing.assert_array_equal(steps(row, stored), expected)
    for packed in (np.zeros((256, 1), np.int8), np.zeros((128, 1), np.uint8)):
        np.testing.assert_array_equal(steps(row, Stored(packed, 2)), np.repeat(np.float32([0.5, 3]), 128)[:, None])


ATTENTION = "model.layers.0.self_attn."
OF_ACTIVATIONS = {
    "compressed-tensors": [
        *(ATTENTION + name for name in ("q_proj.input_scale", "o_proj.output_scale", "k_scale", "v_scale", "q_scale")),
        "model.layers.1.feed_forward.experts.0.gate_proj.input_scale",
        "model.layers.1.feed_forward.experts.1.down_proj.input_zero_point",
    ],
    "fbgemm": [
        "model.layers.1.feed_forward.experts.gate_up_proj_input_scale",
        "model.layers.1.feed_forward.experts.down_proj_input_scale",
        ATTENTION + "q_proj.input_scale_ub",
        ATTENTION + "k_proj.k_scale",
        ATTENTION + "v_proj.v_scale",
    ],
}


@pytest.mark.parametrize("kind", OF_ACTIVATIONS)
@pytest.mark.parametrize("keep_quantized", [False, True])
def test_scales_of_activations_change_nothing_and_are_said(kind, keep_quantized, tmp_path, capsys):
    for name in ("plain", "static"):
        quantized_hf(tmp_path / name, kind=kind)
    file = tmp_path / "static" / "model.safetensors"
    one = np.ones(1, np.float32)
    tensors = {name: tensor.map().copy() for name, tensor in SafetensorsFile(file).tensors.items()}
    save_file(tensors | dict.fromkeys(OF_ACTIVATIONS[kind], one), file)
    plain = open_weights(tmp_path / "plain", keep_quantized=keep_quantized)
    static = open_weights(tmp_path / "static", keep_quantized=keep_quantized)
    assert static.names == plain.names
    for name in plain.names:
        np.testing.assert_array_equal(static.read(name), plain.read(name))
    assert sorted(static.plan.activation_scales) == sorted(OF_ACTIVATIONS[kind])
    said = f"{len(OF_ACTIVATIONS[kind])} scales of activations, such as "
    assert not plain.notices and static.notices[0].startswith(said)
    assert said in describe(tmp_path / "static") and said not in describe(tmp_path / "plain")
    flags = ["--keep-quantized"] if keep_quantized else []
    assert main(["convert", str(tmp_path / "static"), str(tmp_path / "run"), *flags]) == 0
    assert said in capsys.readouterr().err


def test_scales_of_activations_of_no_layer_that_is_known_are_unknown(tmp_path):
    quantized_hf(tmp_path, kind="fbgemm")
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.map().copy() for name, tensor in SafetensorsFile(file).tensors.items()}
    save_file(tensors | {"model.layers.0.cross_attn.q_proj.input_scale": np.ones(1, np.float32)}, file)
    with pytest.raises(ValueError, match=r"unknown: model\.layers\.0\.cross_attn\.q_proj\.input_scale"):
        open_weights(tmp_path)

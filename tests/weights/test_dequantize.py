"""Published quantized checkpoints become the numbers that their formats define."""

import json
import sys
from types import ModuleType

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from make_checkpoints import META, meta_tensors, write_meta
from oracles import hf
from oracles.cases import MAVERICK, tokens
from safetensors.numpy import load_file, save_file

import llama4_jax
from llama4_jax.weights.convert import convert, export
from llama4_jax.weights.safetensors import HFCheckpoint, SafetensorsFile
from llama4_jax.weights.source import open_weights

EXPERTS = "model.layers.{}.feed_forward.experts."
MOE_LAYERS = [i for i, moe in enumerate(MAVERICK.moe) if moe]


def float8(weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float8 values; a float32 scale for each row, along whose `axis` it is constant; and their product in bfloat16."""
    scales = (np.abs(weights).max(axis, keepdims=True) / 448).astype(np.float32)
    values = (weights / scales).astype(ml_dtypes.float8_e4m3fn)
    return values, scales, (values.astype(np.float32) * scales).astype(ml_dtypes.bfloat16)


def quantized_hf(directory, *, kind: str) -> dict[str, np.ndarray]:
    """Quantizes the experts of a Hugging Face checkpoint in place, as published; returns what they then stand for."""
    hf.reference(MAVERICK).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors, expected = load_file(file), {}
    for i in MOE_LAYERS:
        name = EXPERTS.format(i)
        gate_up, down = tensors.pop(name + "gate_up_proj"), tensors.pop(name + "down_proj")
        if kind == "fbgemm":
            values, scales, dequantized = float8(gate_up, axis=1)
            tensors |= {name + "gate_up_proj": values, name + "gate_up_proj_scale": scales}  # [E, 1, 2F]
            expected[name + "gate_up_proj"] = dequantized
            values, scales, dequantized = float8(down, axis=1)
            tensors |= {name + "down_proj": values, name + "down_proj_scale": scales.swapaxes(1, 2).copy()}  # [E, D, 1]
            expected[name + "down_proj"] = dequantized
            continue
        both = {"gate_proj": gate_up[..., : MAVERICK.expert_mlp], "up_proj": gate_up[..., MAVERICK.expert_mlp :]}
        parts = {"down_proj": np.empty(down.shape, ml_dtypes.bfloat16)}
        parts |= {key: np.empty(half.shape, ml_dtypes.bfloat16) for key, half in both.items()}
        for key, fused in {**both, "down_proj": down}.items():
            for expert in range(MAVERICK.experts):
                values, scales, dequantized = float8(fused[expert].T.copy(), axis=1)  # [out, in], scales [out, 1]
                linear = f"{name}{expert}.{key}.weight"
                tensors |= {linear: values, linear + "_scale": scales.astype(ml_dtypes.bfloat16)}
                dequantized = (values.astype(np.float32) * scales.astype(ml_dtypes.bfloat16).astype(np.float32)).astype(
                    ml_dtypes.bfloat16
                )
                parts[key][expert] = dequantized.T
        expected[name + "gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=-1)
        expected[name + "down_proj"] = parts["down_proj"]
    save_file(tensors, file)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8" if kind == "fbgemm" else "compressed-tensors"}
    (directory / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("kind", ["compressed-tensors", "fbgemm"])
def test_hugging_faces_float8_experts_are_multiplied_by_their_scales(kind, tmp_path):
    expected = quantized_hf(tmp_path / "hf", kind=kind)
    convert(tmp_path / "hf", tmp_path / "run", verify=True)
    export(tmp_path / "run", tmp_path / "out", format="hf")
    written = HFCheckpoint(tmp_path / "out")
    for name, array in {**hf.reference(MAVERICK).state_dict, **expected}.items():
        assert written.tensors[name].dtype == array.dtype, name
        np.testing.assert_array_equal(written.read(name), array, err_msg=name)
    assert "quantization_config" not in written.config


def test_a_quantized_directory_is_a_model_at_once(tmp_path):
    expected = quantized_hf(tmp_path / "hf", kind="compressed-tensors")
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
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: scales \[8, 1, 47\] do not fit values \[8, 64, 48\]"):
        convert(tmp_path / "hf", tmp_path / "out")


def metas_int4():
    """Meta's own quantizer, whose module asks for GPU kernels when it is imported."""
    names = ["fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai"]
    missing = [name for name in names if name not in sys.modules]
    sys.modules.update({name: ModuleType(name) for name in missing})
    try:
        from llama_models import quantize_impls
    finally:
        for name in missing:
            del sys.modules[name]
    return quantize_impls


MODULES = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}


def quantized_meta(directory, ranks: int, kind: str, group: int = 8) -> dict[str, np.ndarray]:
    """Quantizes the routed experts of Meta's checkpoint in place, rank by rank, as its script does: transposed to
    [E, out, in], quantized along the inputs, transposed back; the scales are not. Returns what they stand for, with the
    ranks put together, under the names of Meta's modules."""
    write_meta(META, directory, ranks)
    parts: dict[str, list[np.ndarray]] = {}
    for rank in range(ranks):
        state, scales = dict(meta_tensors(META, rank, ranks)), {}
        for i in [i for i, moe in enumerate(META.moe) if moe][:-1]:  # the last stays as it is
            for key, stored in MODULES.items():
                prefix = f"layers.{i}.feed_forward.experts."
                weight = state[prefix + stored].unflatten(0, (META.experts, -1)).transpose(1, 2).contiguous()
                if kind == "fp8":
                    values, scale, dequantized = float8(weight.numpy(), axis=2)
                    packed = torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
                    scales[prefix + key] = torch.from_numpy(scale[..., 0])
                else:
                    quantizer = metas_int4()
                    rows, scale = zip(*[quantizer.int4_row_quantize(e, group) for e in weight], strict=True)
                    by_input = torch.stack(scale).transpose(1, 2).repeat_interleave(group, dim=2)  # [E, out, in]
                    dequantized = (torch.stack(rows).float() * by_input).numpy().astype(ml_dtypes.bfloat16)
                    packed = torch.stack([quantizer.pack_int4(e) for e in rows]).view(torch.float8_e4m3fn)
                    scales[prefix + key] = torch.stack(scale)
                state[prefix + stored] = packed.transpose(1, 2).flatten(0, 1).contiguous()
                parts.setdefault(prefix + key, []).append(np.swapaxes(dequantized, 1, 2))
        torch.save(state, directory / f"consolidated.{rank:02d}.pth")
        torch.save(scales, directory / f"{kind}_scales_{rank}.pt")
    return {name: np.concatenate(ranks, 1 if name.endswith("w2") else 2) for name, ranks in parts.items()}


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_quantized_experts_are_multiplied_by_the_scales_of_their_own_rank(kind, ranks, tmp_path):
    # inputs of w2 on one rank: 24 or 12, which the groups of int4 must divide
    expected = quantized_meta(tmp_path / "meta", ranks, kind, group=4)
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

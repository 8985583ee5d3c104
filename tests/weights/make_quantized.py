"""Tiny quantized checkpoints as others publish them, made without any code of ours."""

import json
import sys
from types import ModuleType

import ml_dtypes
import numpy as np
import torch
from make_checkpoints import META, meta_tensors, write_meta
from oracles import hf
from oracles.cases import MAVERICK, Case
from safetensors.numpy import load_file, save_file

EXPERTS = "model.layers.{}.feed_forward.experts."
MOE_LAYERS = [i for i, moe in enumerate(MAVERICK.moe) if moe]


def float8(weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float8 values; a float32 scale for each row, along whose `axis` it is constant; and their product."""
    scales = (np.abs(weights).max(axis, keepdims=True) / 448).astype(np.float32)
    values = (weights / scales).astype(ml_dtypes.float8_e4m3fn)
    return values, scales, values.astype(np.float32) * scales


def quantized_hf(directory, *, kind: str, case: Case = MAVERICK) -> dict[str, np.ndarray]:
    """Quantizes the experts of a Hugging Face checkpoint in place, as published; returns what they then stand for,
    in float32."""
    hf.reference(case).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors, expected = load_file(file), {}
    for i in [i for i, moe in enumerate(case.moe) if moe]:
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
        both = {"gate_proj": gate_up[..., : case.expert_mlp], "up_proj": gate_up[..., case.expert_mlp :]}
        parts = {"down_proj": np.empty(down.shape, np.float32)}
        parts |= {key: np.empty(half.shape, np.float32) for key, half in both.items()}
        for key, fused in {**both, "down_proj": down}.items():
            for expert in range(case.experts):
                values, scales, dequantized = float8(fused[expert].T.copy(), axis=1)  # [out, in], scales [out, 1]
                linear = f"{name}{expert}.{key}.weight"
                scales = scales.astype(ml_dtypes.bfloat16)  # as that quantizer stores them
                tensors |= {linear: values, linear + "_scale": scales}
                parts[key][expert] = (values.astype(np.float32) * scales.astype(np.float32)).T
        expected[name + "gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=-1)
        expected[name + "down_proj"] = parts["down_proj"]
    save_file(tensors, file)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8" if kind == "fbgemm" else "compressed-tensors"}
    (directory / "config.json").write_text(json.dumps(config))
    return expected


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
    [E, out, in], quantized along the inputs, transposed back; the scales are not. Returns what they stand for, in
    float32, with the ranks put together, under the names of Meta's modules."""
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
                    dequantized = (torch.stack(rows).float() * by_input).numpy()
                    packed = torch.stack([quantizer.pack_int4(e) for e in rows]).view(torch.float8_e4m3fn)
                    scales[prefix + key] = torch.stack(scale)
                state[prefix + stored] = packed.transpose(1, 2).flatten(0, 1).contiguous()
                parts.setdefault(prefix + key, []).append(np.swapaxes(dequantized, 1, 2))
        torch.save(state, directory / f"consolidated.{rank:02d}.pth")
        torch.save(scales, directory / f"{kind}_scales_{rank}.pt")
    return {name: np.concatenate(ranks, 1 if name.endswith("w2") else 2) for name, ranks in parts.items()}

"""Tiny checkpoints as others would write them, without any code of ours: by `transformers`, and, for Meta's
model-parallel ranks, by Meta's own resharding."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from llama_models.checkpoint import convert_moe_weights, reshard_mp
from oracles import hf, meta
from oracles.cases import MAVERICK, Case, Rope
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig

# Eight ranks must divide its heads and widths, and Meta's code knows one original context.
META = Case(
    name="meta",
    vocab=96,
    embed=64,
    layers=8,
    heads=8,
    kv_heads=8,
    head_dim=8,
    mlp=48,
    expert_mlp=24,
    moe_interval=2,
    rope_theta=500_000.0,
    rope_scaling=Rope(factor=16.0, low=1.0, high=1.0, original=8192),
    length=29,
    seed=11,
)
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,  # as the pixel shuffle makes it
    "vision_output_dim": 24,
    "image_size": 56,
    "patch_size": 14,
    "projector_input_dim": 24,
    "projector_output_dim": 24,
}


def meta_tensors(case: Case, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """What one rank holds, under Meta's published keys."""
    whole = meta.state_dict(case, hf.reference(case).state_dict)
    # its patterns look for keys with something before them, as "model." had been once
    split = reshard_mp([convert_moe_weights(dict(whole), case.experts)], size=ranks, rank=rank)
    return {name: t.flatten(0, 1) if "experts" in name else t for name, t in split.items()}


def write_meta(case: Case, directory: Path, ranks: int, *, nested: bool = False) -> Path:
    """A directory as Meta publishes it, with what its checkpoints hold beside weights."""
    directory.mkdir(parents=True)
    params = {
        key: value
        for key, value in json.loads(meta.args(case).model_dump_json()).items()
        if value is not None and key not in ("max_batch_size", "max_seq_len")
    }
    (directory / "params.json").write_text(json.dumps({"model": params} if nested else params))
    for rank in range(ranks):
        state = {name: tensor.contiguous() for name, tensor in meta_tensors(case, rank, ranks).items()}
        state["rope.freqs"] = torch.zeros(4)
        state["layers.0.attention.wo._extra_state"] = io.BytesIO(b"of their training")
        torch.save(state, directory / f"consolidated.{rank:02d}.pth")
    return directory


def write_vision(directory: Path, *, shard_size: str = "1GB", case: Case = MAVERICK) -> dict[str, np.ndarray]:
    """A Llama4ForConditionalGeneration of random weights, by `save_pretrained`. Returns its tensors."""
    config = Llama4Config(text_config=hf.config(case), vision_config=Llama4VisionConfig(**VISION))
    model = Llama4ForConditionalGeneration(config)
    hf.random_weights(model, seed=5)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}

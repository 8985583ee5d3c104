"""Shapes with a name. A checkpoint's own config always wins over these (see `weights.hf_config`).

Scout and Maverick are the published models. Meta published of Behemoth only "288 B active, 16 experts, nearly 2 T in
all"; the sizes here are ours, chosen to give those totals. The dense students and `tiny` are ours too.
"""

import dataclasses

from llama4_jax.model.config import ModelConfig, RopeScaling, VisionConfig

_SCOUT = ModelConfig(
    vocab_size=202_048,
    embed_dim=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=16_384,  # no layer uses it: all have experts
    expert_mlp_dim=8192,
    num_experts=16,
    moe_interval=1,
    qk_norm=True,
    rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_context=8192),
    context_length=10_485_760,
)

_MAVERICK = ModelConfig(
    vocab_size=202_048,
    embed_dim=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=16_384,
    expert_mlp_dim=8192,
    num_experts=128,
    moe_interval=2,
    qk_norm=False,
    context_length=1_048_576,
)

_BEHEMOTH_LIKE = ModelConfig(
    vocab_size=202_048,
    embed_dim=16_384,
    num_layers=96,
    num_heads=128,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=48_128,
    expert_mlp_dim=24_064,
    num_experts=16,
    moe_interval=1,
    context_length=262_144,
)

_DENSE_1B = ModelConfig(
    vocab_size=202_048,
    embed_dim=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    expert_mlp_dim=8192,
    moe_interval=0,
    context_length=131_072,
)

_DENSE_8B = ModelConfig(
    vocab_size=202_048,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    expert_mlp_dim=14_336,
    moe_interval=0,
    context_length=131_072,
)

# Every mechanism of the large models at a size that a CPU trains in minutes: bytes as tokens, chunks of 128.
_TINY = ModelConfig(
    vocab_size=320,
    embed_dim=192,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=512,
    expert_mlp_dim=192,
    num_experts=4,
    moe_interval=1,
    attention_chunk=128,
    temperature_floor=128,
    context_length=1024,
)

# The same, smaller, with a vision encoder: a page of 48 × 48 pixels becomes 9 tokens.
_TINY_VISION = ModelConfig(
    vocab_size=320,
    embed_dim=96,
    num_layers=4,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    mlp_dim=256,
    expert_mlp_dim=96,
    num_experts=4,
    moe_interval=2,
    attention_chunk=128,
    temperature_floor=128,
    router_bias=True,
    context_length=1024,
    init_std=0.06,
    vision=VisionConfig(
        embed_dim=96,
        num_layers=3,
        num_heads=4,
        mlp_dim=384,
        image_size=48,
        patch_size=8,
        adapter_dim=192,
        output_dim=192,
        patch_token_id=274,
    ),
)

PRESETS: dict[str, ModelConfig] = {
    "scout": _SCOUT,
    "scout_vision": dataclasses.replace(_SCOUT, vision=VisionConfig()),
    "maverick": _MAVERICK,
    "maverick_vision": dataclasses.replace(_MAVERICK, vision=VisionConfig()),
    "behemoth_like": _BEHEMOTH_LIKE,
    "dense_1b": _DENSE_1B,
    "dense_8b": _DENSE_8B,
    "tiny": _TINY,
    "tiny_vision": _TINY_VISION,
}


def preset(name: str) -> ModelConfig:
    """The model of that name. Raises ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}: expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]

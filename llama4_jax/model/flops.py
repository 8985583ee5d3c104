"""How many parameters a model has and how many floating-point operations a token costs, from the config alone.

Counts are of multiply-adds in matrix products, two operations each; norms, softmax and routing are left out, as is
usual for model FLOPs utilisation. Attention counts visible keys only: a chunked layer never pays for more than a
chunk, so its cost does not grow with the sequence.
"""

from typing import NamedTuple

from llama4_jax.model.config import LayerSpec, ModelConfig, VisionConfig


class ParameterCount(NamedTuple):
    total: int
    active: int  # of which one token uses: the chosen experts only (embedding counted whole, as Meta does)
    routed: int  # in routed experts
    vision: int  # in the vision encoder and the projector; in `total`, and not in `active`


def count_parameters(config: ModelConfig) -> ParameterCount:
    dim, vocab = config.embed_dim, config.vocab_size
    expert = 3 * dim * config.expert_mlp_dim
    total = active = 2 * vocab * dim + dim  # embedding, head, final norm
    routed = 0
    for spec in config.layers:
        everywhere = _attention_parameters(config) + 2 * dim
        if spec.query_scale in ("ssmax", "ssmax_bias"):
            everywhere += config.num_heads * (1 if spec.query_scale == "ssmax" else 2)
        if spec.moe:
            everywhere += dim * config.num_experts + expert  # router and shared expert
            routed += config.num_experts * expert
            total += config.num_experts * expert
            active += config.top_k * expert
        else:
            everywhere += 3 * dim * config.mlp_dim
        total += everywhere
        active += everywhere
    vision = 0 if config.vision is None else _vision_parameters(config.vision, dim)
    return ParameterCount(total + vision, active, routed, vision)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations of the forward pass for one token, averaged over a document of `seq_len` tokens."""
    products = config.vocab_size * config.embed_dim
    scores = 0.0
    for spec in config.layers:
        products += _attention_parameters(config)
        if spec.moe:
            expert = 3 * config.embed_dim * config.expert_mlp_dim
            products += config.embed_dim * config.num_experts + (1 + config.top_k) * expert
        else:
            products += 3 * config.embed_dim * config.mlp_dim
        scores += 2 * config.num_heads * config.head_dim * mean_visible_keys(spec, seq_len)
    return 2 * (products + scores)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations of forward and backward for one token: the backward pass has two products for each forward one."""
    return 3 * forward_flops_per_token(config, seq_len)


def train_flops_per_tile(config: ModelConfig) -> float:
    """Operations of forward and backward for one tile of a picture: encoder, adapter and projector."""
    vision = config.vision
    if vision is None:
        return 0.0
    patches, dim = vision.num_patches + 1, vision.embed_dim
    layer = patches * (4 * dim**2 + 2 * dim * vision.mlp_dim) + 2 * patches**2 * dim
    adapter = vision.shuffled_dim * vision.adapter_dim + vision.adapter_dim * vision.output_dim
    ends = vision.num_patches * _patch_size(vision) * dim
    ends += vision.tokens_per_tile * (adapter + vision.output_dim * config.embed_dim)
    return 3 * 2 * (vision.num_layers * layer + ends)


def mean_visible_keys(spec: LayerSpec, seq_len: int) -> float:
    """Keys that a query sees on average in a document of `seq_len` tokens, itself included."""
    chunk = min(spec.chunk or seq_len, seq_len)
    whole, rest = divmod(seq_len, chunk)
    return (whole * chunk * (chunk + 1) + rest * (rest + 1)) / 2 / seq_len


def _attention_parameters(config: ModelConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
    return config.embed_dim * config.head_dim * heads


def _vision_parameters(vision: VisionConfig, text_dim: int) -> int:
    dim = vision.embed_dim
    layer = 4 * dim * (dim + 1) + 2 * dim * vision.mlp_dim + vision.mlp_dim + dim + 4 * dim
    ends = _patch_size(vision) * dim + dim * (vision.num_patches + 1) + dim + 4 * dim  # patches, places, class, norms
    adapter = vision.shuffled_dim * vision.adapter_dim + vision.adapter_dim * vision.output_dim
    return vision.num_layers * layer + ends + adapter + vision.output_dim * text_dim


def _patch_size(vision: VisionConfig) -> int:
    return vision.num_channels * vision.patch_size**2

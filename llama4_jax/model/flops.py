"""How many parameters a model has, how many floating-point operations a token costs, and how many bytes must be read to
decode one, from the config alone.

Counts are of multiply-adds in matrix products, two operations each; norms, softmax and routing are left out, as is
usual for model FLOPs utilisation. Attention counts visible keys only: a chunked layer never pays for more than a
chunk, so its cost does not grow with the sequence. So a row of T tokens after a past of P costs, forward,

    2 T (sum over layers of its matrices that a token uses)  +  2 x logits x embed x vocabulary
    + 4 x heads x head_dim x (sum over layers, and over the positions P … P + T - 1, of the keys visible there)

with a token's matrices being attention's four, and the dense feed-forward's three or the router, the shared expert and
the chosen ones; a position p sees p + 1 keys, in a chunked layer p % chunk + 1. Training has all T logits and costs
three times that, as the backward pass has two products for each of the forward one. A piece of a prompt needs the last
token's logits only, and decoding is a row of one token.
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
    return forward_flops(config, first=0, last=seq_len, logits=seq_len) / seq_len


def forward_flops(config: ModelConfig, *, first: int, last: int, logits: int) -> float:
    """Operations of the forward pass for the tokens of one row at positions first … last - 1, of which `logits` get the
    logits of the next token."""
    products = scores = 0.0
    for spec in config.layers:
        products += _attention_parameters(config)
        if spec.moe:
            expert = 3 * config.embed_dim * config.expert_mlp_dim
            products += config.embed_dim * config.num_experts + (1 + config.top_k) * expert
        else:
            products += 3 * config.embed_dim * config.mlp_dim
        keys = _visible_keys(spec, last) - _visible_keys(spec, first)
        scores += 2 * config.num_heads * config.head_dim * keys
    return 2 * ((last - first) * products + logits * config.vocab_size * config.embed_dim + scores)


def decode_bytes(
    config: ModelConfig,
    *,
    rows: int,
    context: int,
    weight_bytes: int | float,
    cache_bytes: int | float,
    matrix_bytes: int | float | None = None,
) -> float:
    """Bytes that decoding one token of each row must read: the weights in use, and the keys and values of `context`
    tokens a row.

    - weight_bytes: of a parameter
    - cache_bytes: of a number in the cache
    - matrix_bytes: of a number in the decoder's matrices, where they are quantized; None: weight_bytes

    Of the embedding, the rows' own; of the experts, as many as `rows` tokens choose on average if all are equally
    likely.
    """
    kept = config.vocab_size * config.embed_dim + rows * config.embed_dim
    matrices = 0.0
    slots = 0
    for spec in config.layers:
        matrices += _attention_parameters(config)
        if spec.moe:
            unused = (1 - config.top_k / config.num_experts) ** rows
            experts = 1 + config.num_experts * (1 - unused)  # and the shared one
            kept += config.embed_dim * config.num_experts
            matrices += experts * 3 * config.embed_dim * config.expert_mlp_dim
        else:
            matrices += 3 * config.embed_dim * config.mlp_dim
        slots += min(spec.chunk or context, context)
    cache = rows * slots * 2 * config.num_kv_heads * config.head_dim
    of_matrices = weight_bytes if matrix_bytes is None else matrix_bytes
    return kept * weight_bytes + matrices * of_matrices + cache * cache_bytes


def train_flops_per_token(config: ModelConfig, seq_len: int, *, weights_learn: bool = True) -> float:
    """Operations of forward and backward for one token: the backward pass has two products for each forward one, or one
    for each product with weights that do not learn, as LoRA's base (the factors beside them are not counted)."""
    forward = forward_flops_per_token(config, seq_len)
    if weights_learn:
        return 3 * forward
    keys = sum(mean_visible_keys(spec, seq_len) for spec in config.layers)
    return 2 * forward + 4 * config.num_heads * config.head_dim * keys


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
    return _visible_keys(spec, seq_len) / seq_len


def _visible_keys(spec: LayerSpec, seq_len: int) -> float:
    """Keys that the first `seq_len` positions see, together."""
    if not seq_len:
        return 0.0
    chunk = min(spec.chunk or seq_len, seq_len)
    whole, rest = divmod(seq_len, chunk)
    return (whole * chunk * (chunk + 1) + rest * (rest + 1)) / 2


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

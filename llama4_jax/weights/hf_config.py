"""Hugging Face's config.json ↔ `ModelConfig`.

Defaults are those of `Llama4TextConfig` in transformers 5.23, since a key that a file leaves out has that value there:
the published files name neither the temperature nor the layer pattern. What a file can say and this model cannot do is
an error, not a guess.
"""

from collections.abc import Sequence

from llama4_jax.model.config import ModelConfig, RopeScaling

_DEFAULTS = {
    "vocab_size": 202_048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16_384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "moe_layers": None,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "layer_types": None,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_bias": False,
    "initializer_range": 0.02,
}
_ROPE_THETA = 500_000.0

# What the model has no switch for: the only value it implements.
_FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False}

_CHUNKED, _FULL = "chunked_attention", "full_attention"


def model_config(config_json: dict) -> ModelConfig:
    """The model that a config.json describes. Raises ValueError as `model_config_fields` does."""
    fields = model_config_fields(config_json)
    scaling = fields.pop("rope_scaling")
    return ModelConfig(**fields, rope_scaling=None if scaling is None else RopeScaling(**scaling))


def model_config_fields(config_json: dict) -> dict:
    """The fields of `ModelConfig` that a config.json determines; `rope_scaling` is a dictionary of `RopeScaling`'s.

    Takes Llama4ForConditionalGeneration's (nested) and Llama4ForCausalLM's (flat), old keys and new. Raises ValueError
    for another kind of model, and for values that this model cannot express.
    """
    text = _text_config(config_json)
    value = {**_DEFAULTS, **{key: text[key] for key in _DEFAULTS if key in text}}
    for key, only in _FIXED.items():
        for where in (value, config_json):
            if where.get(key, only) != only:
                raise ValueError(f"config.json: {key} is {where[key]!r}, but only {only!r} is supported.")
    num_layers, heads = value["num_hidden_layers"], value["num_attention_heads"]
    rope_layers = _rope_layers(value)
    theta, scaling = _rope(text, value["max_position_embeddings"])
    return {
        "vocab_size": value["vocab_size"],
        "embed_dim": value["hidden_size"],
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": heads if value["num_key_value_heads"] is None else value["num_key_value_heads"],
        "head_dim": value["hidden_size"] // heads if value["head_dim"] is None else value["head_dim"],
        "mlp_dim": value["intermediate_size_mlp"],
        "expert_mlp_dim": value["intermediate_size"],
        "num_experts": value["num_local_experts"],
        "top_k": value["num_experts_per_tok"],
        "moe_layers": _moe_layers(value),
        "rope_layers": rope_layers,
        "attention_chunk": _attention_chunk(value, rope_layers),
        "qk_norm": value["use_qk_norm"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        # older files say 4 where newer ones say true
        "query_scale": "temperature" if value["attn_temperature_tuning"] else "none",
        "temperature_floor": _whole("floor_scale", value["floor_scale"]),
        "temperature_coef": float(value["attn_scale"]),
        "norm_eps": float(value["rms_norm_eps"]),
        "context_length": value["max_position_embeddings"],
        "init_std": float(value["initializer_range"]),
    }


def _text_config(config_json: dict) -> dict:
    kind = config_json.get("model_type")
    if kind == "llama4_text":
        return config_json
    if kind != "llama4":
        raise ValueError(f"config.json: model_type is {kind!r}, expected 'llama4' or 'llama4_text'.")
    if not isinstance(config_json.get("text_config"), dict):
        raise ValueError("config.json: model_type is 'llama4', but there is no text_config in it.")
    return config_json["text_config"]


def _whole(key: str, number: int | float) -> int:
    if int(number) != number:
        raise ValueError(f"config.json: {key} must be a whole number of tokens, got {number}.")
    return int(number)


def _rope_layers(value: dict) -> tuple[bool, ...]:
    """`no_rope_layers` is named backwards: 1 is a layer that has RoPE. Empty, it follows from the interval."""
    explicit, num_layers = value["no_rope_layers"], value["num_hidden_layers"]
    if not explicit:
        return tuple((i + 1) % value["no_rope_layer_interval"] != 0 for i in range(num_layers))
    if len(explicit) < num_layers:
        raise ValueError(f"config.json: no_rope_layers has {len(explicit)} entries, but there are {num_layers} layers.")
    return tuple(bool(uses_rope) for uses_rope in explicit[:num_layers])


def _moe_layers(value: dict) -> tuple[bool, ...]:
    explicit, num_layers = value["moe_layers"], value["num_hidden_layers"]
    if explicit is None:
        step = value["interleave_moe_layer_step"]
        return tuple((i + 1) % step == 0 for i in range(num_layers))
    outside = [layer for layer in explicit if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"config.json: moe_layers names {outside}, but there are {num_layers} layers.")
    return tuple(layer in explicit for layer in range(num_layers))


def _attention_chunk(value: dict, rope_layers: Sequence[bool]) -> int | None:
    """Chunked are the RoPE layers, or none at all."""
    types, chunk = value["layer_types"], value["attention_chunk_size"]
    if types is None or chunk is None:
        return chunk
    if all(kind == _FULL for kind in types):
        return None
    if list(types) != [_CHUNKED if uses_rope else _FULL for uses_rope in rope_layers]:
        raise ValueError(
            "config.json: layer_types must be chunked_attention on the layers with RoPE and full_attention on the "
            f"others (or full_attention on all), got {list(types)} for no_rope_layers {[int(r) for r in rope_layers]}."
        )
    return chunk


def _rope(text: dict, context_length: int) -> tuple[float, dict | None]:
    """Theta and the scaling: from `rope_scaling` beside `rope_theta` (old), or together in `rope_parameters` (new)."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta") or text.get("rope_theta") or _ROPE_THETA)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json: rope_type is {kind!r}, but only 'default' and 'llama3' are supported.")
    missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in rope]
    if missing:
        raise ValueError(f"config.json: rope scaling of type 'llama3' lacks {', '.join(missing)}.")
    return theta, {
        "factor": float(rope["factor"]),
        "low_freq_factor": float(rope["low_freq_factor"]),
        "high_freq_factor": float(rope["high_freq_factor"]),
        "original_context": rope.get("original_max_position_embeddings", context_length),
    }


def to_hf_config(config: ModelConfig) -> dict:
    """The config.json of a Llama4ForCausalLM that computes the same. Token ids are left to whoever has a tokenizer.

    Raises ValueError for what Hugging Face's model cannot do.
    """
    if config.query_scale not in ("none", "temperature"):
        raise ValueError(f"query_scale {config.query_scale!r} has no counterpart in Hugging Face's Llama 4.")
    if config.query_scale == "temperature" and any(s.rope and s.query_scale != "none" for s in config.layers):
        raise ValueError(
            "Hugging Face's Llama 4 has its temperature on layers without RoPE only: query_scale_layers must be "
            f"'nope', got {config.query_scale_layers!r}."
        )
    if config.router_bias:
        raise ValueError("Hugging Face's Llama 4 has no bias in its router: router_bias must be False.")
    rope: dict = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.expert_mlp_dim,
        "intermediate_size_mlp": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "moe_layers": [i for i, spec in enumerate(config.layers) if spec.moe],
        "no_rope_layers": [int(spec.rope) for spec in config.layers],
        "layer_types": [_FULL if spec.chunk is None else _CHUNKED for spec in config.layers],
        # null makes transformers 5.23 fail; with full attention everywhere it asks for a size and ignores it
        "attention_chunk_size": config.attention_chunk or config.context_length,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.query_scale == "temperature",
        "floor_scale": config.temperature_floor,
        "attn_scale": config.temperature_coef,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }

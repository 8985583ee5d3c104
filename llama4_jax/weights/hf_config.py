"""Hugging Face's config.json ↔ `ModelConfig`.

Defaults are those of `Llama4TextConfig` in transformers 5.23, since a key that a file leaves out has that value there:
the published files name neither the temperature nor the layer pattern. What a file can say and this model cannot do is
an error, not a guess.
"""

from collections.abc import Sequence

from llama4_jax.model.config import ModelConfig, RopeScaling, VisionConfig

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

# The same of `Llama4VisionConfig`.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "hidden_act": "gelu",
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "intermediate_size": 5632,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "vision_feature_select_strategy": "default",
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "multi_modal_projector_bias": False,
}
_VISION_FIXED = {
    "hidden_act": "gelu", "vision_feature_select_strategy": "default", "multi_modal_projector_bias": False,
}  # fmt: skip

# Where each field of ours comes from: the first of these keys that the file has.
_KEYS = {
    "vocab_size": ("vocab_size",),
    "embed_dim": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "mlp_dim": ("intermediate_size_mlp",),
    "expert_mlp_dim": ("intermediate_size",),
    "num_experts": ("num_local_experts",),
    "top_k": ("num_experts_per_tok",),
    "moe_layers": ("moe_layers", "interleave_moe_layer_step"),
    "rope_layers": ("no_rope_layers", "no_rope_layer_interval"),
    "attention_chunk": ("layer_types", "attention_chunk_size"),
    "qk_norm": ("use_qk_norm",),
    "rope_theta": ("rope_parameters", "rope_scaling", "rope_theta"),
    "rope_scaling": ("rope_scaling", "rope_parameters"),
    "query_scale": ("attn_temperature_tuning",),
    "temperature_floor": ("floor_scale",),
    "temperature_coef": ("attn_scale",),
    "norm_eps": ("rms_norm_eps",),
    "context_length": ("max_position_embeddings",),
    "init_std": ("initializer_range",),
}

_CHUNKED, _FULL = "chunked_attention", "full_attention"


def model_config(config_json: dict) -> ModelConfig:
    """The model that a config.json describes. Raises ValueError as `model_config_fields` does."""
    fields = model_config_fields(config_json)
    scaling = fields.pop("rope_scaling")
    return ModelConfig(
        **fields,
        rope_scaling=None if scaling is None else RopeScaling(**scaling),
        vision=vision_config(config_json),
    )


def model_config_fields(config_json: dict) -> dict:
    """The text fields of `ModelConfig` that a config.json determines; `rope_scaling` is a dictionary of its fields.

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


def provenance(config_json: dict) -> dict[str, str]:
    """Where each field of `model_config(config_json)` comes from: a key of the file, or a default."""
    text = _text_config(config_json)
    where = "" if text is config_json else "text_config."
    found = {}
    for field, keys in _KEYS.items():
        key = next((key for key in keys if text.get(key) not in (None, [])), None)
        if key is not None:
            found[field] = f"config.json: {where}{key}"
        else:
            found[field] = "default of transformers' Llama4TextConfig"
    for field in ("moe_interval", "nope_interval", "query_scale_layers", "router_bias"):
        found[field] = "layer by layer in moe_layers and rope_layers" if "interval" in field else "the architecture"
    has_vision = isinstance(config_json.get("vision_config"), dict)
    found["vision"] = "config.json: vision_config" if has_vision else "config.json: no vision_config"
    return found


def vision_config(config_json: dict) -> VisionConfig | None:
    """The vision encoder that a config.json describes; None for a text model. Raises ValueError for what this model
    cannot express."""
    vision = config_json.get("vision_config")
    if not isinstance(vision, dict):
        return None
    value = {**_VISION_DEFAULTS, **{key: vision[key] for key in _VISION_DEFAULTS if key in vision}}
    for key, only in _VISION_FIXED.items():
        if value[key] != only:
            raise ValueError(f"config.json: vision_config.{key} is {value[key]!r}, but only {only!r} is supported.")
    if value["vision_output_dim"] != value["projector_output_dim"]:
        raise ValueError(
            f"config.json: vision_config.vision_output_dim is {value['vision_output_dim']}, but the adapter before "
            f"it gives projector_output_dim, {value['projector_output_dim']}."
        )
    config = VisionConfig(
        embed_dim=value["hidden_size"],
        num_layers=value["num_hidden_layers"],
        num_heads=value["num_attention_heads"],
        mlp_dim=value["intermediate_size"],
        image_size=_side("image_size", value["image_size"]),
        patch_size=_side("patch_size", value["patch_size"]),
        num_channels=value["num_channels"],
        pixel_shuffle_ratio=float(value["pixel_shuffle_ratio"]),
        adapter_dim=value["projector_input_dim"],
        output_dim=value["projector_output_dim"],
        rope_theta=float((vision.get("rope_parameters") or vision).get("rope_theta") or 10_000.0),
        norm_eps=float(value["norm_eps"]),
        patch_token_id=config_json.get("image_token_index", 200_092),
    )
    if config.shuffled_dim != config.mlp_dim:
        # transformers gives the adapter's first layer intermediate_size inputs
        raise ValueError(
            f"config.json: vision_config.intermediate_size is {config.mlp_dim}, but the pixel shuffle makes vectors "
            f"of hidden_size / pixel_shuffle_ratio² = {config.shuffled_dim} for the adapter."
        )
    return config


def _side(key: str, size: int | Sequence[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"config.json: vision_config.{key} must be square, got {size}.")
    return sides.pop()


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
    """The config.json of a Llama4ForCausalLM that computes the same, or, with a vision encoder, of a
    Llama4ForConditionalGeneration. Token ids are left to whoever has a tokenizer.

    Raises ValueError for what Hugging Face's model cannot do.
    """
    text = _text_to_hf(config)
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    vision = config.vision
    if vision.shuffled_dim != vision.mlp_dim:
        raise ValueError(
            f"Hugging Face's adapter has vision.mlp_dim inputs, so vision.mlp_dim ({vision.mlp_dim}) must be "
            f"embed_dim / pixel_shuffle_ratio² ({vision.shuffled_dim})."
        )
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": vision.embed_dim,
            "hidden_act": "gelu",
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "num_channels": vision.num_channels,
            "intermediate_size": vision.mlp_dim,
            "vision_output_dim": vision.output_dim,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "norm_eps": vision.norm_eps,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
            "projector_input_dim": vision.adapter_dim,
            "projector_output_dim": vision.output_dim,
            "multi_modal_projector_bias": False,
            "vision_feature_select_strategy": "default",
            "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        },
        "image_token_index": vision.patch_token_id,
        "tie_word_embeddings": False,
    }


def _text_to_hf(config: ModelConfig) -> dict:
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

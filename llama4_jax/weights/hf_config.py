"""Hugging Face's config.json ↔ `ModelConfig`.

Every key is read where transformers 5.23 looks for it, and where two spellings disagree, the one that decides there
decides here. Defaults are its `Llama4TextConfig`'s and `Llama4VisionConfig`'s, since a key that a file leaves out has
that value there: the published files name neither the temperature nor the layer pattern. Of each kind of key:

- What a file can say and this model cannot do is an error that names the key, not a guess (`_ONLY`, `_rope`).
- What changes no logits is passed over: dropout, jitter and auxiliary losses, which are of training; `use_cache`,
  `output_*`, `return_dict`; ids of tokens but that of pictures; `dtype` and `torch_dtype` (the weights have their own);
  `quantization_config` (the tensors show it); architectures, labels, versions, and what is for generation.
- A key that transformers' Llama 4 classes do not know is passed over, as it is there. So is a misspelt one.

Read are besides, though transformers 5.23 refuses them, the values of older files: null for `head_dim` and
`num_key_value_heads`, numbers for `attn_temperature_tuning`, 8192.0 for 8192.

Sources: `configuration_llama4.py`, `configuration_utils.py` and `modeling_rope_utils.py` of transformers 5.23.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from llama4_jax.model.config import MOST_LAYERS, FieldError, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.untrusted_json import shown, typed

_Layers = Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)]  # here, since lists of that length are made of it
_Interval = Annotated[int, msgspec.Meta(ge=1)]


class _Text(msgspec.Struct):
    """What is read of `Llama4TextConfig`. UNSET: whether the key is there makes a difference."""

    vocab_size: int = 202_048
    hidden_size: int = 5120
    intermediate_size: int = 8192
    intermediate_size_mlp: int = 16_384
    num_hidden_layers: _Layers = 48
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-5
    num_experts_per_tok: int = 1
    num_local_experts: int = 16
    moe_layers: list[int] | None = None
    interleave_moe_layer_step: int = 1
    use_qk_norm: bool = True
    no_rope_layers: list[bool | int] | None = None
    no_rope_layer_interval: _Interval = 4
    attention_chunk_size: int | None = 8192
    layer_types: list[str] | None = None
    attn_temperature_tuning: bool | int = True
    floor_scale: int | float = 8192
    attn_scale: float = 0.1
    initializer_range: float = 0.02
    rope_theta: float | UnsetType = UNSET
    rope_scaling: Any = None
    rope_parameters: Any = None
    original_max_position_embeddings: Any = UNSET


class _Vision(msgspec.Struct):
    """What is read of `Llama4VisionConfig`."""

    hidden_size: int = 768
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    num_channels: int = 3
    intermediate_size: int = 5632
    vision_output_dim: int = 7680
    image_size: int | list[int] = 448
    patch_size: int | list[int] = 14
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    rope_theta: float | UnsetType = UNSET
    rope_scaling: Any = None
    rope_parameters: Any = None


class _Pictures(msgspec.Struct):
    """What is read of `Llama4Config` beside its two parts. Its attribute_map gives the id a second name, which is set
    later, and thus decides."""

    image_token_index: int = 200_092
    image_token_id: int | UnsetType = UNSET


class _RopeKind(msgspec.Struct):
    rope_type: str | UnsetType = UNSET
    type: str = "default"
    rope_theta: float | UnsetType = UNSET


class _Llama3(msgspec.Struct):
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int | float


# What the model has no switch for: the only values it implements, the first of which is the usual one.
_ONLY: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "is_causal": (True,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None, {}),  # other sizes for some layers
    "configuration_files": (None, []),  # other files, which hold the config
}
_VISION_ONLY: dict[str, tuple] = {
    "hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("default",),
    "multi_modal_projector_bias": (False,),
    "norm_eps": (1e-5,),  # transformers' encoder has it, whatever the file says
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None, {}),
}

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
    "rope_theta": ("rope_scaling", "rope_parameters", "rope_theta"),
    "rope_scaling": ("rope_scaling", "rope_parameters"),
    "query_scale": ("attn_temperature_tuning",),
    "temperature_floor": ("floor_scale",),
    "temperature_coef": ("attn_scale",),
    "norm_eps": ("rms_norm_eps",),
    "context_length": ("max_position_embeddings",),
    "init_std": ("initializer_range",),
}
_VISION_KEYS = {
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "adapter_dim": "projector_input_dim",
    "output_dim": "projector_output_dim",
}  # others have the same name

_CHUNKED, _FULL = "chunked_attention", "full_attention"
_OLD_NAMES = {"attention": _FULL}  # of entries of layer_types


def model_config(config_json: Any, where: str = "config.json") -> ModelConfig:
    """The model that a config.json describes.

    - where: the file, for messages

    Raises ValueError as `model_config_fields` does, and for values out of range.
    """
    fields = model_config_fields(config_json, where)
    scaling = fields.pop("rope_scaling")
    try:
        return ModelConfig(
            **fields,
            rope_scaling=None if scaling is None else RopeScaling(**scaling),
            vision=vision_config(config_json, where),
        )
    except FieldError as error:
        text, prefix = _text_config(config_json, where)
        key = _first_key(error.field.partition(".")[0], text)
        raise ValueError(f"{where}: {f'{prefix}{key}: ' if key else ''}{error}") from None


def model_config_fields(config_json: Any, where: str = "config.json") -> dict[str, Any]:
    """The text fields of `ModelConfig` that a config.json determines; `rope_scaling` is a dictionary of its fields.

    Takes Llama4ForConditionalGeneration's (nested; without text_config, its defaults) and Llama4ForCausalLM's (flat),
    old keys and new. Raises ValueError, naming file and key, for another kind of model, values of a wrong type, and
    values that this model cannot express.
    """
    text, prefix = _text_config(config_json, where)
    _check_only(text, _ONLY, f"{where}: {prefix}")
    _check_only(config_json, _ONLY, f"{where}: ")
    at = f"{where}: {prefix.removesuffix('.')}" if prefix else where
    value = typed(text, _Text, where=at)
    rope_layers = _rope_layers(value, at)
    theta, scaling = _rope(value, at)
    heads = value.num_attention_heads
    return {
        "vocab_size": value.vocab_size,
        "embed_dim": value.hidden_size,
        "num_layers": value.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": heads if value.num_key_value_heads is None else value.num_key_value_heads,
        "head_dim": value.hidden_size // max(1, heads) if value.head_dim is None else value.head_dim,
        "mlp_dim": value.intermediate_size_mlp,
        "expert_mlp_dim": value.intermediate_size,
        "num_experts": value.num_local_experts,
        "top_k": value.num_experts_per_tok,
        "moe_layers": _moe_layers(value, at),
        "rope_layers": rope_layers,
        "attention_chunk": _attention_chunk(value, rope_layers, at),
        "qk_norm": value.use_qk_norm,
        "rope_theta": theta,
        "rope_scaling": scaling,
        # older files say 4 where newer ones say true
        "query_scale": "temperature" if value.attn_temperature_tuning else "none",
        "temperature_floor": _whole("floor_scale", value.floor_scale, at),
        "temperature_coef": value.attn_scale,
        "norm_eps": value.rms_norm_eps,
        "context_length": value.max_position_embeddings,
        "init_std": value.initializer_range,
    }


def provenance(config_json: dict) -> dict[str, str]:
    """Where each field of `model_config(config_json)` comes from: a key of the file, or a default."""
    text, prefix = _text_config(config_json, "config.json")
    found = {}
    for field in _KEYS:
        key = _first_key(field, text)
        found[field] = f"config.json: {prefix}{key}" if key else "default of transformers' Llama4TextConfig"
    for field in ("moe_interval", "nope_interval", "query_scale_layers", "router_bias"):
        found[field] = "layer by layer in moe_layers and rope_layers" if "interval" in field else "the architecture"
    has_vision = _vision_json(config_json, "config.json") is not None
    found["vision"] = "config.json: vision_config" if has_vision else "config.json: no vision_config"
    return found


def _first_key(field: str, text: dict) -> str | None:
    return next((key for key in _KEYS.get(field, ()) if text.get(key) not in (None, [], {})), None)


def vision_config(config_json: dict, where: str = "config.json") -> VisionConfig | None:
    """The vision encoder that a config.json describes; None for a text model, and for a file that leaves it out: the
    default of transformers' class is an encoder that cannot run. Raises ValueError as `model_config` does."""
    vision = _vision_json(config_json, where)
    if vision is None:
        return None
    at = f"{where}: vision_config"
    _check_only(vision, _VISION_ONLY, f"{at}.")
    value = typed(vision, _Vision, where=at)
    pictures = typed(config_json, _Pictures, where=where)
    if value.vision_output_dim != value.projector_output_dim:
        raise ValueError(
            f"{at}.vision_output_dim is {shown(value.vision_output_dim)}, but the adapter before it gives "
            f"projector_output_dim, {shown(value.projector_output_dim)}."
        )
    rope, kind = _rope_dict(value, at)
    if kind != "default":
        raise ValueError(f"{at}: rope_type is {shown(kind)}, but only 'default' is supported.")
    try:
        config = VisionConfig(
            embed_dim=value.hidden_size,
            num_layers=value.num_hidden_layers,
            num_heads=value.num_attention_heads,
            mlp_dim=value.intermediate_size,
            image_size=_side("image_size", value.image_size, at),
            patch_size=_side("patch_size", value.patch_size, at),
            num_channels=value.num_channels,
            pixel_shuffle_ratio=value.pixel_shuffle_ratio,
            adapter_dim=value.projector_input_dim,
            output_dim=value.projector_output_dim,
            rope_theta=_theta(rope, value, 10_000.0),
            patch_token_id=_either(pictures.image_token_id, pictures.image_token_index),
        )
    except FieldError as error:
        field = error.field.removeprefix("vision.")
        key = "image_token_index" if field == "patch_token_id" else f"vision_config.{_VISION_KEYS.get(field, field)}"
        raise ValueError(f"{where}: {key}: {error}") from None
    if config.shuffled_dim != config.mlp_dim:
        # transformers gives the adapter's first layer intermediate_size inputs
        raise ValueError(
            f"{at}.intermediate_size is {config.mlp_dim}, but the pixel shuffle makes vectors of hidden_size / "
            f"pixel_shuffle_ratio² = {config.shuffled_dim} for the adapter."
        )
    return config


def _either(first: Any, second: Any) -> Any:
    return second if first is UNSET else first


def _vision_json(config_json: dict, where: str) -> dict | None:
    vision = config_json.get("vision_config") if config_json.get("model_type") == "llama4" else None
    return vision if vision is None else typed(vision, dict, where=f"{where}: vision_config")


def _side(key: str, size: int | Sequence[int], at: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{at}.{key} must be square, got {shown(size)}.")
    return sides.pop()


def _text_config(config_json: Any, where: str) -> tuple[dict, str]:
    """The part of a config.json that is of the text model, and what comes before the names of its keys."""
    kind = typed(config_json, dict, where=where).get("model_type")
    if kind == "llama4_text":
        return config_json, ""
    if kind != "llama4":
        raise ValueError(f"{where}: model_type is {shown(kind)}, expected 'llama4' or 'llama4_text'.")
    if config_json.get("text_config") is not None:
        return typed(config_json["text_config"], dict, where=f"{where}: text_config"), "text_config."
    # Llama4ForCausalLM.from_pretrained reads the keys of the file itself, if it has them.
    flat = set(_Text.__struct_fields__) & config_json.keys()
    return (config_json if flat else {}), ""


def _check_only(section: dict, only: dict[str, tuple], prefix: str) -> None:
    for key, allowed in only.items():
        if key in section and section[key] not in allowed:
            raise ValueError(f"{prefix}{key} is {shown(section[key])}, but only {allowed[0]!r} is supported.")


def _whole(key: str, number: int | float, at: str) -> int:
    if isinstance(number, float) and not number.is_integer():  # inf and NaN are none either
        raise ValueError(f"{at}: {key} must be a whole number of tokens, got {number}.")
    return int(number)


def _rope_layers(value: _Text, at: str) -> tuple[bool, ...]:
    """`no_rope_layers` is named backwards: 1 is a layer that has RoPE. Empty, it follows from the interval."""
    explicit, num_layers = value.no_rope_layers, value.num_hidden_layers
    if not explicit:
        return tuple((i + 1) % value.no_rope_layer_interval != 0 for i in range(num_layers))
    if len(explicit) < num_layers:
        raise ValueError(f"{at}: no_rope_layers has {len(explicit)} entries, but there are {num_layers} layers.")
    return tuple(bool(uses_rope) for uses_rope in explicit[:num_layers])


def _moe_layers(value: _Text, at: str) -> tuple[bool, ...]:
    num_layers = value.num_hidden_layers
    if value.moe_layers is None:
        step = value.interleave_moe_layer_step  # dense models have 0, and an empty moe_layers
        if step < 1:
            raise ValueError(f"{at}: interleave_moe_layer_step must be at least 1, got {shown(step)}.")
        return tuple((i + 1) % step == 0 for i in range(num_layers))
    explicit = set(value.moe_layers)
    outside = sorted(layer for layer in explicit if not 0 <= layer < num_layers)
    if outside:
        raise ValueError(f"{at}: moe_layers names {shown(outside)}, but there are {num_layers} layers.")
    return tuple(layer in explicit for layer in range(num_layers))


def _attention_chunk(value: _Text, rope_layers: Sequence[bool], at: str) -> int | None:
    """Chunked are the RoPE layers, or none at all."""
    if value.layer_types is None:
        return value.attention_chunk_size
    types = [_OLD_NAMES.get(kind, kind) for kind in value.layer_types]
    if len(types) != len(rope_layers):
        raise ValueError(f"{at}: layer_types has {len(types)} entries, but there are {len(rope_layers)} layers.")
    if all(kind == _FULL for kind in types):
        return None
    for i, (kind, uses_rope) in enumerate(zip(types, rope_layers, strict=True)):
        if kind != (_CHUNKED if uses_rope else _FULL):
            raise ValueError(
                f"{at}: layer_types must be chunked_attention on the layers with RoPE and full_attention on the others "
                f"(or full_attention on all), but layer {i} ({'RoPE' if uses_rope else 'no RoPE'}) is {shown(kind)}."
            )
    return value.attention_chunk_size


def _rope_dict(value: _Text | _Vision, at: str) -> tuple[dict[str, Any], str]:
    """The dictionary of RoPE, of the old name if that is there and not empty; and its kind."""
    name = "rope_scaling" if value.rope_scaling else "rope_parameters"
    rope = typed(getattr(value, name) or {}, dict[str, Any], where=f"{at}: {name}")
    for key, inner in rope.items():
        if isinstance(inner, dict):
            raise ValueError(
                f"{at}: {name}.{shown(key)} is an object: parameters for a type of layer are not supported."
            )
    if rope.get("partial_rotary_factor") not in (None, 1):
        got = shown(rope["partial_rotary_factor"])
        raise ValueError(f"{at}: {name}.partial_rotary_factor is {got}, but only 1 is supported.")
    kind = typed(rope, _RopeKind, where=f"{at}: {name}")
    return rope, _either(kind.rope_type, kind.type)


def _theta(rope: dict[str, Any], value: _Text | _Vision, default: float) -> float:
    return float(rope["rope_theta"]) if "rope_theta" in rope else _either(value.rope_theta, default)


def _rope(value: _Text, at: str) -> tuple[float, dict[str, Any] | None]:
    """Theta and the scaling. Theta stands in the dictionary, or beside it. So does `original_max_position_embeddings`,
    but there the one beside it decides, whatever the dictionary says."""
    rope, kind = _rope_dict(value, at)
    theta = _theta(rope, value, 500_000.0)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{at}: rope_type is {shown(kind)}, but only 'default' and 'llama3' are supported.")
    missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in rope]
    if missing:
        raise ValueError(f"{at}: rope scaling of type 'llama3' lacks {', '.join(missing)}.")
    original = "original_max_position_embeddings"
    beside = _either(value.original_max_position_embeddings, rope.get(original, value.max_position_embeddings))
    scaling = typed({**rope, original: beside}, _Llama3, where=f"{at}: rope scaling")
    return theta, {
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_context": _whole(original, scaling.original_max_position_embeddings, at),
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
    if vision.norm_eps != 1e-5:
        raise ValueError(f"Hugging Face's encoder has norms of 1e-5, so vision.norm_eps cannot be {vision.norm_eps}.")
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

"""Meta's params.json ↔ `ModelConfig`.

Defaults are those of `ModelArgs` in llama-models 0.3.0, since a key that a file leaves out has that value there. Widths
are not in the file: Meta's modules derive them from multipliers, and so does this. Sources: `args.py`, `model.py`
(TransformerBlock), `moe.py` and `vision/` of llama-models 0.3.0.
"""

import dataclasses
from typing import Annotated, Any

import msgspec

from llama4_jax.model.config import MOST_LAYERS, FieldError, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.model.presets import PRESETS
from llama4_jax.untrusted_json import shown, typed

_Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]  # here, since widths are computed from it


class _Experts(msgspec.Struct):
    """What is read of `MoEArgs`."""

    num_experts: int = -1
    capacity_factor: float = 1.0
    auto_scale_F: bool = True
    top_k: int = 1
    interleave_moe_layer_step: int = 1


class _Sides(msgspec.Struct):
    height: int
    width: int


class _Vision(msgspec.Struct):
    """What is read of `VisionArgs`."""

    image_size: _Sides
    patch_size: _Sides
    dim: _Size
    n_layers: int
    n_heads: int
    mlp_ratio: float
    output_dim: int
    pixel_shuffle_ratio: float


class _Args(msgspec.Struct):
    """What is read of `ModelArgs`. Names that it does not know are passed over, as they are there."""

    dim: _Size
    n_layers: Annotated[int, msgspec.Meta(ge=1, le=MOST_LAYERS)]
    n_heads: _Size
    n_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = -1
    multiple_of: _Size = 256
    ffn_dim_multiplier: float | None = None
    ffn_exp: float | None = None
    norm_eps: float = 1e-5
    attention_chunk_size: int | None = None
    rope_theta: float = 500_000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float | None = None
    rope_high_freq_factor: float | None = None
    nope_layer_interval: int | None = None
    use_qk_norm: bool = False
    attn_temperature_tuning: bool = False
    floor_scale: float = 8192.0
    attn_scale: float = 0.1
    vision_args: _Vision | None = None
    moe_args: _Experts | None = None
    lora_args: Any = None


_REQUIRED = ("dim", "n_layers", "n_heads")
_MAX_TOKENS = 131_072  # Meta's files do not say how long a context may be

# Where each field of ours comes from.
_KEYS = {
    "vocab_size": ("vocab_size",),
    "embed_dim": ("dim",),
    "num_layers": ("n_layers",),
    "num_heads": ("n_heads",),
    "num_kv_heads": ("n_kv_heads",),
    "head_dim": ("dim", "n_heads"),
    "mlp_dim": ("dim", "ffn_dim_multiplier", "multiple_of"),
    "expert_mlp_dim": ("dim", "ffn_exp", "ffn_dim_multiplier", "multiple_of", "moe_args"),
    "num_experts": ("moe_args",),
    "top_k": ("moe_args",),
    "moe_interval": ("moe_args",),
    "nope_interval": ("nope_layer_interval",),
    "attention_chunk": ("attention_chunk_size",),
    "qk_norm": ("use_qk_norm",),
    "rope_theta": ("rope_theta",),
    "rope_scaling": ("use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"),
    "query_scale": ("attn_temperature_tuning",),
    "temperature_floor": ("floor_scale",),
    "temperature_coef": ("attn_scale",),
    "norm_eps": ("norm_eps",),
    "vision": ("vision_args",),
}


def model_config(params: Any, where: str = "params.json") -> ModelConfig:
    """The model that a params.json describes, be it flat or inside "model".

    - where: the file, for messages

    Raises ValueError, naming file and key, for a key that is missing, values of a wrong type or out of range, and
    values that this model cannot express.
    """
    flat, prefix = _flat(params, where)
    missing = [key for key in _REQUIRED if key not in flat]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing. Is it that of a Llama 4?")
    value = typed(flat, _Args, where=f"{where}: {prefix.removesuffix('.')}" if prefix else where)
    if value.vocab_size < 1:
        raise ValueError(f"{where}: vocab_size is missing: write the number of rows of tok_embeddings into it.")
    if value.lora_args is not None:
        raise ValueError(f"{where}: lora_args are not supported: merge the adapters into the weights first.")
    if value.head_dim not in (None, value.dim // value.n_heads):
        raise ValueError(f"{where}: head_dim is {shown(value.head_dim)}, but Meta's attention has dim / n_heads.")
    moe = value.moe_args
    if moe is not None and moe.interleave_moe_layer_step < 1:
        step = shown(moe.interleave_moe_layer_step)
        raise ValueError(f"{where}: moe_args.interleave_moe_layer_step must be at least 1, got {step}.")
    try:
        config = ModelConfig(
            vocab_size=value.vocab_size,
            embed_dim=value.dim,
            num_layers=value.n_layers,
            num_heads=value.n_heads,
            num_kv_heads=value.n_heads if value.n_kv_heads is None else value.n_kv_heads,
            head_dim=value.dim // value.n_heads,
            mlp_dim=_dense_width(value, where),
            expert_mlp_dim=0 if moe is None else _expert_width(value, moe, where),
            num_experts=0 if moe is None else moe.num_experts,
            top_k=0 if moe is None else moe.top_k,
            moe_interval=0 if moe is None else moe.interleave_moe_layer_step,
            nope_interval=value.nope_layer_interval or 0,
            attention_chunk=value.attention_chunk_size,
            qk_norm=value.use_qk_norm,
            rope_theta=value.rope_theta,
            rope_scaling=_rope_scaling(value),
            query_scale="temperature" if value.attn_temperature_tuning else "none",
            temperature_floor=_whole("floor_scale", value.floor_scale, where),
            temperature_coef=value.attn_scale,
            norm_eps=value.norm_eps,
            context_length=_MAX_TOKENS,
            vision=None if value.vision_args is None else _vision(value.vision_args, where),
        )
    except FieldError as error:
        keys = _KEYS.get(error.field.partition(".")[0], ())
        there = [prefix + key for key in keys if key in flat]
        raise ValueError(f"{where}: {', '.join(there)}{': ' if there else ''}{error}") from None
    _, context_length = _context_length(config)
    return dataclasses.replace(config, context_length=context_length)


def provenance(params: dict) -> dict[str, str]:
    """Where each field of `model_config(params)` comes from: keys of the file, or a default."""
    flat, prefix = _flat(params, "params.json")
    where = f"params.json: {prefix}"
    found = {}
    for field, keys in _KEYS.items():
        there = [key for key in keys if key in flat]
        derived = "derived from " if field in ("head_dim", "mlp_dim", "expert_mlp_dim") else ""
        found[field] = derived + where + ", ".join(there) if there else "default of llama-models' ModelArgs"
    found["context_length"], _ = _context_length(model_config(params))
    for field in ("moe_layers", "rope_layers"):
        found[field] = "by moe_interval and nope_interval"
    for field in ("query_scale_layers", "router_bias", "init_std"):
        found[field] = "the architecture" if field != "init_std" else "default: Meta's files do not say"
    return found


def _flat(params: Any, where: str) -> tuple[dict, str]:
    """The arguments of the model, and what comes before their names."""
    inner = typed(params, dict, where=where).get("model")
    return (inner, "model.") if isinstance(inner, dict) else (params, "")


def _whole(key: str, number: float, where: str) -> int:
    if not float(number).is_integer():  # inf and NaN are none either
        raise ValueError(f"{where}: {key} must be a whole number, got {number}.")
    return int(number)


def _factor(key: str, number: float, where: str) -> float:
    """What a width is multiplied by."""
    if not 0 < number <= 1e6:  # nor is NaN
        raise ValueError(f"{where}: {key} must be positive, and 1,000,000 at most, got {number}.")
    return number


def _context_length(config: ModelConfig) -> tuple[str, int]:
    """Where it is from, and what it is."""
    sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_experts", "qk_norm")
    for name, preset in PRESETS.items():
        if all(getattr(config, size) == getattr(preset, size) for size in sizes):
            return f"preset {name!r}, whose sizes these are", preset.context_length
    return "default: Meta's files do not say", _MAX_TOKENS


def _dense_width(value: _Args, where: str) -> int:
    width = int(2 * int(4 * value.dim) / 3)
    if value.ffn_dim_multiplier is not None:
        width = int(_factor("ffn_dim_multiplier", value.ffn_dim_multiplier, where) * width)
    return width + -width % value.multiple_of


def _expert_width(value: _Args, moe: _Experts, where: str) -> int:
    if value.ffn_exp is None or value.ffn_dim_multiplier is None:
        lost = "ffn_exp" if value.ffn_exp is None else "ffn_dim_multiplier"
        raise ValueError(f"{where}: {lost} is missing, from which the width of the experts is derived.")
    hidden = int(2 * int(_factor("ffn_exp", value.ffn_exp, where) * value.dim) / 3)
    width = int(_factor("ffn_dim_multiplier", value.ffn_dim_multiplier, where) * hidden)
    if moe.auto_scale_F:
        width = int(width / (_factor("moe_args.capacity_factor", moe.capacity_factor, where) + 1))
    return width + -width % value.multiple_of


def _rope_scaling(value: _Args) -> RopeScaling | None:
    if not value.use_scaled_rope:
        return None
    # The released Scout leaves both out; Meta's code then takes these.
    return RopeScaling(
        factor=16.0 if value.rope_scaling_factor is None else value.rope_scaling_factor,
        low_freq_factor=1.0,
        high_freq_factor=1.0 if value.rope_high_freq_factor is None else value.rope_high_freq_factor,
        original_context=8192,
    )


def _vision(args: _Vision, where: str) -> VisionConfig:
    for key in ("image_size", "patch_size"):
        sides = getattr(args, key)
        if sides.height != sides.width:
            got = f"{shown(sides.height)} x {shown(sides.width)}"
            raise ValueError(f"{where}: vision_args.{key} must be square, got {got}.")
    return VisionConfig(
        embed_dim=args.dim,
        num_layers=args.n_layers,
        num_heads=args.n_heads,
        mlp_dim=int(args.dim * _factor("vision_args.mlp_ratio", args.mlp_ratio, where)),
        image_size=args.image_size.height,
        patch_size=args.patch_size.height,
        pixel_shuffle_ratio=args.pixel_shuffle_ratio,
        adapter_dim=args.output_dim,
        output_dim=args.output_dim,
    )


def to_params(config: ModelConfig) -> dict:
    """The params.json of the same model. Raises ValueError for what Meta's code cannot do."""
    problems = []
    if config.head_dim * config.num_heads != config.embed_dim:
        problems.append(f"head_dim ({config.head_dim}) must be embed_dim / num_heads")
    intervals = {"nope_interval": [not s.rope for s in config.layers], "moe_interval": [s.moe for s in config.layers]}
    found = {}
    for name, pattern in intervals.items():
        options = [0, *range(1, config.num_layers + 1)]
        fitting = [n for n in options if pattern == [n > 0 and (i + 1) % n == 0 for i in range(config.num_layers)]]
        if not fitting:
            problems.append(f"its layers must follow a {name}")
        found[name] = (fitting or [0])[0]
    scaling = config.rope_scaling
    if scaling is not None and (scaling.low_freq_factor, scaling.original_context) != (1.0, 8192):
        problems.append("rope_scaling must have a low_freq_factor of 1 and an original_context of 8192")
    if config.query_scale not in ("none", "temperature"):
        problems.append(f"query_scale must be 'none' or 'temperature', got {config.query_scale!r}")
    if any(s.rope and s.query_scale != "none" for s in config.layers):
        problems.append("query_scale_layers must be 'nope'")
    if config.router_bias:
        problems.append("router_bias must be False")
    vision = config.vision
    if vision is not None and vision.adapter_dim != vision.output_dim:
        problems.append("vision.adapter_dim must equal vision.output_dim")
    if vision is not None and vision.patch_token_id != 200_092:
        problems.append(f"vision.patch_token_id must be that of its tokenizer, 200092, got {vision.patch_token_id}")
    if problems:
        raise ValueError(f"Meta's Llama 4 cannot be this model: {'; '.join(problems)}.")
    moe_interval = found["moe_interval"]
    params: dict[str, Any] = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": scaling is not None,
        "nope_layer_interval": found["nope_interval"] or None,
        "attention_chunk_size": config.attention_chunk,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.query_scale == "temperature",
        "floor_scale": float(config.temperature_floor),
        "attn_scale": config.temperature_coef,
    }
    if scaling is not None:
        params |= {"rope_scaling_factor": scaling.factor, "rope_high_freq_factor": scaling.high_freq_factor}
    if moe_interval:
        params["moe_args"] = {
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "interleave_moe_layer_step": moe_interval,
        }
    if vision is not None:
        params["vision_args"] = {
            "image_size": {"height": vision.image_size, "width": vision.image_size},
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "dim": vision.embed_dim,
            "n_layers": vision.num_layers,
            "n_heads": vision.num_heads,
            "mlp_ratio": vision.mlp_dim / vision.embed_dim,
            "output_dim": vision.output_dim,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        }
    return params | _multipliers(config, params)


def _multipliers(config: ModelConfig, params: dict) -> dict:
    """What makes Meta's modules derive our widths: as in the released files if that does, else exact fractions."""
    has_dense, has_experts = not all(s.moe for s in config.layers), "moe_args" in params
    released = {"multiple_of": 2048, "ffn_dim_multiplier": 1.2, "ffn_exp": 4.0}
    plain = 2 * int(4 * config.embed_dim) / 3  # width of a dense feed-forward before the multiplier
    wanted = config.mlp_dim if has_dense else config.expert_mlp_dim
    exact = {"multiple_of": 1, "ffn_dim_multiplier": (wanted + 0.5) / int(plain), "ffn_exp": 4.0}
    options = [(released, True), (exact, False)]
    if has_dense and has_experts:
        # the hidden size whose two thirds, times the multiplier, are the experts' width
        multiplier = exact["ffn_dim_multiplier"]
        hidden = next(
            (h for h in range(1, 64 * config.embed_dim) if int(multiplier * int(2 * h / 3)) == config.expert_mlp_dim), 0
        )
        options.append(({**exact, "ffn_exp": (hidden + 0.5) / config.embed_dim}, False))
    for multipliers, auto_scale in options:
        changes: dict[str, Any] = dict(multipliers)
        if has_experts:
            changes["moe_args"] = {**params["moe_args"], "auto_scale_F": auto_scale}
        derived = model_config(params | changes)
        if (not has_dense or derived.mlp_dim == config.mlp_dim) and (
            not has_experts or derived.expert_mlp_dim == config.expert_mlp_dim
        ):
            return changes
    raise ValueError(
        f"Meta's multipliers give no model with mlp_dim {config.mlp_dim} and expert_mlp_dim {config.expert_mlp_dim}."
    )

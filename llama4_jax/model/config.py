"""What a Llama 4 is, as data: sizes, and one `LayerSpec` a layer.

The layer pattern is computed once, here. Nothing else in the model does modulo arithmetic over layer numbers.
Sources: `Llama4TextConfig` of transformers 5.23 and `ModelArgs` of llama-models 0.3.0.

Every config, wherever it is read, is checked here: types, and ranges. Upper bounds are far above any real model; they
are there so that a damaged or hostile file is refused at once, and not after minutes of building its billion layers.
"""

import dataclasses
import fnmatch
import functools
import math
import typing
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from llama4_jax.untrusted_json import shown

QueryScaleKind = Literal["none", "temperature", "ssmax", "ssmax_bias"]

_INT32 = 2**31 - 1  # token ids and positions are int32
_WIDTH = 2**24
_HEADS = 2**16
MOST_LAYERS = 2**12
_SIDE = 2**16  # pixels
_EXPERTS = 2**16
_ALL_EXPERTS = 2**18  # of all layers together
_LEAST_FLOAT, _LARGEST_FLOAT = 1.1754943508222875e-38, 3.4028234663852886e38  # normal numbers of float32


class FieldError(ValueError):
    """A field of a config has a value that it cannot have.

    - field: its path, as "norm_eps" or "vision.embed_dim"
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"model.{field} {problem}")
        self.field = field


def _check_int(field: str, value: Any, least: int, most: int, or_else: str = "") -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise FieldError(field, f"must be a whole number, got {shown(value)}.")
    if value < least:
        raise FieldError(field, f"must be at least {least}{or_else}, got {shown(value)}.")
    if value > most:
        raise FieldError(field, f"must be at most {most:,}, got {shown(value)}.")


def _check_float(field: str, value: Any, least: float = -_LARGEST_FLOAT, most: float = _LARGEST_FLOAT) -> None:
    """`least` may be _LEAST_FLOAT: what is smaller is 0 where it is used, in float32."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise FieldError(field, f"must be a number, got {shown(value)}.")
    if not least <= value <= most:  # NaN is not
        if math.isfinite(value) and least == _LEAST_FLOAT and value < least:
            raise FieldError(field, f"must be positive (in float32, from 1.2e-38 on), got {shown(value)}.")
        of = f"a finite number{' of 0 or more' if least == 0 else ''}, at most {most:.3g}"
        raise FieldError(field, f"must be {of}, got {shown(value)}.")


def _check_choice(field: str, value: Any, choices: tuple) -> None:
    if not isinstance(value, type(choices[0])) or value not in choices:
        raise FieldError(field, f"must be one of {', '.join(map(repr, choices))}, got {shown(value)}.")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling: wavelengths above `original_context / low_freq_factor` are stretched by
    `factor`, those below `original_context / high_freq_factor` are kept, and those between are blended.

    Scout uses 16, 1, 1, 8192: low equals high, so the blend is empty and the cut is hard.
    """

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 8192

    def __post_init__(self):
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _check_float(f"rope_scaling.{name}", getattr(self, name), _LEAST_FLOAT)
        _check_int("rope_scaling.original_context", self.original_context, 1, _INT32)
        if self.low_freq_factor > self.high_freq_factor:
            raise FieldError(
                "rope_scaling.low_freq_factor",
                f"({self.low_freq_factor}) must not exceed rope_scaling.high_freq_factor ({self.high_freq_factor}).",
            )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the vision encoder (a ViT), its adapter and its projector. Source: `Llama4VisionConfig` of transformers
    5.23, `VisionArgs` of llama-models 0.3.0. Raises ValueError for sizes that do not fit together."""

    embed_dim: int = 1408
    num_layers: int = 34
    num_heads: int = 16
    mlp_dim: int = 5632
    image_size: int = 336  # pixels of a tile's side
    patch_size: int = 14  # pixels of a patch's side
    num_channels: int = 3
    pixel_shuffle_ratio: float = 0.5  # each side of the grid of patches becomes this much shorter, and vectors longer
    adapter_dim: int = 4096
    output_dim: int = 4096  # of the adapter; the projector takes it to the text model's embed_dim
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    patch_token_id: int = 200_092  # of `<|patch|>`: the features take the places of these tokens

    def __post_init__(self):
        most = {
            "num_layers": MOST_LAYERS, "num_heads": _HEADS, "image_size": _SIDE, "patch_size": _SIDE,
            "num_channels": 2**10, "embed_dim": _WIDTH, "mlp_dim": _WIDTH, "adapter_dim": _WIDTH, "output_dim": _WIDTH,
        }  # fmt: skip
        for name, largest in most.items():
            _check_int(f"vision.{name}", getattr(self, name), 1, largest)
        _check_int("vision.patch_token_id", self.patch_token_id, 0, _INT32)
        for name in ("rope_theta", "norm_eps"):
            _check_float(f"vision.{name}", getattr(self, name), _LEAST_FLOAT)
        _check_float("vision.pixel_shuffle_ratio", self.pixel_shuffle_ratio, 1 / _SIDE, 1.0)
        for name, of in (("num_heads", "embed_dim"), ("patch_size", "image_size")):
            if getattr(self, of) % getattr(self, name):
                raise FieldError(
                    f"vision.{of}",
                    f"({getattr(self, of)}) must be a multiple of model.vision.{name} ({getattr(self, name)}).",
                )
        if self.head_dim % 4:
            raise FieldError(
                "vision.embed_dim",
                f"/ num_heads must be a multiple of 4 for RoPE's pairs in two dimensions, got {self.head_dim}.",
            )
        side = self.image_size // self.patch_size
        if self.shuffle * self.pixel_shuffle_ratio != 1 or side % self.shuffle:
            raise FieldError(
                "vision.pixel_shuffle_ratio",
                f"must be 1, 1/2, 1/3 … and divide the {side} patches of a tile's side, got "
                f"{self.pixel_shuffle_ratio}.",
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def num_patches(self) -> int:
        """Of one tile, before the pixel shuffle."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def shuffle(self) -> int:
        """The pixel shuffle joins squares of so many patches a side."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def shuffled_dim(self) -> int:
        """Width after the pixel shuffle."""
        return self.embed_dim * self.shuffle**2

    @property
    def tokens_per_tile(self) -> int:
        """Features of one tile, and `<|patch|>` tokens that they take the places of."""
        return self.num_patches // self.shuffle**2


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Everything that distinguishes one layer from another."""

    rope: bool  # rotary positions; False is a NoPE layer
    chunk: int | None  # attention stays inside chunks of this many positions; None attends to the whole past
    moe: bool  # routed and shared experts; False is a dense feed-forward
    qk_norm: bool  # weightless RMS norm of queries and keys, after RoPE
    query_scale: QueryScaleKind


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of the text model. Lengths are in tokens.

    What no layer has may be 0: `num_experts`, `top_k` and `expert_mlp_dim` of a dense model, `mlp_dim` of one whose
    layers all have experts.

    Raises FieldError, a ValueError that names the field, for values out of range and those that do not fit together.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int  # width of a dense feed-forward (Hugging Face: intermediate_size_mlp)
    expert_mlp_dim: int  # width of a routed expert, and of the shared one (Hugging Face: intermediate_size)
    num_experts: int = 16
    top_k: int = 1

    moe_interval: int = 1  # layer i has experts iff (i + 1) % moe_interval == 0; 0: no layer has
    moe_layers: tuple[bool, ...] | None = None  # says it layer by layer instead
    nope_interval: int = 4  # layer i has no RoPE, and global attention, iff (i + 1) % nope_interval == 0; 0: none
    rope_layers: tuple[bool, ...] | None = None  # says it layer by layer instead: True uses RoPE

    attention_chunk: int | None = 8192  # of the RoPE layers; None: they are global too
    qk_norm: bool = True  # of the RoPE layers
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None

    query_scale: QueryScaleKind = "temperature"
    query_scale_layers: Literal["nope", "all"] = "nope"
    temperature_floor: int = 8192  # q *= 1 + coef * ln(floor((position + 1) / floor) + 1)
    temperature_coef: float = 0.1

    router_bias: bool = False  # experts are chosen by gate + bias, the bias kept by loss-free balancing

    norm_eps: float = 1e-5
    context_length: int = 8192  # the longest sequence that the model is meant for
    init_std: float = 0.02

    vision: VisionConfig | None = None  # None: the model reads text alone

    def __post_init__(self):
        most = {
            "vocab_size": _INT32, "embed_dim": _WIDTH, "num_layers": MOST_LAYERS, "num_heads": _HEADS,
            "num_kv_heads": _HEADS, "head_dim": _HEADS, "temperature_floor": _INT32, "context_length": _INT32,
        }  # fmt: skip
        for name, largest in most.items():
            _check_int(name, getattr(self, name), 1, largest)
        for name in ("moe_interval", "nope_interval"):
            _check_int(name, getattr(self, name), 0, _INT32, " (never)")
        if self.attention_chunk is not None:
            _check_int("attention_chunk", self.attention_chunk, 1, _INT32, " or None")
        for name in ("rope_theta", "norm_eps"):
            _check_float(name, getattr(self, name), _LEAST_FLOAT)
        _check_float("init_std", self.init_std, 0.0)
        _check_float("temperature_coef", self.temperature_coef)
        for name in ("qk_norm", "router_bias"):
            _check_choice(name, getattr(self, name), (False, True))
        _check_choice("query_scale", self.query_scale, typing.get_args(QueryScaleKind))
        _check_choice("query_scale_layers", self.query_scale_layers, ("nope", "all"))
        if self.num_heads % self.num_kv_heads:
            raise FieldError(
                "num_heads",
                f"({self.num_heads}) must be a multiple of model.num_kv_heads ({self.num_kv_heads}): each key/value "
                f"head serves a group of query heads.",
            )
        if self.head_dim % 2:
            raise FieldError("head_dim", f"must be even for RoPE's pairs, got {self.head_dim}.")
        for name in ("moe_layers", "rope_layers"):
            self._check_pattern(name)
        self._check_experts()

    def _check_pattern(self, name: str) -> None:
        explicit = getattr(self, name)
        if explicit is None:
            return
        if not isinstance(explicit, tuple) or len(explicit) != self.num_layers:
            got = len(explicit) if isinstance(explicit, tuple) else shown(explicit)
            raise FieldError(name, f"must have one entry for each of the {self.num_layers} layers, got {got}.")
        wrong = next((entry for entry in explicit if not isinstance(entry, bool)), None)
        if wrong is not None:
            raise FieldError(name, f"must be of True and False, got {shown(wrong)}.")

    def _check_experts(self) -> None:
        with_experts = sum(self._layer(i).moe for i in range(self.num_layers))
        least = min(1, with_experts)
        _check_int("num_experts", self.num_experts, least, _EXPERTS)
        _check_int("top_k", self.top_k, least, _EXPERTS)
        _check_int("expert_mlp_dim", self.expert_mlp_dim, least, _WIDTH)
        _check_int("mlp_dim", self.mlp_dim, min(1, self.num_layers - with_experts), _WIDTH)
        if with_experts and self.top_k > self.num_experts:
            raise FieldError("top_k", f"({self.top_k}) must not exceed model.num_experts ({self.num_experts}).")
        if with_experts * self.num_experts > _ALL_EXPERTS:
            raise FieldError(
                "num_experts", f"x the layers that have them must be at most {_ALL_EXPERTS:,}, got "
                f"{self.num_experts} x {with_experts}."
            )  # fmt: skip

    @functools.cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layer pattern, one spec a layer."""
        return tuple(self._layer(i) for i in range(self.num_layers))

    def _layer(self, i: int) -> LayerSpec:
        def every(interval: int) -> bool:
            return interval > 0 and (i + 1) % interval == 0

        rope = not every(self.nope_interval) if self.rope_layers is None else self.rope_layers[i]
        moe = every(self.moe_interval) if self.moe_layers is None else self.moe_layers[i]
        scaled = self.query_scale_layers == "all" or not rope
        return LayerSpec(
            rope=rope,
            chunk=self.attention_chunk if rope else None,
            moe=moe,
            qk_norm=self.qk_norm and rope,
            query_scale=self.query_scale if scaled else "none",
        )

    @functools.cached_property
    def period(self) -> int:
        """Length of the shortest group of layers whose repetition gives the pattern, cut at the end."""
        numbers: dict[LayerSpec, int] = {}  # of each kind of layer
        pattern = [numbers.setdefault(spec, len(numbers)) for spec in self.layers]
        return next(n for n in range(1, self.num_layers + 1) if pattern[n:] == pattern[:-n])

    @property
    def num_moe_layers(self) -> int:
        return sum(spec.moe for spec in self.layers)


Matmul = Literal["default", "bf16", "fp8", "fp8_row", "fp8_block", "fp8_e5m2"]
MATMULS: tuple[str, ...] = typing.get_args(Matmul)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Which number formats are used where. Positions, angles, norms, router and softmax are float32 always."""

    params: str = "float32"  # parameters as they are stored and updated
    compute: str = "float32"  # activations and operands of the matrix products
    logits: str = "float32"  # what the model returns
    matmul: Matmul = "default"  # the products of linear layers and experts; see `llama4_jax.ops.dot_general`
    # Exceptions, "PATTERN=MATMUL", the first that fits: layers.0.*=bf16, *.moe.experts=fp8_row, vision.*=default.
    # The router and the head keep the default, unless a pattern ends in their name: *.moe.router=fp8.
    rules: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("params", "compute", "logits"):
            value = getattr(self, name)
            if value not in ("float32", "bfloat16"):
                raise ValueError(f"precision.{name} must be float32 or bfloat16, got {value!r}.")
        for rule in self.rules:
            pattern, equals, matmul = rule.rpartition("=")
            if not equals or not pattern or matmul not in MATMULS:
                raise ValueError(
                    f"precision.rules: {rule!r} must be PATTERN=MATMUL, such as layers.0.*=bf16, with a matmul of "
                    f"{', '.join(MATMULS)}."
                )

    def rule_for(self, layer: str) -> str | None:
        """The rule that decides for the linear layer of this name, such as layers.3.attention.q; None: none does."""
        return next((rule for rule in self.rules if selects(rule.rpartition("=")[0], layer)), None)

    def matmul_of(self, layer: str) -> str:
        rule = self.rule_for(layer)
        if rule is not None:
            return rule.rpartition("=")[2]
        return "default" if layer.rpartition(".")[2] in _EXACT else self.matmul


# They decide which expert, and which token: chosen only by their own name.
_EXACT = ("router", "lm_head")


def selects(pattern: str, layer: str) -> bool:
    """Whether a pattern such as layers.*.attention.* chooses the linear layer of this name, as `model.names` has it.
    Router and output head are chosen only by a pattern that ends in their name: *.moe.router."""
    last = layer.rpartition(".")[2]
    return fnmatch.fnmatchcase(layer, pattern) and (last not in _EXACT or pattern.rpartition(".")[2] == last)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): each chosen linear layer W becomes W + scale · A · B, and A and B alone
    learn. B begins at 0, so that the first step is that of the base. Raises ValueError for values out of range."""

    rank: int = 0  # of A · B; 0: no adapters, all parameters learn
    alpha: float = 32.0  # scale = alpha / rank
    rslora: bool = False  # scale = alpha / sqrt(rank) (arXiv 2312.03732)
    dropout: float = 0.0  # of the inputs of A, in training; of routed experts, whole inputs of an expert in a step
    # Patterns of names: layers.*.attention.q, layers.*.moe.experts, vision.*, projector, lm_head … The router and the
    # output head are chosen by a pattern that ends in their name: *.moe.router.
    targets: tuple[str, ...] = ("layers.*",)

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or not 0 <= self.rank <= _WIDTH:
            raise ValueError(f"lora.rank must be a whole number of 0 (no adapters) or more, got {shown(self.rank)}.")
        if not (isinstance(self.alpha, Real) and 0 < self.alpha <= _LARGEST_FLOAT):
            raise ValueError(f"lora.alpha must be a positive number, got {shown(self.alpha)}.")
        if not (isinstance(self.dropout, Real) and 0 <= self.dropout < 1):
            raise ValueError(f"lora.dropout must be in [0, 1), got {shown(self.dropout)}.")
        if self.rank and not self.targets:
            raise ValueError(
                'lora.targets is empty: name the layers that get adapters, such as "layers.*.attention.*".'
            )
        if not self.rank and any(getattr(self, field.name) != field.default for field in dataclasses.fields(self)):
            raise ValueError(
                "lora.rank is 0, which is no adapters, but other fields of lora are set: give --lora.rank."
            )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def difference(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """One line for each field in which two configurations differ: `name: ours != theirs`."""
    return [
        f"{field.name}: {getattr(ours, field.name)!r} != {getattr(theirs, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]

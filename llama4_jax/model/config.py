"""What a Llama 4 is, as data: sizes, and one `LayerSpec` a layer.

The layer pattern is computed once, here. Nothing else in the model does modulo arithmetic over layer numbers.
Sources: `Llama4TextConfig` of transformers 5.23 and `ModelArgs` of llama-models 0.3.0.
"""

import dataclasses
import fnmatch
import functools
import typing
from dataclasses import dataclass
from typing import Literal

QueryScaleKind = Literal["none", "temperature", "ssmax", "ssmax_bias"]


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
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_context"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rope_scaling.{name} must be positive, got {getattr(self, name)}.")
        if self.low_freq_factor > self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor ({self.low_freq_factor}) must not exceed "
                f"rope_scaling.high_freq_factor ({self.high_freq_factor})."
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
        sizes = ("embed_dim", "num_layers", "num_heads", "mlp_dim", "image_size", "patch_size", "num_channels",
                 "adapter_dim", "output_dim")  # fmt: skip
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model.vision.{name} must be at least 1, got {getattr(self, name)}.")
        for name, of in (("num_heads", "embed_dim"), ("patch_size", "image_size")):
            if getattr(self, of) % getattr(self, name):
                raise ValueError(
                    f"model.vision.{of} ({getattr(self, of)}) must be a multiple of model.vision.{name} "
                    f"({getattr(self, name)})."
                )
        if self.head_dim % 4:
            raise ValueError(
                f"model.vision.embed_dim / num_heads must be a multiple of 4 for RoPE's pairs in two dimensions, got "
                f"{self.head_dim}."
            )
        side = self.image_size // self.patch_size
        if self.pixel_shuffle_ratio <= 0 or self.shuffle * self.pixel_shuffle_ratio != 1 or side % self.shuffle:
            raise ValueError(
                f"model.vision.pixel_shuffle_ratio must be 1, 1/2, 1/3 … and divide the {side} patches of a tile's "
                f"side, got {self.pixel_shuffle_ratio}."
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

    Raises ValueError for sizes that do not fit together, naming the field.
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
        sizes = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
                 "expert_mlp_dim", "num_experts", "top_k", "temperature_floor", "context_length")  # fmt: skip
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("moe_interval", "nope_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} must be 0 (never) or more, got {getattr(self, name)}.")
        if self.attention_chunk is not None and self.attention_chunk < 1:
            raise ValueError(f"model.attention_chunk must be at least 1 or None, got {self.attention_chunk}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads "
                f"({self.num_kv_heads}): each key/value head serves a group of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for RoPE's pairs, got {self.head_dim}.")
        if self.top_k > self.num_experts:
            raise ValueError(f"model.top_k ({self.top_k}) must not exceed model.num_experts ({self.num_experts}).")
        for name in ("moe_layers", "rope_layers"):
            explicit = getattr(self, name)
            if explicit is not None and len(explicit) != self.num_layers:
                raise ValueError(
                    f"model.{name} must have one entry for each of the {self.num_layers} layers, got {len(explicit)}."
                )

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
        for period in range(1, self.num_layers + 1):
            if all(spec == self.layers[i % period] for i, spec in enumerate(self.layers)):
                return period
        raise AssertionError("a pattern repeats at its own length")

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
        last = layer.rpartition(".")[2]
        for rule in self.rules:
            pattern = rule.rpartition("=")[0]
            if fnmatch.fnmatchcase(layer, pattern) and (last not in _EXACT or pattern.rpartition(".")[2] == last):
                return rule
        return None

    def matmul_of(self, layer: str) -> str:
        rule = self.rule_for(layer)
        if rule is not None:
            return rule.rpartition("=")[2]
        return "default" if layer.rpartition(".")[2] in _EXACT else self.matmul


# They decide which expert, and which token: in fewer bits only by their own name.
_EXACT = ("router", "lm_head")


def difference(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """One line for each field in which two configurations differ: `name: ours != theirs`."""
    return [
        f"{field.name}: {getattr(ours, field.name)!r} != {getattr(theirs, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]

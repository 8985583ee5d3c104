"""One run, as one whole tree of values: what `train.py` reads, what the command line overrides, and what stands as
config.json beside each checkpoint."""

import dataclasses
import hashlib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import LoraConfig, ModelConfig, Precision
from llama4_jax.sharding import MeshConfig
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.freeze import FreezeConfig
from llama4_jax.train.optimizer import OptimizerConfig
from llama4_jax.untrusted_json import parse_json, shortened, shown, typed


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. Raises ValueError, naming the fields, for values that do not fit together."""

    name: str  # the run is kept in run_dir/name
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    freeze: tuple[FreezeConfig, ...] = ()  # parameters that do not learn, always or at first
    lora: LoraConfig = field(default_factory=LoraConfig)  # low-rank adapters learn, beside the weights of init_from
    precision: Precision = field(default_factory=Precision)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    # Directory, or name on the Hugging Face Hub, of weights to begin with. On the command line its tokenizer is taken,
    # and its model unless the config's fits its tensors; other flags win. `train/begin.py` has the rule.
    init_from: str | None = None
    steps: int  # optimizer updates
    grad_accumulation: int = 1  # micro-batches a step: as one large batch, in the memory of a small one
    seed: int = 0  # of the initial parameters
    scan_layers: bool = True  # compile the repeating group of layers once; its parameters are then stacked
    # What the backward pass computes again instead of keeping; "offload": all, and layers' inputs wait on the host.
    remat: Literal["none", "dots", "full", "offload"] = "none"
    max_bad_steps: int = 10  # consecutive steps with a loss or gradient that is not finite before the run stops

    eval_every: int = 200  # steps; the end of the run is always evaluated
    eval_batches: int | None = 16  # of held-out data, always the same ones; None: all
    checkpoint_every: int = 200  # steps
    keep_checkpoints: int = 2
    log_every: int = 10  # steps
    profile: bool = False  # record a few steps in JAX's profiler, into the run's directory
    run_dir: str = "runs"
    sample_prompt: str = "def "  # what the trained model continues when the run is done
    sample_tokens: int = 200

    def __post_init__(self):
        if not self.name or "/" in self.name:
            raise ValueError(f"name must be a directory's name without '/', got {self.name!r}.")
        positive = ("steps", "grad_accumulation", "max_bad_steps", "eval_every", "checkpoint_every", "log_every",
                    "keep_checkpoints", "sample_tokens")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ValueError(f"eval_batches must be at least 1, or None for all, got {self.eval_batches}.")
        if self.data.seq_len > self.model.context_length:
            raise ValueError(
                f"data.seq_len ({self.data.seq_len}) must not exceed model.context_length "
                f"({self.model.context_length})."
            )
        if self.data.batch_size % self.grad_accumulation:
            raise ValueError(
                f"data.batch_size ({self.data.batch_size}) must be a multiple of grad_accumulation "
                f"({self.grad_accumulation})."
            )
        if self.data.tiles_per_row and self.model.vision is None:
            raise ValueError(
                f"data.tiles_per_row is {self.data.tiles_per_row}, but the model reads text alone: set model.vision, "
                f"or data.tiles_per_row to 0."
            )
        if self.balance.bias_rate and self.lora.rank:
            raise ValueError(
                f"balance.bias_rate is {self.balance.bias_rate}, but with lora.rank the biases are the base's and stay "
                f"as they are: set balance.bias_rate to 0."
            )
        if self.balance.bias_rate and not self.model.router_bias:
            raise ValueError(
                f"balance.bias_rate is {self.balance.bias_rate}, but the model has no bias to move: set "
                f"model.router_bias to True, or balance.bias_rate to 0."
            )

    def check_mesh(self, num_devices: int) -> MeshConfig:
        """The mesh on that many devices. Raises ValueError if it does not fit them, or does not divide the batch."""
        mesh = self.mesh.resolve(num_devices)
        ways = mesh.data * mesh.fsdp * mesh.expert
        rows = self.data.batch_size // self.grad_accumulation
        if rows % ways:
            raise ValueError(
                f"data.batch_size / grad_accumulation is {rows} rows, which mesh.data x mesh.fsdp x mesh.expert = "
                f"{mesh.data} x {mesh.fsdp} x {mesh.expert} = {ways} does not divide. "
                f"Make data.batch_size a multiple of {ways * self.grad_accumulation}."
            )
        if self.data.seq_len % mesh.context:
            raise ValueError(f"data.seq_len ({self.data.seq_len}) must be a multiple of mesh.context ({mesh.context}).")
        return mesh


# Fields that may change when a run is resumed: the numbers do not depend on them, but for rounding (mesh, remat), or
# are meant to (steps: a run can be made longer, and its schedule with it).
FREE = (
    "name", "run_dir", "mesh", "steps", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints",
    "log_every", "profile", "sample_prompt", "sample_tokens", "max_bad_steps", "remat", "data.prefetch",
)  # fmt: skip

# Fields that config.json had not from the beginning, with what was so before. Other missing ones are an error.
ADDED_LATER: dict[str, Any] = {
    "data.heldout_sources": [],
    "lora": {"rank": 0, "alpha": 32.0, "rslora": False, "dropout": 0.0, "targets": ["layers.*"]},
}


def to_json(config: RunConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(text: bytes | str, where: str = "config.json") -> RunConfig:
    """The config of `to_json`. Raises ValueError naming the file (`where`) and a field that is missing, unknown, of the
    wrong type, or out of range."""
    return _read(RunConfig, parse_json(text, where=where), "", where)


@dataclass(frozen=True)
class SavedModel:
    """What the config.json of a directory of ours says of the model in it.

    - scan_layers: whether its checkpoints stack the layers that repeat
    - provenance: where each field of the model's config comes from; None in a run of `train.py`
    - lora: the adapters that it holds in place of the model's weights, which its base has; None: it holds the model
    """

    model: ModelConfig
    scan_layers: bool
    provenance: dict[str, str] | None = None
    lora: LoraConfig | None = None


def converted_to_json(
    model: ModelConfig,
    provenance: dict[str, str],
    quantization: dict[str, str | int | None] | None = None,
    lora: LoraConfig | None = None,
) -> str:
    """The config.json of a directory that was converted from another format: a model, and no run.

    - quantization: of its weights: "weights", the scheme, and "group", how many inputs share a scale (None: all)
    - lora: the adapters that the directory holds in place of weights
    """
    tree = {"model": dataclasses.asdict(model), "provenance": provenance}
    tree |= {} if quantization is None else {"quantization": quantization}
    return json.dumps(tree | ({} if lora is None else {"lora": dataclasses.asdict(lora)}), indent=1)


def model_from_json(text: bytes | str, where: str = "config.json") -> SavedModel:
    """The model of `to_json` or `converted_to_json`. Raises ValueError as `from_json` does."""
    tree = parse_json(text, where=where)
    if not (isinstance(tree, dict) and "provenance" in tree):
        run = _read(RunConfig, tree, "", where)
        return SavedModel(run.model, run.scan_layers, lora=run.lora if run.lora.rank else None)
    provenance = typed(tree["provenance"], dict[str, str], where=f"{where}: provenance")
    lora = _read(LoraConfig, tree["lora"], "lora", where) if "lora" in tree else None
    return SavedModel(_read(ModelConfig, tree.get("model"), "model", where), False, provenance, lora)


def differences(saved: RunConfig, new: RunConfig) -> list[str]:
    """`field: saved -> new` for each field that may not change when a run is resumed."""
    return [f"{name}: {a!r} -> {b!r}" for name, (a, b) in _changes(saved, new).items()]


def name_of_variant(base: RunConfig, variant: RunConfig) -> str:
    """A name for a run that differs from `base` in fields that make it another run: "tiny,model.num_experts=8". The
    same for the same fields, so that the same command finds it again."""
    changes = [f"{name}={value}" for name, (_, value) in _changes(base, variant).items()]
    if not changes:
        return variant.name
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join([base.name, *changes]))
    if len(name) <= 120:
        return name
    return f"{name[:100]},{hashlib.sha256(repr(changes).encode()).hexdigest()[:12]}"


def _changes(saved: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    flat_saved, flat_new = (dict(_flatten(dataclasses.asdict(config))) for config in (saved, new))
    return {
        name: (flat_saved.get(name), flat_new.get(name))
        for name in sorted(flat_saved.keys() | flat_new.keys())
        if not any(name == free or name.startswith(free + ".") for free in FREE)
        and flat_saved.get(name) != flat_new.get(name)
    }


def _flatten(tree: dict[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _read(kind: Any, value: Any, field: str, where: str) -> Any:
    """`value`, as JSON gives it, as an object of the annotated type `kind`; ValueErrors name the file, and are short
    whatever it says."""
    try:
        return _build(kind, value, field)
    except ValueError as error:
        raise ValueError(f"{where}: {shortened(str(error), 300)}") from None


def _build(kind: Any, value: Any, where: str) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {shown(value)}.")
        item = typing.get_args(kind)[0]
        return tuple(_build(item, x, where) for x in value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f"{where} must be one of {', '.join(typing.get_args(kind))}, got {shown(value)}.")
        return value
    if kind is float and type(value) is int and abs(value) < 2**1023:  # the largest float is beyond
        return float(value)
    if type(value) is not kind:  # True is no int here
        raise ValueError(f"{where} must be of type {kind.__name__}, got {shown(value)}.")
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} must be an object, got {shown(value)}.")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    value = {name: x for field, x in ADDED_LATER.items() if field.rpartition(".")[0] == where
             for name in (field.rpartition(".")[2],)} | value  # fmt: skip
    unknown = value.keys() - hints.keys()
    missing = {f.name for f in dataclasses.fields(kind)} - value.keys()
    if unknown or missing:
        raise ValueError(
            f"does not fit this version of the code: unknown fields {_names(prefix, unknown)}; missing fields "
            f"{_names(prefix, missing)}."
        )
    return kind(**{name: _build(hints[name], item, prefix + name) for name, item in value.items()})


def _names(prefix: str, names: set[str]) -> str:
    first = [prefix + shortened(name, 40) for name in sorted(names)[:4]]
    return ", ".join([*first, f"{len(names) - 4} more"] if len(names) > 4 else first) or "none"

"""LoRA's adapters as the library PEFT keeps them (adapter_config.json, adapter_model.safetensors), both ways.

A linear layer's lora_A.weight is [r, inputs] and its lora_B.weight [outputs, r]: our factors, transposed.

Llama 4's routed experts are one parameter at Hugging Face, [E, inputs, outputs], which PEFT adapts as a parameter
(`target_parameters`). It takes the last axis for the inputs, as those of a linear layer's weight are; here these are
outputs. So what it calls A is our second factor, what it calls B our first; and it lays experts side by side: in the
rows of A expert by expert, each with its r, and in the columns of B rank by rank, each with its E.

    experts.base_layer.lora_A.weight   gate_up   [(E r), (2 F)]      our b   E 2 r F
    experts.base_layer.lora_B.weight   gate_up   [D, (r E)]          our a   E D r
    experts.lora_A.weight              down      [(E r), D]          our b   E r D
    experts.lora_B.weight              down      [F, (r E)]          our a   E F r

Where only one of the two is adapted, it has the names of the second. Source: `ParamWrapper` of peft 0.21.2, which the
tests load what is written with.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from einops import rearrange

from llama4_jax.atomic import write_atomically
from llama4_jax.config import converted_to_json
from llama4_jax.hub import model_directory
from llama4_jax.model.config import LoraConfig, ModelConfig
from llama4_jax.untrusted_json import read_json, shortened, shown
from llama4_jax.weights import table
from llama4_jax.weights.adapters import (
    MergedWeights,
    base_of,
    factor_axes,
    factor_names,
    factor_shapes,
    write_base,
)
from llama4_jax.weights.mapped import FileTensor
from llama4_jax.weights.safetensors import SafetensorsFile, create_safetensors
from llama4_jax.weights.source import open_weights
from llama4_jax.weights.table import Row
from llama4_jax.weights.workplace import COMPANIONS, Done, Job, Workplace, Write, finite, make_run

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EXPERTS = ("gate_up_proj", "down_proj")
_MOST_RANK = 2**16


class PeftConfig(msgspec.Struct):
    """What of adapter_config.json is understood; fields whose other values are refused are in `_PLAIN`."""

    peft_type: str
    r: int = 8
    lora_alpha: float | int = 8
    use_rslora: bool = False
    base_model_name_or_path: str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float | int] | None = None
    bias: str = "none"
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: Any = None
    layer_replication: Any = None
    target_parameters: list[str] | None = None


_PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False,
          "modules_to_save": None, "trainable_token_indices": None, "layer_replication": None}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Names and layouts


def _is_of_experts(row: Row) -> bool:
    return row.axes.startswith("E ")


def _module(row: Row, config: ModelConfig) -> list[str]:
    """The modules, or of experts the parameter, that hold a matrix at Hugging Face."""
    names = row.layouts("hf")[0].names
    prefix = table.LANGUAGE_MODEL if config.vision is not None else ""
    own = [name if table.VISION["hf"].match(name) else prefix + name for name in names]
    return [name.removesuffix(".weight") for name in own]


def _to_peft(row: Row, a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """lora_A and lora_B of each of the matrix's modules."""
    if _is_of_experts(row):
        b = rearrange(b, "E P r F -> (E r) (P F)" if b.ndim == 4 else "E r D -> (E r) D")
        return [(b, rearrange(a, "E I r -> I (r E)"))]
    if "P" in factor_axes(row)[0].split():  # gate and up are modules of their own
        return [(a[:, i].T, b[i].T) for i in range(a.shape[1])]
    rank = a.shape[-1]
    return [(a.reshape(-1, rank).T, b.reshape(rank, -1).T)]


def _from_peft(row: Row, pairs: list[tuple[np.ndarray, np.ndarray]], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Our factors, of modules whose ranks may be smaller: what is added is 0."""
    a_shape, b_shape = factor_shapes(row, rank)
    if _is_of_experts(row):
        [(theirs_a, theirs_b)] = pairs
        experts = row.sizes["E"]
        own = len(theirs_a) // experts
        b = rearrange(theirs_a, "(E r) (P F) -> E P r F" if len(b_shape) == 4 else "(E r) (P F) -> E r (P F)",
                      E=experts, P=row.sizes.get("P", 1))  # fmt: skip
        a = rearrange(theirs_b, "I (r E) -> E I r", E=experts)
        return _wider(a, -1, rank - own), _wider(b, -2, rank - own)
    a = [_wider(x.T, -1, rank - len(x)) for x, _ in pairs]
    b = [_wider(y.T, 0, rank - y.shape[1]) for _, y in pairs]
    if "P" in factor_axes(row)[0].split():
        return np.stack(a, axis=-2), np.stack(b)
    return a[0].reshape(a_shape), b[0].reshape(b_shape)


def _wider(x: np.ndarray, axis: int, more: int) -> np.ndarray:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return np.pad(x, widths)


# ---------------------------------------------------------------------------------------------------------------------
# Out


def export_peft(run: str | Path, destination: str | Path) -> Done:
    """Writes the adapters of a directory of ours as PEFT loads them, beside a base that is exported to Hugging Face's
    format (`llama4 export BASE DIR --format hf`).

    Raises ValueError for a directory without adapters, and for a value that is not finite; FileExistsError if the
    destination exists; and as `open_weights` does.
    """
    run, destination = Path(run), Path(destination)
    weights = open_weights(run)
    if not isinstance(weights, MergedWeights):
        raise ValueError(f"{run} holds no adapters. To write whole weights: llama4 export --format hf.")
    if destination.exists():
        raise FileExistsError(f"{destination} exists already: choose another destination.")
    config, lora = weights.config, weights.lora
    tensors: dict[str, np.ndarray] = {}
    modules, parameters = [], []
    for row in table.rows(config):
        names = factor_names(row.ours)
        if names is None or names[0] not in weights.factors.names:
            continue
        a, b = (finite(weights.factors.read(name), name) for name in names)
        own = _module(row, config)
        if _is_of_experts(row):
            parameters.append(own[0])
            experts, _, last = own[0].rpartition(".")
            # PEFT wraps the module for the first parameter, and that again for the second.
            both = last == _EXPERTS[0] and factor_names(row.ours.replace("gate_up", "down"))[0] in weights.factors.names
            own = [f"{experts}.base_layer" if both else experts]
        elif own[0].endswith(".router"):
            parameters.append(f"{own[0]}.weight")  # as a module it returns two things, which PEFT cannot adapt
        else:
            modules += own
        for module, pair in zip(own, _to_peft(row, a, b), strict=True):
            for name, values in zip("AB", pair, strict=True):
                tensors[f"{_PREFIX}{module}.lora_{name}.weight"] = np.ascontiguousarray(values, np.float32)
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    adapter_config = {
        "peft_type": "LORA", "task_type": None if config.vision is not None else "CAUSAL_LM",
        "base_model_name_or_path": str(weights.base.path), "inference_mode": True, "r": lora.rank,
        "lora_alpha": alpha, "use_rslora": lora.rslora, "lora_dropout": 0.0 if parameters else lora.dropout,
        "bias": "none", "target_modules": modules, "target_parameters": parameters or None,
    }  # fmt: skip
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        shapes = {name: (values.dtype, values.shape) for name, values in tensors.items()}
        files = create_safetensors(made / WEIGHTS, shapes)
        for name, values in tensors.items():
            files[name].map("r+")[...] = values
        write_atomically(made / CONFIG, json.dumps(adapter_config, indent=2) + "\n")
        made.rename(destination)
    return Done(len(tensors), sum(values.nbytes for values in tensors.values()), 0)


# ---------------------------------------------------------------------------------------------------------------------
# In


def is_peft(directory: Path) -> bool:
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def import_peft(source: str | Path, destination: str | Path, base: str | Path | None = None) -> Done:
    """Makes a directory of ours with the adapters of a PEFT directory.

    - base: what they belong on, of any format; None: the directory that adapter_config.json names

    Modules of several ranks get the largest, and those of several scales the common one: both in the factors, exactly
    but for the rounding of a product. Raises ValueError for what is no plain LoRA (DoRA, biases, whole modules …), and
    for tensors that are missing, unknown, of another shape or not finite; FileNotFoundError and FileExistsError.
    """
    source, destination = Path(source), Path(destination)
    peft = _read_config(source)
    base = peft.base_model_name_or_path if base is None else base
    if not base:
        raise ValueError(f"{source / CONFIG} does not say which model the adapters belong on: give it, --base PATH.")
    try:
        weights = open_weights(base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the base of {source} is not there: {shortened(str(error), 200)} Say where it is: --base PATH."
        ) from error
    if not (source / WEIGHTS).is_file():
        raise FileNotFoundError(f"{source} has no {WEIGHTS}.")
    factors, lora = _read_factors(source, peft, weights.config)
    jobs = [Job(name, values.shape, values.dtype) for name, values in factors.items()]
    with Workplace(destination, {"from": str(source.resolve()), "peft": 1}, jobs) as work:
        from llama4_jax.weights.orbax_arrays import create_array

        def prepare(job: Job) -> Write:
            array = create_array(work.array(job.name), job.shape, job.dtype, job.shape)
            values = finite(factors[job.name], job.name)
            files = work.array(job.name)
            return Write(job.shape, lambda part: array.write(part, values[part]), lambda: _files(files))

        work.run(prepare, lambda done, total: None)
        config_json = converted_to_json(weights.config, dict(weights.provenance), lora=lora)
        home = Path(model_directory(base))
        made = make_run(work, list(factors), config_json, home)
        for name in COMPANIONS:  # such as a tokenizer that came with the adapters
            if (source / name).is_file():
                shutil.copyfile(source / name, made / name)
        write_base(made, base_of(base, weights))
        work.finish(made)
    return work.done


def _files(array: Path):
    return filter(Path.is_file, array.rglob("*"))


def _read_config(source: Path) -> PeftConfig:
    peft = read_json(source / CONFIG, of=PeftConfig)
    for name, plain in _PLAIN.items():
        value = getattr(peft, name)
        if value != plain and value not in ([], {}):
            raise ValueError(
                f"{source / CONFIG}: {name} is {shown(value)}, and {shown(plain)} is all that is read: plain LoRA."
            )
    for rank in (peft.r, *(peft.rank_pattern or {}).values()):
        if not 1 <= rank <= _MOST_RANK:
            raise ValueError(f"{source / CONFIG}: a rank must be between 1 and {_MOST_RANK}, got {rank}.")
    for alpha in (peft.lora_alpha, *(peft.alpha_pattern or {}).values()):
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"{source / CONFIG}: lora_alpha must be a positive number, got {alpha}.")
    return peft


def _of_pattern(patterns: Mapping[str, float | int] | None, module: str, default: float | int) -> float | int:
    """As PEFT has it: the first pattern that is a regular expression for the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if module == pattern or module.endswith(f".{pattern}"):
            return value
        if re.escape(pattern) != pattern.replace(".", r"\."):
            raise ValueError(f"{CONFIG}: the pattern {shown(pattern)} is no name of a module; regular expressions of "
                             f"others are not run.")  # fmt: skip
    return default


def _read_factors(source: Path, peft: PeftConfig, config: ModelConfig) -> tuple[dict[str, np.ndarray], LoraConfig]:
    """Our factors, by name, and the config that they have in common."""
    found = {_plain_name(name): tensor for name, tensor in SafetensorsFile(source / WEIGHTS).tensors.items()}
    ranks = {peft.r, *(peft.rank_pattern or {}).values()}
    used: set[str] = set()
    read: dict[str, tuple[Row, list[tuple[np.ndarray, np.ndarray] | None], list[str]]] = {}
    for row in table.rows(config):
        if factor_names(row.ours) is None:
            continue
        own = _holders(row, config, found, peft.target_parameters)
        if not any(f"{module}.lora_A" in found or f"{module}.lora_B" in found for module in own):
            continue
        pairs = []
        for module in own:
            names = [f"{module}.lora_{each}" for each in "AB"]
            missing = [name for name in names if name not in found]
            if (missing and len(own) == 1) or (f"{module}.lora_A" in found and missing):
                raise ValueError(f"{source / WEIGHTS} has no tensor {shortened(missing[0])}.weight.")
            if missing:  # gate is adapted and up is not, or the other way round
                pairs.append(None)
                continue
            used.update(names)
            pairs.append(tuple(np.asarray(found[name].map()).astype(np.float32) for name in names))
        read[row.ours] = row, pairs, own
    unknown = sorted(found.keys() - used)
    if unknown:
        raise ValueError(
            f"{source / WEIGHTS} holds {len(unknown)} tensors that the base has no matrix for, such as "
            f"{shortened(unknown[0])}."
        )
    if not read:
        raise ValueError(f"{source / WEIGHTS} holds no adapters.")
    rank = max(ranks)
    lora = LoraConfig(rank=rank, alpha=float(peft.lora_alpha), rslora=peft.use_rslora, targets=tuple(
        sorted({_layer_of(name) for name in read})))  # fmt: skip
    factors = {}
    for row in table.rows(config):  # of a layer's experts both have factors, of which those of one may be 0
        experts = _is_of_experts(row) and {f"{row.ours.rpartition('.')[0]}.{last}" for last in ("gate_up", "down")}
        if experts and row.ours not in read and experts & read.keys():
            for factor, shape in zip(factor_names(row.ours), factor_shapes(row, rank), strict=True):
                factors[factor] = np.zeros(shape, np.float32)
    for name, (row, pairs, own) in read.items():
        scaled = []
        for pair, module in zip(pairs, own, strict=True):
            module_rank = int(_of_pattern(peft.rank_pattern, module, peft.r))
            alpha = _of_pattern(peft.alpha_pattern, module, peft.lora_alpha)
            scale = alpha / (math.sqrt(module_rank) if peft.use_rslora else module_rank)
            if pair is None:
                pair = _zeros(row, module_rank)
            expected = _peft_shapes(row, module_rank)
            if (pair[0].shape, pair[1].shape) != expected:
                raise ValueError(
                    f"{source / WEIGHTS}: {shortened(module)} has lora_A {list(pair[0].shape)} and lora_B "
                    f"{list(pair[1].shape)}, where rank {module_rank} makes them {list(expected[0])} and "
                    f"{list(expected[1])}."
                )
            ours = scale / lora.scale
            scaled.append(pair if ours == 1 else (pair[0], (pair[1] * np.float32(ours)).astype(np.float32)))
        for factor, values in zip(factor_names(name), _from_peft(row, scaled, rank), strict=True):
            factors[factor] = np.ascontiguousarray(values)
    return factors, lora


def _plain_name(name: str) -> str:
    """Without PEFT's prefix, and without the name of an adapter before .weight."""
    return re.sub(r"\.lora_([AB])(\.[^.]+)?\.weight$", r".lora_\1", name.removeprefix(_PREFIX))


def _holders(row: Row, config: ModelConfig, found: Mapping[str, FileTensor], targets: list[str] | None) -> list[str]:
    """Under which modules a matrix's factors are: that of experts depends on whether both of theirs are adapted."""
    own = _module(row, config)
    if not _is_of_experts(row):
        return own
    experts, _, last = own[0].rpartition(".")
    wrapped = f"{experts}.base_layer"
    if f"{wrapped}.lora_A" in found:
        return [wrapped if last == _EXPERTS[0] else experts]
    if f"{experts}.lora_A" not in found and f"{experts}.lora_B" not in found:
        return []
    said = {target.rpartition(".")[2] for target in targets or ()} & set(_EXPERTS)
    if len(said) != 1:
        raise ValueError(
            f"{CONFIG}: target_parameters does not say which parameter of {shortened(experts)} is adapted."
        )
    return [experts] if last in said else []


def _peft_shapes(row: Row, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    a, b = (np.broadcast_to(np.float32(0), shape) for shape in factor_shapes(row, rank))
    first, second = _to_peft(row, a, b)[0]
    return first.shape, second.shape


def _zeros(row: Row, rank: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.zeros(shape, np.float32) for shape in _peft_shapes(row, rank))


def _layer_of(name: str) -> str:
    """The linear layer of a matrix, as `model.names` has it."""
    return re.sub(r"\.moe\.(gate_up|down)$", ".moe.experts", name).removesuffix(".kernel")

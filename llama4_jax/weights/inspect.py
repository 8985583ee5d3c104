"""What a directory of weights holds, in words and one table."""

import dataclasses
import math
import re
from pathlib import Path

from llama4_jax.untrusted_json import shortened
from llama4_jax.weights.load import preset_differences
from llama4_jax.weights.quantized import Parameters
from llama4_jax.weights.source import FileWeights, RunWeights, Weights, open_weights
from llama4_jax.weights.table import SCALE

_FORMATS = {"hf": "Hugging Face", "meta": "Meta", "run": "Orbax (ours)"}


def describe(path: str | Path, *, every_tensor: bool = False) -> str:
    """Format, config with where each field comes from, how it differs from the preset of its sizes, and the tensors
    with their dtypes and sizes: those of equal shape in several layers in one line, or each (`every_tensor`). Scales
    of quantized tensors are no parameters.

    Reads no values. Raises as `open_weights` does.
    """
    weights = open_weights(path)
    lines = [f"{path}: {_format(weights)}", "", "Config, and where each field comes from:"]
    fields = {field.name: getattr(weights.config, field.name) for field in dataclasses.fields(weights.config)}
    values = {name: _value(value) for name, value in fields.items()}
    width = min(44, max(map(len, values.values())))
    for name, value in values.items():
        lines.append(f"  {name:<19} {value:<{width}}  {shortened(weights.provenance.get(name, ''))}".rstrip())
    lines += ["", *(preset_differences(weights.config) or ["No preset of these sizes differs from it."])]
    if isinstance(weights, FileWeights) and weights.notices:
        lines += ["", *weights.notices]
    lines += ["", *_tensors(weights, every_tensor)]
    return "\n".join(lines)


def _format(weights: Weights) -> str:
    name = _FORMATS[weights.format]
    if isinstance(weights, FileWeights):
        ranks = f", {len(weights.ranks)} model-parallel rank(s)" if weights.format == "meta" else ""
        passed_over = f", {len(weights.plan.vision)} tensors that its config does not describe" * bool(
            weights.plan.vision
        )
        return name + ranks + passed_over
    assert isinstance(weights, RunWeights)
    return f"{name}, checkpoint {weights.step}"


def _value(value) -> str:
    """Patterns of layers as 1 and 0."""
    if isinstance(value, tuple) and value and all(isinstance(x, bool) for x in value):
        return "".join(str(int(x)) for x in value)
    if dataclasses.is_dataclass(value):
        inner = ", ".join(f"{f.name} {_value(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return inner
    return str(value)


def _tensors(weights: Weights, every: bool) -> list[str]:
    stored = Parameters(weights)
    groups: dict[tuple, list[str]] = {}
    for name in weights.names:
        kind = name if every else re.sub(r"layers\.\d+", "layers.*", name)
        groups.setdefault((kind, stored.shape(name), stored.dtype(name).name), []).append(name)
    width = max(38, *(len(kind) for kind, _, _ in groups))
    lines = [f"{'tensor':<{width}} {'layers':>6}  {'shape':<26} {'dtype':<13} {'parameters':>16} {'MiB':>11}"]
    parameters, size = 0, 0
    for (kind, shape, dtype), names in groups.items():
        own = len(names) * math.prod(weights.shape(names[0])) * weights.dtype(names[0]).itemsize
        count = 0 if kind.endswith(SCALE) else len(names) * math.prod(shape)
        parameters, size = parameters + count, size + own
        layers = str(len(names)) if "*" in kind else ""
        shown, number = " × ".join(map(str, shape)), f"{count:,}" if count else ""
        lines.append(f"{kind:<{width}} {layers:>6}  {shown:<26} {dtype:<13} {number:>16} {own / 2**20:>11,.1f}")
    return [*lines, f"{'in all':<{width}} {'':>6}  {'':<26} {'':<13} {parameters:>16,} {size / 2**20:>11,.1f}"]

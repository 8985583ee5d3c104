"""What a directory of weights holds, in words and one table."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

from llama4_jax.atomic import AnyPath, any_path
from llama4_jax.hub import model_directory
from llama4_jax.untrusted_json import read_json, shortened
from llama4_jax.weights.adapters import BASE, Base
from llama4_jax.weights.digests import DIGESTS
from llama4_jax.weights.load import preset_differences
from llama4_jax.weights.meta_files import read_pth
from llama4_jax.weights.quantized import Parameters
from llama4_jax.weights.safetensors import SafetensorsFile
from llama4_jax.weights.source import (
    FileWeights,
    RunWeights,
    Weights,
    newest_weights,
    open_weights,
    run_steps,
    source_format,
)
from llama4_jax.weights.table import SCALE

_FORMATS = {"hf": "Hugging Face", "meta": "Meta", "run": "Orbax (ours)"}


def describe(path: str | Path, *, every_tensor: bool = False) -> str:
    """Format, config with where each field comes from, how it differs from the preset of its sizes, and the tensors
    with their dtypes and sizes: those of equal shape in several layers in one line, or each (`every_tensor`). Scales
    of quantized tensors are no parameters.

    Reads no values. Raises as `open_weights` does.
    """
    weights = _held(path)
    lines = [
        f"{path}: {_format(weights)}",
        f"Checksums: {_checksums(weights)}",
        "",
        "Config, and where each field comes from:",
    ]
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


def _held(path: str | Path) -> Weights:
    """What a directory holds itself: of one with adapters these, and not its base."""
    path = model_directory(path)
    return newest_weights(path) if source_format(path) == "run" else open_weights(path)


def verify(path: str | Path, say: Callable[[str], None]) -> list[str]:
    """Reads every value in a directory, of all checkpoints of one of ours, and holds it against its checksum.

    - say: is told what was read, a line a checkpoint or directory

    Returns what is damaged, a line for each array. Raises as `open_weights` does for what cannot be opened at all.
    """
    path = any_path(path)
    if source_format(path) != "run":
        weights = open_weights(path)
        assert isinstance(weights, FileWeights)
        if weights.digests is None:
            say(f"{path}: its structure is sound, but it has no {DIGESTS} to hold its values against.")
            return []
        tensors_of = read_pth if weights.format == "meta" else lambda file: SafetensorsFile(file).tensors
        files = {name: tensors_of(path / name) for name in weights.digests.files if (path / name).is_file()}
        found = [f"{path / line}" for line in weights.digests.damaged(files)]
        say(f"{path}: {sum(map(len, files.values()))} tensors read, {len(found)} damaged.")
        return found
    damaged = []
    for step in run_steps(path):
        damaged += _verify_checkpoint(path / "checkpoints" / str(step), say)
    return damaged


def _verify_checkpoint(checkpoint: AnyPath, say: Callable[[str], None]) -> list[str]:
    # Here, since Orbax takes a second to import.
    from llama4_jax.weights.checked_arrays import has_checksum, reason_of
    from llama4_jax.weights.checkpoint import MODEL, PROGRESS, TRAINING, read_progress
    from llama4_jax.weights.orbax_arrays import damaged_arrays, stored_arrays

    damaged, count, without = [], 0, 0
    for item in (MODEL, TRAINING):
        if item == TRAINING and not (checkpoint / item).is_dir():
            continue  # what was converted has none
        try:
            stores = stored_arrays(checkpoint, item)
            count += len(stores)
            without += sum(not has_checksum(store) for store in stores.values())
            damaged += [f"{checkpoint / item}: {line}" for line in damaged_arrays(checkpoint, item)]
        except Exception as error:  # a damaged file may show as anything
            damaged.append(f"{checkpoint / item}: {reason_of(error)}")
    try:
        read_progress(checkpoint)
    except Exception as error:
        damaged.append(f"{checkpoint / PROGRESS}: {reason_of(error)}")
    unchecked = f", {without} of them without checksums, of which only their form is known to be sound" * bool(without)
    say(f"{checkpoint}: {count} arrays read{unchecked}, {len(damaged)} damaged.")
    return damaged


def _checksums(weights: Weights) -> str:
    if isinstance(weights, FileWeights):
        return "none, as it comes from elsewhere" if weights.digests is None else f"of every tensor, in {DIGESTS}"
    assert isinstance(weights, RunWeights)
    return "of every stored piece" if weights.has_checksums else "none: it was written by an earlier version"


def _format(weights: Weights) -> str:
    name = _FORMATS[weights.format]
    if isinstance(weights, FileWeights):
        ranks = f", {len(weights.ranks)} model-parallel rank(s)" if weights.format == "meta" else ""
        passed_over = f", {len(weights.plan.vision)} tensors that its config does not describe" * bool(
            weights.plan.vision
        )
        return name + ranks + passed_over
    assert isinstance(weights, RunWeights)
    if weights.lora is None:
        return f"{name}, checkpoint {weights.step}"
    lora, base = weights.lora, read_json(weights.path / BASE, of=Base)
    of_step = "" if base.step is None else f", step {base.step}"
    of_rank = f"adapters of rank {lora.rank}, scale {lora.scale:g}"
    return f"{name}, checkpoint {weights.step}: {of_rank}, for {base.path}{of_step}"


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

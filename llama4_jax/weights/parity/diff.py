"""Two directories of weights, of whatever formats, tensor by tensor, without running them: which differ, and how.

A part of a tensor of each side is in memory at a time: an expert, or a quarter of a GiB.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llama4_jax.model.config import ModelConfig
from llama4_jax.weights.dequantize import dequantized
from llama4_jax.weights.parity.tensors import (
    UNKNOWN,
    TensorCause,
    digest,
    how_they_differ,
    order_of,
    same_model,
    say_order,
)
from llama4_jax.weights.source import Weights
from llama4_jax.weights.table import SCALE, Index, Row, Shape, rows

_PART = 2**26  # numbers of a tensor that are in memory at once, if it is not an expert's
_MOST_GROUPS = 20  # that are listed
_MOST_KINDS = 6  # of tensors that are named in a group
# Of what only our directories have
_OTHER_AXES = {"moe.bias": "E", "attention.ssmax.s": "N", "attention.ssmax.b": "N"}
_SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
          "expert_mlp_dim", "num_experts")  # fmt: skip
_TEMPERATURE = ("temperature_floor", "temperature_coef")
# Fields of a config, beside sizes and what a layer is, that its numbers depend on
_READ = ("top_k", "rope_theta", "rope_scaling", "norm_eps", *_TEMPERATURE)


def check_sizes(ours: Weights, theirs: Weights) -> None:
    """Raises ValueError, naming the fields, if the two are models of other sizes. What no layer uses may differ."""
    a, b = ours.config, theirs.config
    names = [name for name in _SIZES if name not in _of_unused(a) & _of_unused(b)]
    sizes = [(name, getattr(a, name), getattr(b, name)) for name in names]
    lines = [f"{name}: {one} != {other}" for name, one, other in sizes if one != other]
    if a.num_layers == b.num_layers and (wrong := _other_kinds(a, b)):
        shown = ", ".join(map(str, wrong[:8])) + (", …" if len(wrong) > 8 else "")
        lines = [f"one has experts in layer {shown}, the other has not"]
    if lines:
        raise ValueError(
            f"{ours.path} and {theirs.path} differ in their sizes and cannot be compared: {'; '.join(lines)}."
        )


def _of_unused(config: ModelConfig) -> set[str]:
    """Fields that no layer uses, as files of different formats have something or nothing there."""
    layers = config.layers
    return {
        *(() if any(not spec.moe for spec in layers) else ("mlp_dim",)),
        *(() if any(spec.moe for spec in layers) else ("expert_mlp_dim", "num_experts", "top_k")),
        *(() if any(spec.rope for spec in layers) else ("rope_theta", "rope_scaling")),
        *(() if any(spec.query_scale == "temperature" for spec in layers) else _TEMPERATURE),
    }


def _other_kinds(a: ModelConfig, b: ModelConfig) -> list[int]:
    return [i for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)) if x.moe != y.moe]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same.

    - numbers, of: how many differ by more than the tolerance, and how many it has
    - max, relative: the largest difference, and as a fraction of the reference's largest magnitude
    - other: the reference's tensor that it is, if it is another one's
    """

    name: str
    numbers: int
    of: int
    max: float
    relative: float
    cause: TensorCause
    other: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Of two directories: `ours` as against the reference, `theirs`.

    - tensors: how many both have
    - different: those that are not the same, in the model's order
    - only_ours, only_theirs: tensors that the other has not
    - notes: what follows of several of them together, in sentences
    """

    ours: str
    theirs: str
    tolerance: float
    tensors: int
    different: tuple[TensorDifference, ...]
    only_ours: tuple[str, ...]
    only_theirs: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not (self.different or self.only_ours or self.only_theirs)

    def cause_of(self, name: str) -> str | None:
        return next((d.cause.text for d in self.different if d.name == name), None)

    def lines(self) -> list[str]:
        """What differs, alike tensors together, in a bounded number of lines."""
        made = []
        if self.different:
            made.append(f"{len(self.different)} of {self.tensors} tensors differ:")
            groups = list(_grouped(self.different))
            for text, some in groups[:_MOST_GROUPS]:
                worst = max(some, key=lambda d: _or_largest(d.relative))
                made.append(f"  {_names([d.name for d in some])}: {text}")
                made.append(f"      by at most {worst.max:.2e}, {worst.relative:.1e} of the largest")
            rest = sum(len(some) for _, some in groups[_MOST_GROUPS:])
            made += [f"  … and {rest} more (all are in the file of --json)"] if rest else []
        for who, names in (("the first", self.only_ours), ("the second", self.only_theirs)):
            made += [f"only {who} has {_names(names)}"] if names else []
        return [*made, *self.notes]

    def text(self) -> str:
        verdict = (
            f"SAME: all {self.tensors} tensors are equal"
            + (f" within {self.tolerance:g} of the largest number of each" if self.tolerance else "")
            + "."
            if self.equal
            else "DIFFERENT."
        )
        return "\n".join([f"ours       {self.ours}", f"reference  {self.theirs}", "", *self.lines(), verdict])

    def as_json(self) -> dict[str, Any]:
        made = dataclasses.asdict(self) | {"equal": self.equal}
        for difference in made["different"]:
            for name in ("max", "relative"):
                difference[name] = difference[name] if math.isfinite(difference[name]) else None
        return made


def diff(
    ours: Weights, theirs: Weights, *, tolerance: float = 0.0, say: Callable[[str], None] = lambda line: None
) -> Comparison:
    """Compares every tensor of two directories by its values, whatever the formats of files and numbers. Quantized ones
    are compared as the numbers that they stand for.

    - tolerance: up to which a number may differ, as a fraction of the largest magnitude in the reference's tensor
    - say: is told of each layer when it is done, in a line

    Raises ValueError for models of other sizes.
    """
    if not tolerance >= 0 or not math.isfinite(tolerance):
        raise ValueError(f"--tolerance must be 0 or more, got {tolerance}.")
    check_sizes(ours, theirs)
    mine, right = _Side(ours), _Side(theirs)
    both = [name for name in right.names if name in set(mine.names)]
    found: list[TensorDifference] = []
    done = None
    for name in both:
        if (layer := _layer_of(name)) != done and done is not None:
            say(f"layer {done} of {theirs.config.num_layers}: {sum(_layer_of(d.name) == done for d in found)} differ")
        done = layer
        if mine.shape(name) != right.shape(name):
            raise ValueError(f"{name} is {list(mine.shape(name))} in {ours.path} and {list(right.shape(name))} in "
                             f"{theirs.path}.")  # fmt: skip
        difference = _compare(name, mine, right, tolerance)
        found += [] if difference is None else [difference]
    found = _of_others(found, mine, right)
    return Comparison(
        ours=str(ours.path),
        theirs=str(theirs.path),
        tolerance=tolerance,
        tensors=len(both),
        different=tuple(found),
        only_ours=tuple(name for name in mine.names if name not in set(both)),
        only_theirs=tuple(name for name in right.names if name not in set(both)),
        notes=tuple(_notes(found, ours.config, theirs.config)),
    )


def axes_of(table: Mapping[str, Row], name: str, dimensions: int) -> tuple[str, str]:
    """Of a tensor, and those that a product sums over, as letters; names of no meaning if it is not in the table."""
    if name in table:
        return table[name].axes, table[name].contracted
    return _OTHER_AXES.get(_inside(name), " ".join(f"axis{i}" for i in range(dimensions))), ""


class _Side:
    """A directory's tensors as numbers in float32, any part of any."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.rows = {row.ours: row for row in rows(weights.config)}
        every = set(weights.names)
        self.names = [name for name in weights.names if not (name.endswith(SCALE) and name[: -len(SCALE)] in every)]
        self.quantized = {name for name in self.names if name + SCALE in every}

    def shape(self, name: str) -> Shape:
        return self.rows[name].shape if name in self.quantized else self.weights.shape(name)

    def axes(self, name: str) -> tuple[str, str]:
        """Of a tensor, and those that a product sums over."""
        return axes_of(self.rows, name, len(self.shape(name)))

    def eps(self, name: str) -> float:
        """How far a number of its format may be from the one that is meant, as a fraction."""
        if name in self.quantized:
            return 2.0**-23
        dtype = self.weights.dtype(name)
        return max(float(ml_dtypes.finfo(dtype).eps), 2.0**-23)

    def read(self, name: str, part: Index) -> np.ndarray:
        if name in self.quantized:
            return dequantized(self.rows[name], self.weights, part)
        return np.asarray(self.weights.read(name, part)).astype(np.float32)

    def parts(self, name: str) -> Iterator[Index]:
        """One for each expert, or of the first axis as much as may be in memory."""
        shape = self.shape(name)
        inner = math.prod(shape[1:])
        at_once = 1 if self.by_expert(name) else max(1, _PART // max(1, inner))
        for start in range(0, shape[0], at_once):
            yield (slice(start, min(start + at_once, shape[0])), *(slice(0, size) for size in shape[1:]))

    def by_expert(self, name: str) -> bool:
        return self.axes(name)[0].startswith("E ")


def _compare(name: str, mine: _Side, right: _Side, tolerance: float) -> TensorDifference | None:
    axes, contracted = right.axes(name)
    eps, by_expert = max(mine.eps(name), right.eps(name)), right.by_expert(name)
    inner = axes.split(" ", 1)[-1] if by_expert else axes
    largest = magnitude = 0.0
    numbers, parts = 0, 0
    causes: dict[int, TensorCause] = {}
    digests: dict[int, list[tuple[bytes, bytes]]] = {}
    for i, part in enumerate(right.parts(name)):
        parts += 1
        a, b = mine.read(name, part), right.read(name, part)
        magnitude = float(np.fmax(magnitude, np.abs(b).max(initial=0.0)))
        if np.array_equal(a, b, equal_nan=True):
            continue
        difference = np.abs(a - b)
        difference[np.isnan(a) & np.isnan(b)] = 0
        worst = float(difference.max())  # NaN wins
        largest = worst if math.isnan(worst) else max(largest, worst)
        numbers += int((~(difference <= tolerance * magnitude)).sum()) if tolerance else int((difference != 0).sum())
        a, b = (a[0], b[0]) if by_expert else (a, b)
        causes[i] = how_they_differ(a, b, inner, contracted=contracted, eps=eps)
        if by_expert:
            digests[i] = [(digest(a), digest(b)), tuple(digest(x.astype(ml_dtypes.bfloat16)) for x in (a, b))]
    if not causes or largest <= tolerance * magnitude:
        return None
    cause = _of_experts(digests, parts) or _of_parts(causes, parts, by_expert)
    relative = largest / magnitude if magnitude else math.inf
    return TensorDifference(name, numbers, math.prod(right.shape(name)), largest, relative, cause)


def _of_experts(digests: dict[int, list[tuple[bytes, bytes]]], experts: int) -> TensorCause | None:
    """Experts in another order, by the digests of those that differ."""
    places = sorted(digests)
    for way, rounded in ((0, ""), (1, ", and rounded to bfloat16")):
        ours, theirs = ([digests[i][way][side] for i in places] for side in (0, 1))
        moved = order_of(ours, theirs)
        if moved is not None:
            order = list(range(experts))
            for i, source in zip(places, moved, strict=True):
                order[i] = places[source]
            return TensorCause("order", say_order("E", tuple(order)) + rounded, ("E", tuple(order)))
    return None


def _of_parts(causes: dict[int, TensorCause], parts: int, by_expert: bool) -> TensorCause:
    """One for all, if it is the same."""
    texts = {cause.text for cause in causes.values()}
    first = next(iter(causes.values()))
    if len(texts) == 1 and len(causes) == parts:
        return first
    kinds = {cause.kind for cause in causes.values()}
    kind = first.kind if len(kinds) == 1 else UNKNOWN
    if kind == UNKNOWN == first.kind and len(causes) == parts:
        return first
    if by_expert:
        which = "each expert" if len(causes) == parts else f"experts {', '.join(map(str, list(causes)[:8]))} alone"
        which = f"expert {next(iter(causes))} alone" if len(causes) == 1 else which
        which += ", …" if 8 < len(causes) < parts else ""
        return TensorCause(kind, f"{which}: {first.text if len(texts) == 1 else f'{_kinds(causes)}'}")
    return TensorCause(kind, first.text if len(texts) == 1 else f"in parts: {_kinds(causes)}")


def _kinds(causes: dict[int, TensorCause]) -> str:
    shown = list(dict.fromkeys(cause.text for cause in causes.values()))
    return "; or ".join(shown[:2]) + ("; or …" if len(shown) > 2 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are others


def _of_others(found: Sequence[TensorDifference], mine: _Side, right: _Side) -> list[TensorDifference]:
    """Those whose own cause is not known may be another tensor of the reference."""
    candidates = _Candidates(right)
    made = []
    for difference in found:
        if difference.cause.kind == UNKNOWN:
            other, rounded = candidates.equal_to(difference.name, mine)
            if other is not None:
                cause = TensorCause(
                    "another tensor", f"it is the reference's {_as_said(difference.name, other)}{rounded}"
                )
                difference = dataclasses.replace(difference, cause=cause, other=other)
            elif difference.name == "lm_head.kernel":
                difference = dataclasses.replace(difference, cause=_tied(mine, right) or difference.cause)
        made.append(difference)
    return made


class _Candidates:
    """The reference's tensors by shape and by the digest of their first numbers, which are read when asked for."""

    def __init__(self, right: _Side):
        self.right = right
        self.by_shape: dict[Shape, list[str]] = {}
        for name in right.names:
            self.by_shape.setdefault(right.shape(name), []).append(name)
        self.firsts: dict[Shape, dict[bytes, list[str]]] = {}

    def equal_to(self, name: str, mine: _Side) -> tuple[str | None, str]:
        shape = self.right.shape(name)
        if shape not in self.firsts:
            self.firsts[shape] = {}
            for other in self.by_shape[shape]:
                self.firsts[shape].setdefault(_first(self.right, other), []).append(other)
        others = self.firsts[shape].get(_first(mine, name), [])
        # Of several that are alike, that of the same kind, or else of the same layer.
        inside, layer = _inside(name), _layer_of(name)
        for other in sorted(others, key=lambda other: (_inside(other) != inside, _layer_of(other) != layer)):
            alike = {_alike(mine.read(name, part), self.right.read(other, part)) for part in self.right.parts(other)}
            if other != name and None not in alike:
                return other, max(alike)
        return None, ""


def _first(side: _Side, name: str) -> bytes:
    """A digest of some numbers, which rounding to bfloat16 does not change."""
    part = tuple(slice(0, min(size, 16)) for size in side.shape(name))
    return digest(side.read(name, part).astype(ml_dtypes.bfloat16))


def _alike(a: np.ndarray, b: np.ndarray) -> str | None:
    """ "" if they are equal, or what else is to be said; None if they are not."""
    if np.array_equal(a, b):
        return ""
    a, b = a.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16)
    return ", and rounded to bfloat16" if np.array_equal(a, b) else None


def _as_said(name: str, other: str) -> str:
    if _inside(name) == _inside(other):
        return f"of layer {_layer_of(other)}"
    return _inside(other) if _layer_of(name) == _layer_of(other) else other


def _tied(mine: _Side, right: _Side) -> TensorCause | None:
    """Output heads that are the embedding."""
    for side, text in ((mine, "ours is our embedding (tied)"), (right, "the reference's is its embedding (tied)")):
        table, head = "embed.embedding", "lm_head.kernel"
        if all(
            np.array_equal(side.read(table, part), side.read(head, (part[1], part[0])).T) for part in side.parts(table)
        ):
            return TensorCause("tied", text)
    return None


def _layer_of(name: str) -> int | None:
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _inside(name: str) -> str:
    """The name without its layer."""
    return re.sub(r"^layers\.\d+\.", "", name)


def _notes(found: Sequence[TensorDifference], ours: ModelConfig, config: ModelConfig) -> Iterator[str]:
    """Fields of the configs that differ, and layers that are the same in another order."""
    used = [name for name in _READ if name not in _of_unused(ours) & _of_unused(config)]
    other = [name for name in used if getattr(ours, name) != getattr(config, name)]
    other += [] if ours.layers == config.layers else ["layers (RoPE, chunks, qk-norm, temperature)"]
    if other:
        yield f"The configs differ in {', '.join(other)}: `llama4 parity` says what comes of it."
    by_layer: dict[int, list[TensorDifference]] = {}
    for difference in found:
        if (layer := _layer_of(difference.name)) is not None:
            by_layer.setdefault(layer, []).append(difference)
    same: dict[str, list[int]] = {}
    for layer, some in by_layer.items():
        orders = {_inside(d.name): d.cause.order for d in some if d.cause.order is not None}
        if len(orders) == len(some):
            group = config.num_heads // config.num_kv_heads
            text = same_model(orders, has_bias=config.router_bias, group=group)
            if text is not None:
                same.setdefault(text, []).append(layer)
    for text, layers in same.items():
        yield f"{_layers(layers)}: {text}."
    if sum(map(len, same.values())) == len(by_layer) and len(found) == sum(map(len, by_layer.values())) and found:
        yield "So it is the same model, written down in another order."


# ---------------------------------------------------------------------------------------------------------------------
# Words


def _grouped(found: Sequence[TensorDifference]) -> Iterator[tuple[str, list[TensorDifference]]]:
    """Tensors that differ in the same way."""
    groups: dict[tuple, list[TensorDifference]] = {}
    for d in found:
        # Of tensors of another layer, those of one layer; of unknown ones, all that are as near.
        own = _layer_of(d.name) if d.other is not None else None
        groups.setdefault((d.cause.text.partition(" (cosine")[0], own), []).append(d)
    for some in groups.values():
        yield max(some, key=lambda d: _or_largest(d.relative)).cause.text, some


def _or_largest(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _names(names: Sequence[str]) -> str:
    """Tensors, those of one kind together: "layers 0–3: moe.down, moe.gate_up"."""
    kinds: dict[str, list[int]] = {}
    for name in names:
        layer = _layer_of(name)
        kinds.setdefault(_inside(name), []).extend([] if layer is None else [layer])
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for kind, layers in kinds.items():
        by_layers.setdefault(tuple(layers), []).append(kind)
    said = []
    for layers, some in by_layers.items():
        shown = ", ".join(some[:_MOST_KINDS]) + (f" and {len(some) - _MOST_KINDS} more" * (len(some) > _MOST_KINDS))
        if len(layers) == 1 and len(some) == 1:
            said.append(f"layers.{layers[0]}.{some[0]}")
        else:
            said.append(f"{_layers(layers)} {shown}" if layers else shown)
    more = f"; and {len(said) - 3} more groups of layers" if len(said) > 3 else ""
    return "; ".join(said[:3]) + more


def _layers(layers: Sequence[int]) -> str:
    """ "layers 0–3, 6" """
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    shown = [f"{a}" if a == b else f"{a}–{b}" for a, b in spans]
    more = ", …" if len(shown) > 6 else ""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(shown[:6])}{more}"

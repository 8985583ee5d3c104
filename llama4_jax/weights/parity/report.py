"""What a comparison found, as text for people and JSON for machines."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama4_jax.weights.parity.causes import Cause, Rounding
from llama4_jax.weights.parity.diff import Comparison


@dataclass(frozen=True)
class Difference:
    """Of two arrays, as fractions of the reference's largest magnitude.

    - first_position: the first where the tolerance is exceeded; None if it nowhere is
    """

    max: float
    mean: float
    first_position: int | None = None

    def within(self, tolerance: float) -> bool:
        return self.max <= tolerance  # False for NaN


@dataclass(frozen=True)
class Gradients:
    """Of one part of the model, for the same input and the same gradient of its output: the worst tensor's difference.

    - carried: the same when each side has come backwards on its own from its own loss
    """

    worst: str
    max: float
    mean: float
    carried: float


@dataclass
class LayerReport:
    """One layer of ours on the reference's input to it.

    - alone: the worst of the attention's, the feed-forward's and the layer's output, each by its own scale
    - carried: the layer's output when each side has come here on its own
    - routing, routing_carried: share of the tokens for which both choose the same experts; None without experts
    - ties: tokens for which they do not, as the logits of the experts in question are equal within the tolerance: no
      fault, and left out
    - decode: the last positions one by one through the cache, against ours at once; None if none were
    - own: ours on quantized weights against ours in float32 on the same weights dequantized, as `alone`: what the code
      does, and not the weights. None if the reference has the same weights
    - rounding: of quantized weights beside the reference's; None if the reference's are quantized too, or the same
    """

    layer: int
    kind: str
    alone: Difference
    carried: Difference
    routing: float | None
    routing_carried: float | None
    ties: int
    decode: Difference | None
    gradients: Gradients | None = None
    own: Difference | None = None
    rounding: Rounding | None = None


@dataclass(frozen=True)
class Logits:
    """At the end of both ways through the model.

    - scale: the largest magnitude of the reference's
    - top1, top1_by_position: share of positions, and of the rows at each, with the same most likely token
    - max_by_position: largest difference at each position, of `scale`
    - kl_by_position: KL(reference || ours) in nats, mean over the rows
    - loss: mean cross entropy of the next token in nats, (ours, the reference's)
    - loss_by_position: the same at each position but the last, which has no next token
    """

    difference: Difference
    scale: float
    top1: float
    top1_by_position: list[float]
    max_by_position: list[float]
    kl_by_position: list[float]
    loss: tuple[float, float]
    loss_by_position: list[tuple[float, float]]

    @property
    def perplexity(self) -> tuple[float, float]:
        """(ours, the reference's)"""
        return math.exp(self.loss[0]), math.exp(self.loss[1])

    def spans(self) -> "list[Span]":
        """Means over eight spans of positions."""
        length = len(self.kl_by_position)
        bounds = sorted({round(length * i / _SPANS) for i in range(_SPANS + 1)})
        return [self._span(first, end) for first, end in itertools.pairwise(bounds)]

    def _span(self, first: int, end: int) -> "Span":
        losses = self.loss_by_position[first:end] or [(math.nan, math.nan)]
        ours, reference = (math.exp(_mean(side)) for side in zip(*losses, strict=True))
        return Span(
            positions=(first, end - 1),
            kl=_mean(self.kl_by_position[first:end]),
            top1=_mean(self.top1_by_position[first:end]),
            perplexity=(ours, reference),
        )


_SPANS = 8
BFLOAT16_TOLERANCE = 5e-2  # of a part of the model; see `options.TOLERANCE`


@dataclass(frozen=True)
class Span:
    """Positions from the first to the last of `positions`: KL in nats, share of the same most likely token, and
    perplexity, (ours, the reference's); NaN where there is no next token."""

    positions: tuple[int, int]
    kl: float
    top1: float
    perplexity: tuple[float, float]


@dataclass(frozen=True)
class Boundaries:
    """Positions where a new chunk begins, and where the temperature rises, among those compared.

    - missed: what the tokens are too few to reach, in words
    """

    chunks: list[int]
    temperatures: list[int]
    missed: list[str]


@dataclass(frozen=True)
class Divergence:
    """The first place where ours is not the reference, and why. `layer` is None outside the layers."""

    where: str
    layer: int | None
    cause: Cause | None


@dataclass
class Report:
    """All numbers are relative to the scale of what is compared, unless their names say otherwise.

    - tolerance: of each part alone; what is carried through the model may differ by `carried_tolerance`, gradients by
      `gradient_tolerance`
    - weights: how the tensors of two directories differ; None of one, and of quantized ones
    - decoded: positions that were also decoded one by one
    - quantized: how the candidate's weights are, in words, if the reference's are not or otherwise. What comes of other
      weights is then reported and not judged: only what the code does with them, and whether they are the
      reference's, rounded
    """

    reference: str
    candidate: str
    quantized: str | None
    tokens: str
    shape: tuple[int, int]
    tolerance: float
    carried_tolerance: float
    gradient_tolerance: float
    boundaries: Boundaries
    decoded: int
    embedding: Difference
    layers: list[LayerReport]
    head: Difference
    logits: Logits
    gradients: dict[str, Gradients]
    divergence: Divergence | None
    weights: Comparison | None = None

    @property
    def failures(self) -> list[str]:
        """What exceeds its tolerance, in the order of the model."""
        checks = [("the embedding", self.embedding.max, self.kept_tolerance)]
        for layer in self.layers:
            if layer.own is None:
                checks.append((f"layer {layer.layer}", layer.alone.max, self.tolerance))
            else:
                checks.append((f"layer {layer.layer} on its own weights", layer.own.max, self.tolerance))
            if layer.decode is not None:
                checks.append((f"decoding in layer {layer.layer}", layer.decode.max, self.tolerance))
        checks.append(("the final norm and output head", self.head.max, self.kept_tolerance))
        if self.quantized is None:
            checks.append(("the logits at the end", self.logits.difference.max, self.carried_tolerance))
        for name, gradients in [*self.gradients.items(), *self._layer_gradients()]:
            checks.append((f"the gradient of {gradients.worst} in {name}", gradients.max, self.gradient_tolerance))
        unsound = [r for r in self.layers if r.rounding is not None and not r.rounding.sound]
        return [
            *(f"the weights of layer {r.layer}: {r.rounding.cause().text}" for r in unsound),
            *(f"{name}: {value:.1e} > {limit:.0e}" for name, value, limit in checks if not value <= limit),
        ]

    @property
    def kept_tolerance(self) -> float:
        """Of embedding and output head. Beside quantized weights they may have been cast to bfloat16."""
        return self.tolerance if self.quantized is None else max(self.tolerance, BFLOAT16_TOLERANCE)

    def _layer_gradients(self) -> list[tuple[str, Gradients]]:
        return [(f"layer {r.layer}", r.gradients) for r in reversed(self.layers) if r.gradients is not None]

    @property
    def passed(self) -> bool:
        return not self.failures

    def text(self) -> str:
        weights = [] if self.weights is None else self.weights.lines()
        parts = (self._head(), self._table(), self._end(), self._by_position(), weights, self._verdict())
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def _head(self) -> list[str]:
        batch, length = self.shape
        crossed = f"{len(self.boundaries.chunks)} chunk boundaries and {len(self.boundaries.temperatures)} steps of the"
        own = ["Own: alone, but against ours in float32 on the same weights dequantized."]
        decode = [
            f"Decode: the last {self.decoded} positions one by one through our cache, against all of them at once."
        ]
        return [
            f"reference  {self.reference}",
            f"candidate  {self.candidate}",
            f"tokens     {batch} × {length}, {self.tokens}; they cross {crossed} temperature",
            *(f"           not reached: {line}" for line in self.boundaries.missed),
            "",
            "Differences are fractions of the reference's largest magnitude. Alone: a layer of ours on the reference's",
            "input to it. Carried: when both have come that far on their own.",
            *(own if self.quantized is not None else []),
            *(decode if self.decoded else []),
        ]

    def _table(self) -> list[str]:
        header = ["layer", "kind", "alone max", "mean", "routing", "carried max", "mean", "routing", "decode"]
        header += [] if self.quantized is None else ["own"]
        with_gradients = any(r.gradients is not None for r in self.layers)
        header += ["gradient", "carried", "worst tensor"] if with_gradients else []
        lines = [header]
        for r in self.layers:
            line = [str(r.layer), r.kind, _number(r.alone.max), _number(r.alone.mean)]
            line += [_percent(r.routing) + (f" ({r.ties} ties)" if r.ties else "")]
            line += [_number(r.carried.max), _number(r.carried.mean), _percent(r.routing_carried)]
            line += ["–" if r.decode is None else _number(r.decode.max)]
            line += [] if self.quantized is None else ["–" if r.own is None else _number(r.own.max)]
            if r.gradients is not None:
                worst = r.gradients.worst.removeprefix(f"layers.{r.layer}.")
                line += [_number(r.gradients.max), _number(r.gradients.carried), worst]
            if not (r.alone if r.own is None else r.own).within(self.tolerance):
                line[0] = f"✗ {line[0]}"
            lines.append(line)
        return _columns(lines)

    def _end(self) -> list[str]:
        logits, kl = self.logits, self.logits.kl_by_position
        worst = max(range(len(kl)), key=lambda p: kl[p] if not math.isnan(kl[p]) else math.inf)
        lines = [
            f"embedding  max {_number(self.embedding.max)}",
            f"head       alone max {_number(self.head.max)}, mean {_number(self.head.mean)}",
            f"logits     max {_number(logits.difference.max)}, mean {_number(logits.difference.mean)} of "
            f"{logits.scale:.3g}; top-1 agreement {_percent(logits.top1)}; loss {logits.loss[0]:.6f} (ours), "
            f"{logits.loss[1]:.6f} nats (the reference)",
            f"perplexity {logits.perplexity[0]:.6g} (ours), {logits.perplexity[1]:.6g} (the reference)",
            f"KL         mean {_number(_mean(kl))}, largest {_number(kl[worst])} nats at position {worst}",
        ]
        for name, g in self.gradients.items():
            lines.append(f"gradients  of {name}: max {_number(g.max)}, carried {_number(g.carried)} ({g.worst})")
        return lines

    def _by_position(self) -> list[str]:
        lines = [["positions", "KL mean", "top-1", "perplexity", "reference"]]
        for span in self.logits.spans():
            ours, reference = (f"{value:.5g}" if math.isfinite(value) else "–" for value in span.perplexity)
            first, last = span.positions
            lines.append([f"{first}–{last}", _number(span.kl), _percent(span.top1), ours, reference])
        return _columns(lines)

    def _verdict(self) -> list[str]:
        if self.quantized is not None and self.passed:
            return self._quantized()
        if self.passed:
            return [f"SAME within {self.tolerance:.0e} a layer and {self.carried_tolerance:.0e} at the end."]
        failures = self.failures
        lines = []
        if self.divergence is not None:
            lines.append(f"DIFFERENT, first in {self.divergence.where}.")
            if self.divergence.cause is not None:
                cause = self.divergence.cause
                lines.append(f"  first to differ inside: {cause.stage}, from position {cause.position} on")
                lines.append(f"  likely cause: {cause.text}")
        else:
            lines.append("DIFFERENT.")
        return [*lines, *(f"  {line}" for line in failures[:8]), *(["  …"] if len(failures) > 8 else [])]

    def _quantized(self) -> list[str]:
        lines = [f"QUANTIZED, and otherwise the same: the candidate's weights are {self.quantized}."]
        rounded = [r.rounding for r in self.layers if r.rounding is not None]
        if rounded:
            worst = max(rounded, key=lambda r: r.steps)
            lines.append(
                f"  {sum(r.tensors for r in rounded)} matrices are the reference's, rounded: off by at most "
                f"{worst.steps:.2f} steps from one number to the next ({worst.worst})."
            )
        lines.append(f"  On its own weights ours is right within {self.tolerance:.0e} a layer.")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Everything, in types that JSON has; what is not finite is null."""
        made = dataclasses.asdict(self) | {"passed": self.passed, "failures": self.failures}
        spans = [dataclasses.asdict(span) for span in self.logits.spans()]
        made["logits"] |= {"perplexity": self.logits.perplexity, "spans": spans}
        return _plain(made)


def _columns(lines: list[list[str]]) -> list[str]:
    """A table under its header: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = [str.ljust if name in ("kind", "worst tensor") else str.rjust for name in lines[0]]
    made = []
    for line in lines:
        cells = (to(cell, width) for to, cell, width in zip(align, line, widths, strict=True))
        made.append("  ".join(cells).rstrip())
    return made


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.4g} %"


def _number(x: float) -> str:
    return f"{x:.1e}"


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
    return value

"""Why a layer differs: the published formula in plain numpy, with a switch for everything that is known to go wrong.

The formula is a third opinion. It is computed by the rules that each side's config states, and with one rule changed at
a time, on the very numbers each side had: where it gives a side's output, it says by which rules that side computes.
Thus it makes no difference whether a config is wrong, our code or the reference's, and a fault is named in words:

    ours computes with a RoPE factor of 8, the reference with 16

Sources: the formulas as `model/` documents them; the ways to be wrong are those found in other implementations.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from llama4_jax.model.config import LayerSpec, ModelConfig, QueryScaleKind, RopeScaling
from llama4_jax.weights.parity.diff import axes_of
from llama4_jax.weights.parity.sides import CHOSEN, STAGES, Stages, Tensors
from llama4_jax.weights.parity.tensors import how_they_differ
from llama4_jax.weights.table import rows

_DROP = 5  # a change explains a difference if it makes it this many times smaller, and no more than the tolerance


@dataclass(frozen=True, kw_only=True)
class AttentionRules:
    rope: bool
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_pairs: Literal["neighbours", "halves"] = "neighbours"  # which two elements of a head are one complex number
    qk_norm: bool
    query_scale: QueryScaleKind
    temperature_floor: int
    temperature_coef: float
    chunk: int | None
    kv_groups: Literal["blocks", "interleaved"] = "blocks"  # which query heads read a key/value head
    norm_eps: float


@dataclass(frozen=True, kw_only=True)
class FeedForwardRules:
    top_k: int
    gate: Literal["before", "after", "none"] = "before"  # where the router's gate is multiplied: the experts' input
    scores: Literal["sigmoid", "softmax", "softmax of the chosen"] = "sigmoid"
    halves: Literal["gate, up", "up, gate"] = "gate, up"  # of the experts' first matrix
    shared: bool = True
    norm_eps: float


Rules = AttentionRules | FeedForwardRules


@dataclass(frozen=True)
class Cause:
    """What is known of the first layer that differs.

    - stage: the first inside the layer that differs, position: from which one on
    - text: the likely cause in a sentence or two
    - rules: {name: (of ours, of the reference)} where the two compute by different rules
    """

    stage: str
    position: int
    text: str
    rules: dict[str, tuple[Any, Any]]


_MOST_STEPS = 1.5  # rounding makes half a step; Meta's int4, which cuts off the largest number of a group, up to one
_CAST = 2.0**-7  # of what is not quantized, but perhaps in bfloat16 on one side


@dataclass(frozen=True)
class Rounding:
    """How the weights of a quantized layer differ from the reference's.

    - tensors: how many are quantized
    - worst, steps: that which is farthest off, in steps from one of the numbers that it can hold to the next
    - others: in words, those that are not quantized, and differ
    """

    tensors: int
    worst: str
    steps: float
    others: list[str]

    @property
    def sound(self) -> bool:
        """They are the reference's weights, rounded."""
        return self.steps <= _MOST_STEPS and not self.others

    def cause(self) -> Cause:
        text = (
            _of_weights(self.others)
            if self.others
            else (
                f"the weights are quantized, and not from the reference's: {self.worst} is off by {self.steps:.3g} "
                f"steps from one number that it can hold to the next, where rounding makes half a step."
            )
        )
        return Cause("weights", 0, text, {})


def rounding(
    config: ModelConfig,
    ours: Callable[[str], np.ndarray],
    step: Callable[[str], np.ndarray | None],
    theirs: Tensors,
) -> Rounding | None:
    """The weights of a layer beside the reference's; None if none is quantized.

    - ours: a tensor by its name, dequantized
    - step: how far each of its numbers is from the next; None of what is not quantized
    """
    off, others = {}, []
    for name, right in theirs.items():  # one after another, since a layer may be all that fits
        mine, steps = ours(name), step(name)
        if steps is None:
            others += _unequal_weights(config, {name: mine}, {name: right}, _CAST)
        else:
            off[name] = float(np.max(np.abs(mine - right) / steps))
    if not off:
        return None
    worst = max(off, key=lambda name: float(np.nan_to_num(off[name], nan=np.inf)))
    return Rounding(len(off), worst, off[worst], others)


def diagnose(
    i: int,
    x: Float[np.ndarray, "B T D"],
    ours: tuple[ModelConfig, Stages, Tensors],
    theirs: tuple[ModelConfig, Stages, Tensors],
    same: Bool[np.ndarray, "B T"],
    tolerance: float,
    known: Mapping[str, str],
) -> Cause:
    """The cause of a difference in layer i, given its input and each side's config, stages and parameters.

    - same: False where the two chose other experts by a tie, which is no fault
    - known: how tensors of the two directories differ, in words, as far as they were compared
    """
    stage, position = _first_difference(ours[1], theirs[1], same, tolerance)
    unequal = _unequal_weights(ours[0], ours[2], theirs[2], tolerance, known)
    if unequal:
        return Cause(stage, position, _of_weights(unequal), {})
    of_attention = STAGES.index(stage) <= STAGES.index("attention output")
    missing = [name for name in ("attention output", "feed-forward output") if name not in theirs[1]]
    if missing:
        text = "unknown: with attention and feed_forward of this layer in the recording, a cause may be named."
        return Cause(stage, position, text, {})
    if not of_attention and not ours[0].layers[i].moe:
        return Cause(stage, position, "unknown: the dense feed-forward differs, though its weights are the same.", {})
    make, formula, output = (
        (_attention_rules, _attention, "attention output")
        if of_attention
        else (_feed_forward_rules, _experts, "feed-forward output")
    )
    stated = [make(config, config.layers[i]) for config, _, _ in (ours, theirs)]
    tried = list(dict.fromkeys(rule for rules in stated for rule in (rules, *_changes(rules, ours[0], theirs[0]))))
    computes, found = [], []
    for (_, stages, tensors), own in zip((ours, theirs), stated, strict=True):
        weights = {name.removeprefix(f"layers.{i}."): array for name, array in tensors.items()}
        given = x if of_attention else x + stages["attention output"]
        computes.append(functools.partial(formula, given, weights))
        found.append(_computes_by(own, tried, computes[-1], stages[output], tolerance))
    return Cause(stage, position, *_words(stated, found, computes[0]))


def diagnose_head(
    config: ModelConfig, ours: Tensors, theirs: Tensors, position: int, tolerance: float, known: Mapping[str, str]
) -> Cause:
    """The cause of a difference in the final norm and output head, given both sides' parameters."""
    unequal = _unequal_weights(config, ours, theirs, tolerance, known)
    return Cause("logits", position, _of_weights(unequal) if unequal else "unknown: the weights are the same.", {})


def _of_weights(unequal: list[str]) -> str:
    more = f"; and {len(unequal) - 6} more" if len(unequal) > 6 else ""
    return f"the weights differ: {'; '.join(unequal[:6])}{more}."


def _first_difference(ours: Stages, theirs: Stages, same: Bool[np.ndarray, "B T"], tolerance: float) -> tuple[str, int]:
    """The first stage inside a layer that differs, and the first position where it does."""
    for name in STAGES:
        if name not in ours or name not in theirs:  # one has a rotation, say, and the other has not
            continue
        a, b = ours[name], theirs[name]
        if name == CHOSEN:
            wrong = (a != b).any(axis=-1) if a.shape == b.shape else np.ones(same.shape, bool)
        else:
            wrong = ~(np.abs(a - b) <= tolerance * (np.abs(b).max() or 1.0)).all(axis=-1)
        if STAGES.index(name) >= STAGES.index(CHOSEN):
            wrong &= same
        if wrong.any():
            return name, int(np.flatnonzero(wrong.any(axis=0))[0])
    raise AssertionError("a layer differs, and its output is one of its stages")


def _computes_by(
    own: Rules, tried: list[Rules], formula: Callable[[Rules], np.ndarray], output: np.ndarray, tolerance: float
) -> Rules | None:
    """The rules by which the formula gives a side's output: its own if they do, else the best of those tried."""
    scale = np.abs(output).max()

    def error(rules: Rules) -> float:
        return float(np.abs(formula(rules) - output).max() / scale)

    own_error = error(own)
    if own_error <= tolerance:
        return own
    errors = {rules: error(rules) for rules in tried if rules != own}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= min(tolerance, own_error / _DROP) else None


def _words(
    stated: list[Rules], found: list[Rules | None], compute: Callable[[Rules], np.ndarray]
) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """A sentence or two, and the rules in which the sides differ."""
    names = ("ours", "the reference")
    if None in found:
        lost = names[found.index(None)]
        known = "" if found == [None, None] else f" ({names[1 - found.index(None)]} computes what its config says)"
        return f"unknown: no single change of the published formula gives the output of {lost}{known}.", {}
    mine, rules = found[0], {}
    for field in dataclasses.fields(mine):
        a, b = (getattr(rule, field.name) for rule in found)
        # Configs may differ in what plays no part in this layer.
        if a != b and not np.array_equal(compute(mine), compute(dataclasses.replace(mine, **{field.name: b}))):
            rules[field.name] = (a, b)
    if not rules:
        return "unknown: by the published formula both sides compute alike; only their rounding differs.", {}
    parts = [f"ours computes {_say(name, a)}, the reference {_say(name, b)}" for name, (a, b) in rules.items()]
    wrong = [f"{names[n]} does not compute what its config says" for n in (0, 1) if stated[n] != found[n]]
    why = " and ".join(wrong) if wrong else "each does what its config says, and the configs differ"
    return f"{'; '.join(parts)}. With the same rule they match ({why}).", rules


def _say(name: str, value: Any) -> str:
    match name, value:
        case "rope", _:
            return "with RoPE" if value else "without RoPE"
        case "rope_theta", _:
            return f"with a RoPE theta of {value:g}"
        case "rope_scaling", None:
            return "without RoPE scaling"
        case "rope_scaling", RopeScaling():
            return (
                f"with a RoPE factor of {value.factor:g} (low {value.low_freq_factor:g}, high "
                f"{value.high_freq_factor:g}, original context {value.original_context})"
            )
        case "rope_pairs", _:
            return f"with RoPE on {'neighbouring elements' if value == 'neighbours' else 'the two halves of a head'}"
        case "qk_norm", _:
            return "with qk-norm" if value else "without qk-norm"
        case "query_scale", "none":
            return "without a temperature"
        case "query_scale", _:
            return f"with the query scale {value!r}"
        case "temperature_floor", _:
            return f"with a temperature floor of {value}"
        case "temperature_coef", _:
            return f"with a temperature coefficient of {value:g}"
        case "chunk", None:
            return "attending to the whole past"
        case "chunk", _:
            return f"attending within chunks of {value}"
        case "kv_groups", _:
            return f"with the query heads of a key/value head in {'one block' if value == 'blocks' else 'turn'}"
        case "norm_eps", _:
            return f"with a norm epsilon of {value:g}"
        case "top_k", _:
            return f"with {value} expert(s) a token"
        case "gate", "none":
            return "without the router's gate"
        case "gate", _:
            return f"with the router's gate {value} the experts"
        case "scores", _:
            return f"with a {value} as gate"
        case "halves", _:
            return f"with the experts' first matrix as {value}"
        case "shared", _:
            return "with the shared expert" if value else "without the shared expert"
    raise AssertionError(name)


def _unequal_weights(
    config: ModelConfig,
    ours: Tensors,
    theirs: Tensors,
    tolerance: float,
    known: Mapping[str, str] = types.MappingProxyType({}),
) -> list[str]:
    """Each tensor that differs by more than the tolerance, and how."""
    found, table = [], {row.ours: row for row in rows(config)}
    for name, right in theirs.items():
        mine = ours[name]
        difference = np.abs(mine - right).max() / (np.abs(right).max() or 1.0)
        if not difference <= tolerance:
            how = known.get(name)
            if how is None:
                axes, contracted = axes_of(table, name, right.ndim)
                how = how_they_differ(mine, right, axes, contracted=contracted).text
            found.append(f"{name} ({how}; by {difference:.0e} of its largest)")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The formula


def _attention_rules(config: ModelConfig, spec: LayerSpec) -> AttentionRules:
    return AttentionRules(
        rope=spec.rope,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        qk_norm=spec.qk_norm,
        query_scale=spec.query_scale,
        temperature_floor=config.temperature_floor,
        temperature_coef=config.temperature_coef,
        chunk=spec.chunk,
        norm_eps=config.norm_eps,
    )


def _feed_forward_rules(config: ModelConfig, spec: LayerSpec) -> FeedForwardRules:
    return FeedForwardRules(top_k=config.top_k, norm_eps=config.norm_eps)


def _changes(rules: Rules, *configs: ModelConfig) -> Iterator[Rules]:
    """The rules with one changed."""
    if isinstance(rules, AttentionRules):
        original = {c.rope_scaling.original_context for c in configs if c.rope_scaling} or {8192}
        options = {
            "rope": (True, False),
            "rope_theta": (10_000.0, 500_000.0, *(c.rope_theta for c in configs)),
            "rope_scaling": (
                None,
                # Scout's as corrected, and as first published
                *(RopeScaling(factor=16.0, high_freq_factor=1.0, original_context=context) for context in original),
                *(RopeScaling(factor=8.0, high_freq_factor=4.0, original_context=context) for context in original),
                *(RopeScaling(factor=8.0, high_freq_factor=1.0, original_context=context) for context in original),
            ),
            "rope_pairs": ("halves",),
            "qk_norm": (True, False),
            "query_scale": ("none", "temperature"),
            "chunk": (None, *(c.attention_chunk for c in configs)),
            "kv_groups": ("interleaved",),
            "norm_eps": (1e-5, 1e-6),
        }
    else:
        options = {
            "top_k": (1, 2),
            "gate": ("after", "none"),
            "scores": ("softmax", "softmax of the chosen"),
            "halves": ("up, gate",),
            "shared": (False,),
            "norm_eps": (1e-5, 1e-6),
        }
    for name, values in options.items():
        for value in values:
            yield dataclasses.replace(rules, **{name: value})


def _attention(
    x: Float[np.ndarray, "B T D"], weights: Mapping[str, np.ndarray], rules: AttentionRules
) -> Float[np.ndarray, "B T D"]:
    x = _rms(x, rules.norm_eps) * weights["attention_norm.scale"]
    q, k, v = (np.einsum("btd,dnh->bnth", x, weights[f"attention.{name}.kernel"]) for name in "qkv")
    positions = np.arange(x.shape[1])
    if rules.rope:
        q, k = (_rotate(a, positions, rules) for a in (q, k))
    if rules.qk_norm:
        q, k = _rms(q, rules.norm_eps), _rms(k, rules.norm_eps)
    q = q * _query_scale(positions, weights, rules)
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a, group, 1) if rules.kv_groups == "blocks" else np.tile(a, (1, group, 1, 1)) for a in (k, v))
    seen = positions[None] <= positions[:, None]
    if rules.chunk is not None:
        seen &= positions[None] // rules.chunk == positions[:, None] // rules.chunk
    out = np.empty_like(q)
    for head in range(q.shape[1]):  # one at a time: T × T scores
        scores = np.where(seen, q[:, head] @ k[:, head].swapaxes(1, 2) * np.float32(q.shape[-1] ** -0.5), -np.inf)
        out[:, head] = _softmax(scores) @ v[:, head]
    return np.einsum("bnth,nhd->btd", out, weights["attention.o.kernel"])


def _rotate(
    x: Float[np.ndarray, "B heads T H"], positions: np.ndarray, rules: AttentionRules
) -> Float[np.ndarray, "B heads T H"]:
    half, scaling = x.shape[-1] // 2, rules.rope_scaling
    frequency = rules.rope_theta ** (-np.arange(half) / half)
    if scaling is not None:
        turns = scaling.original_context * frequency / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = (turns >= low) if low == high else np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    angle = positions[:, None].astype(np.float32) * frequency.astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    out = np.empty_like(x)
    neighbours = rules.rope_pairs == "neighbours"
    first, second = (np.s_[..., ::2], np.s_[..., 1::2]) if neighbours else (np.s_[..., :half], np.s_[..., half:])
    out[first], out[second] = x[first] * cos - x[second] * sin, x[first] * sin + x[second] * cos
    return out


def _query_scale(
    positions: np.ndarray, weights: Mapping[str, np.ndarray], rules: AttentionRules
) -> np.ndarray | np.float32:
    match rules.query_scale:
        case "none":
            return np.float32(1)
        case "temperature":
            bucket = np.floor((positions + 1) / rules.temperature_floor)
            return (1 + rules.temperature_coef * np.log(bucket + 1)).astype(np.float32)[:, None]
        case _:  # scalable softmax, with its parameters for each head
            log_n = np.log((positions if rules.chunk is None else positions % rules.chunk) + 1).astype(np.float32)
            scale = weights["attention.ssmax.s"][:, None] * log_n
            bias = weights.get("attention.ssmax.b")
            return (scale if bias is None else scale + bias[:, None])[..., None]


def _experts(
    x: Float[np.ndarray, "B T D"], weights: Mapping[str, np.ndarray], rules: FeedForwardRules
) -> Float[np.ndarray, "B T D"]:
    rows = (_rms(x, rules.norm_eps) * weights["mlp_norm.scale"]).reshape(-1, x.shape[-1])
    logits = rows @ weights["moe.router.kernel"]
    by = logits if "moe.bias" not in weights else _sigmoid(logits) + weights["moe.bias"]
    chosen = np.argsort(-by, axis=-1, kind="stable")[:, : rules.top_k]
    own = np.take_along_axis(logits, chosen, -1)
    match rules.scores:
        case "sigmoid":
            gates = _sigmoid(own)
        case "softmax":
            gates = np.take_along_axis(_softmax(logits), chosen, -1)
        case "softmax of the chosen":
            gates = _softmax(own)
    kernel = weights["moe.gate_up"] if rules.halves == "gate, up" else weights["moe.gate_up"][:, ::-1]
    halves = weights["moe.shared.gate_up.kernel"].swapaxes(0, 1)
    shared = _swiglu(rows, halves, weights["moe.shared.down.kernel"])
    out = shared if rules.shared else np.zeros_like(shared)
    for expert in np.unique(chosen):
        token, choice = np.nonzero(chosen == expert)
        gate = gates[token, choice][:, None]
        given = rows[token] * gate if rules.gate == "before" else rows[token]
        result = _swiglu(given, kernel[expert], weights["moe.down"][expert])
        out[token] += result * gate if rules.gate == "after" else result
    return out.reshape(x.shape)


def _swiglu(x: np.ndarray, gate_up: Float[np.ndarray, "2 D F"], down: Float[np.ndarray, "F D"]) -> np.ndarray:
    gate, up = x @ gate_up[0], x @ gate_up[1]
    return (gate * _sigmoid(gate) * up) @ down


def _rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(np.float32(0), -x))

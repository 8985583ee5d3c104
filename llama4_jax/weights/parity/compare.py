"""The walk through the model, one layer of each side at a time."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from llama4_jax.model.config import LayerSpec
from llama4_jax.weights.parity.causes import Cause, diagnose, diagnose_head, rounding
from llama4_jax.weights.parity.diff import Comparison, check_sizes, diff
from llama4_jax.weights.parity.gradients import backwards
from llama4_jax.weights.parity.options import (
    ParityOptions,
    boundaries,
    check,
    make_tokens,
    row_length,
    tolerance_of,
)
from llama4_jax.weights.parity.ours import OurLayer, Ours
from llama4_jax.weights.parity.plot import plot
from llama4_jax.weights.parity.recorded import Recorded
from llama4_jax.weights.parity.report import (
    BFLOAT16_TOLERANCE,
    Difference,
    Divergence,
    LayerReport,
    Logits,
    Report,
)
from llama4_jax.weights.parity.sides import CHOSEN, Side, Stages, positions_at_once
from llama4_jax.weights.source import Weights, open_weights
from llama4_jax.weights.table import SCALE

# What may differ by more, in tolerances. Measured as those were: logits at the end 8e-7 and 0.13, gradients 1.2e-6 and
# 2.7e-2.
_CARRIED = 10
_GRADIENTS = 2
_COMPARED = ("attention output", "feed-forward output", "layer output")


def run(options: ParityOptions, *, say: Callable[[str], None] = lambda line: None) -> Report:
    """Compares, and writes the files that are asked for.

    - say: is told of each layer when it is done, in a line

    Of a quantized directory and one that is not, the latter is the reference, whichever is named first.

    Raises ValueError for options that make no sense or do not fit the directories, and for packages that are not
    installed; FileNotFoundError for a path that is not there.
    """
    check(options)
    weights = open_weights(options.path)
    against = weights if options.against is None else open_weights(options.against)
    check_sizes(weights, against)
    if is_quantized(weights) and not is_quantized(against):
        options = dataclasses.replace(options, path=options.against, against=options.path)
        weights, against = against, weights
    if options.grads and is_quantized(against):
        raise ValueError(f"--grads has nothing to compare with: {against.path} is quantized, for inference alone.")
    recorded = None
    if options.against_activations is not None:
        recorded = Recorded(options.against_activations, weights)
        tokens, source = recorded.tokens, f"of {options.against_activations}"
    else:
        tokens, source = make_tokens(options, weights.config, row_length(options, weights.config))
    ours = Ours(against, options.dtype)
    comparison = None
    if weights is not against and not is_quantized(against):
        say("the weights")
        comparison = diff(against, weights)
    # Elsewhere than on a CPU, products of float32 are made of less unless told otherwise.
    with (
        jax.default_matmul_precision("highest"),
        _open_reference(options, weights, tokens.shape[1], recorded) as reference,
    ):
        report = _compare(
            reference, ours, tokens, source, tolerance_of(options, ours.schemes.values()), options, comparison, say
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report.as_json(), indent=1, allow_nan=False), encoding="utf-8")
    if options.plot is not None:
        plot(report, options.plot)
    return report


def is_quantized(weights: Weights) -> bool:
    names = set(weights.names)
    return any(name + SCALE in names for name in names)


@contextlib.contextmanager
def _open_reference(options: ParityOptions, weights: Weights, length: int, recorded: Recorded | None) -> Iterator[Side]:
    if recorded is not None:
        yield recorded
        return
    kind = options.reference
    if kind == "auto":
        kind = {"hf": "transformers", "meta": "meta", "run": "ours"}[weights.format]
    needed = {"transformers": "hf", "meta": "meta"}
    if kind in needed and weights.format != needed[kind]:
        raise ValueError(
            f"--reference {kind} does not read {options.path}, whose format is {weights.format!r}. Give --reference "
            f"auto or ours."
        )
    if kind == "ours":
        yield Ours(weights, "float32", dequantize=True)
        return
    if kind == "meta" and options.grads:
        raise ValueError(
            "--grads has nothing to compare with: Meta's code cuts the gradients of its experts' input. Convert the "
            "directory to Hugging Face's format, or give --reference ours."
        )
    with contextlib.ExitStack() as stack:
        try:
            from llama4_jax.weights.parity import torch_sides

            if kind == "transformers":
                side = torch_sides.Transformers(weights, length)
            else:
                side = stack.enter_context(torch_sides.meta(weights, options.batch, length))
        except ImportError as error:
            raise ValueError(
                f"--reference {kind} needs a package that is not installed ({error}): pip install "
                f"'llama4-jax[convert]', or give --reference ours, which needs none."
            ) from error
        yield side


# ---------------------------------------------------------------------------------------------------------------------
# The walk


def _compare(
    reference: Side,
    ours: Ours,
    tokens: Int[np.ndarray, "B T"],
    source: str,
    tolerance: float,
    options: ParityOptions,
    comparison: Comparison | None,
    say: Callable[[str], None],
) -> Report:
    batch, length = tokens.shape
    decoded = min(options.decode, length - 1)
    theirs, mine = reference.embed(tokens), ours.embed(tokens)
    embedding = _difference(mine, theirs, tolerance)
    # What the weights say in float32, if that is not what the reference computes.
    own = None
    if ours.quantized and not (isinstance(reference, Ours) and reference.weights is ours.weights):
        own = Ours(ours.weights, "float32", dequantize=True)
    kept_tolerance = tolerance if own is None else max(tolerance, BFLOAT16_TOLERANCE)
    divergence = None
    known = {} if comparison is None else {d.name: d.cause.text for d in comparison.different}
    if not embedding.within(kept_tolerance):
        how = known.get("embed.embedding")
        text = f"the weights differ: embed.embedding ({how})." if how else "unknown: the weights are the same."
        divergence = Divergence("the embedding", None, Cause("embedding", embedding.first_position or 0, text, {}))
    inputs, ties, layers = [], [], []
    for i in range(reference.config.num_layers):
        inputs += [(theirs, mine)] if options.grads else []
        layer, divergence, same, (theirs, mine) = _layer(
            i, reference, ours, own, theirs, mine, tolerance=tolerance, decoded=decoded, known=divergence, weights=known
        )
        layers.append(layer)
        on_own = "" if layer.own is None else f", on its own weights {layer.own.max:.1e}"
        say(f"layer {i} of {reference.config.num_layers}: {layer.kind}, alone {layer.alone.max:.1e}{on_own}")
        ties.append(~same)
    head, logits, cause = _end(reference, ours, theirs, mine, tokens, tolerance, known)
    if divergence is None and not head.within(kept_tolerance):
        divergence = Divergence("the final norm and output head", None, cause)
    report = Report(
        reference=reference.label,
        candidate=ours.label,
        quantized=None if own is None else ours.scheme,
        tokens=source,
        shape=(batch, length),
        tolerance=tolerance,
        carried_tolerance=_CARRIED * tolerance,
        gradient_tolerance=_GRADIENTS * tolerance,
        boundaries=boundaries(reference.config, length),
        decoded=decoded,
        embedding=embedding,
        layers=layers,
        head=head,
        logits=logits,
        gradients={},
        divergence=divergence,
        weights=comparison,
    )
    if options.grads:
        say("the gradients")
        backwards(report, reference, ours, [*inputs, (theirs, mine)], ties, tokens)
    return report


def _layer(
    i: int,
    reference: Side,
    ours: Ours,
    own: Ours | None,
    theirs: Float[np.ndarray, "B T D"],
    mine: Float[np.ndarray, "B T D"],
    *,
    tolerance: float,
    decoded: int,
    known: Divergence | None,
    weights: Mapping[str, str],
) -> tuple[LayerReport, Divergence | None, Bool[np.ndarray, "B T"], tuple[np.ndarray, np.ndarray]]:
    """Layer i of both sides, given what came out of the one before: how they compare; the first difference, which is
    this one if none is `known` before; where there is no tie; and both outputs.

    - weights: how tensors differ, in words
    """
    their_layer, our_layer = reference.layer(i), ours.layer(i)
    right = their_layer.run(theirs)
    alone = our_layer.run(theirs)
    carried = our_layer.run(mine)
    same, routing, ties = _routing(alone, right, tolerance)
    _, routing_carried, _ = _routing(carried, right, tolerance)
    report = LayerReport(
        layer=i,
        kind=_kind(reference.config.layers[i]),
        alone=_stage_difference(alone, right, same, tolerance),
        carried=_difference(carried["layer output"], right["layer output"], tolerance * _CARRIED),
        routing=routing,
        routing_carried=routing_carried,
        ties=ties,
        decode=_decode(our_layer, theirs, alone, decoded, tolerance) if decoded else None,
    )
    judged = report.alone
    judge, judge_layer, judge_stages, judge_same = reference, their_layer, right, same
    if own is not None:
        judge, judge_layer = own, own.layer(i)
        judge_stages = judge_layer.run(theirs)
        judge_same, _, _ = _routing(alone, judge_stages, tolerance)
        judged = report.own = _stage_difference(alone, judge_stages, judge_same, tolerance)
        if not (isinstance(reference, Ours) and reference.quantized):
            report.rounding = rounding(ours.config, ours.tensor, ours.step, their_layer.tensors())
    if known is None and not judged.within(tolerance):
        cause = diagnose(
            i,
            theirs,
            (ours.config, alone, our_layer.tensors()),
            (judge.config, judge_stages, judge_layer.tensors()),
            judge_same,
            tolerance,
            weights,
        )
        known = Divergence(f"layer {i} ({report.kind})", i, cause)
    elif known is None and report.rounding is not None and not report.rounding.sound:
        known = Divergence(f"the weights of layer {i} ({report.kind})", i, report.rounding.cause())
    elif known is None and report.decode is not None and not report.decode.within(tolerance):
        known = Divergence(f"decoding in layer {i} ({report.kind})", i, None)
    return report, known, same, (right["layer output"], carried["layer output"])


def _kind(spec: LayerSpec) -> str:
    chunk = "" if spec.chunk is None else f" chunk {spec.chunk}"
    return f"{'RoPE' if spec.rope else 'NoPE'}{chunk}, {'experts' if spec.moe else 'dense'}"


def _difference(mine: np.ndarray, theirs: np.ndarray, tolerance: float) -> Difference:
    """Of [B, T, width] arrays."""
    error = np.abs(mine - theirs) / (np.abs(theirs).max() or 1.0)
    beyond = np.flatnonzero(~(error <= tolerance).all(axis=(0, 2)))
    return Difference(float(error.max()), float(error.mean()), int(beyond[0]) if beyond.size else None)


def _stage_difference(mine: Stages, theirs: Stages, same: Bool[np.ndarray, "B T"], tolerance: float) -> Difference:
    """The worst of the stages that make a layer's output. In the residual stream alone a fault of a late layer, which
    adds little to it, would not show."""
    found = []
    for name in _COMPARED:
        if name not in theirs:  # that was not recorded
            continue
        a = mine[name] if name == "attention output" else np.where(same[..., None], mine[name], theirs[name])
        found.append(_difference(a, theirs[name], tolerance))
    beyond = [d.first_position for d in found if d.first_position is not None]
    # np.max, as NaN must win
    return Difference(
        float(np.max([d.max for d in found])), float(np.max([d.mean for d in found])), min(beyond, default=None)
    )


def _routing(mine: Stages, theirs: Stages, tolerance: float) -> tuple[Bool[np.ndarray, "B T"], float | None, int]:
    """False where the two chose other experts by a tie; the share where they chose the same; how many ties.

    It is a tie if the reference's logits of the experts in question are as near to each other as the tolerance lets the
    two sides' be.
    """
    if CHOSEN not in mine or CHOSEN not in theirs or mine[CHOSEN].shape != theirs[CHOSEN].shape:
        return np.ones(theirs["layer output"].shape[:2], bool), None, 0
    equal = (mine[CHOSEN] == theirs[CHOSEN]).all(axis=-1)
    logits = theirs["router logits"]
    least_of_theirs = np.take_along_axis(logits, theirs[CHOSEN], -1).min(axis=-1)
    least_of_mine = np.take_along_axis(logits, mine[CHOSEN], -1).min(axis=-1)
    tie = ~equal & (np.abs(least_of_theirs - least_of_mine) <= 2 * tolerance * np.abs(logits).max())
    return ~tie, float(equal.mean()), int(tie.sum())


def _decode(
    layer: OurLayer, x: Float[np.ndarray, "B T D"], at_once: Stages, decoded: int, tolerance: float
) -> Difference:
    last = {name: stage[:, -decoded:] for name, stage in at_once.items()}
    one_by_one = layer.decode(x, decoded)
    same, _, _ = _routing(one_by_one, last, tolerance)
    difference = _stage_difference(one_by_one, last, same, tolerance)
    if difference.first_position is None:
        return difference
    return dataclasses.replace(difference, first_position=difference.first_position + x.shape[1] - decoded)


def _end(
    reference: Side,
    ours: Ours,
    theirs: Float[np.ndarray, "B T D"],
    mine: Float[np.ndarray, "B T D"],
    tokens: Int[np.ndarray, "B T"],
    tolerance: float,
    weights: Mapping[str, str],
) -> tuple[Difference, Logits, Cause | None]:
    """The final norm and output head alone; the logits at the end of both ways; why the former differ, if they do.

    A few positions at a time: all logits may not fit.
    """
    their_head, our_head = reference.head(), ours.head()
    length, vocab = theirs.shape[1], reference.config.vocab_size
    block = positions_at_once(len(tokens), vocab)
    scale, same_top, kl, losses = 0.0, [], [], []
    errors = {"alone": ([], 0.0), "end": ([], 0.0)}  # the largest at each position; the sum
    for start in range(0, length, block):
        part = slice(start, min(start + block, length))
        right, end = their_head.logits(theirs[:, part]), our_head.logits(mine[:, part])
        for name, logits in (("alone", our_head.logits(theirs[:, part])), ("end", end)):
            error, (largest, total) = np.abs(logits - right), errors[name]
            errors[name] = ([*largest, *error.max(axis=(0, 2)).tolist()], total + float(error.sum(dtype=np.float64)))
        scale = max(scale, float(np.abs(right).max()))
        same_top += (right.argmax(axis=-1) == end.argmax(axis=-1)).mean(axis=0).tolist()
        log_p, log_q = _log_softmax(right), _log_softmax(end)
        kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean(axis=0).tolist()
        targets = tokens[:, part.start + 1 : part.stop + 1, None]  # the last position has none
        nats = [
            -np.take_along_axis(log[:, : targets.shape[1]], targets, -1).mean(axis=(0, 2)) for log in (log_q, log_p)
        ]
        losses += zip(*(side.tolist() for side in nats), strict=True)

    def difference(name: str, tolerance: float) -> Difference:
        largest, total = errors[name]
        by_position = np.array(largest) / (scale or 1.0)
        beyond = np.flatnonzero(~(by_position <= tolerance))
        mean = total / (tokens.size * vocab * (scale or 1.0))
        return Difference(float(by_position.max()), mean, int(beyond[0]) if beyond.size else None)

    ours, reference = np.mean(losses, axis=0).tolist()
    logits = Logits(
        difference=difference("end", _CARRIED * tolerance),
        scale=scale,
        top1=float(np.mean(same_top)),
        top1_by_position=same_top,
        max_by_position=(np.array(errors["end"][0]) / (scale or 1.0)).tolist(),
        kl_by_position=kl,
        loss=(ours, reference),
        loss_by_position=losses,
    )
    alone = difference("alone", tolerance)
    if alone.within(tolerance):
        return alone, logits, None
    sides = our_head.tensors(), their_head.tensors()
    config = our_head.side.config
    return alone, logits, diagnose_head(config, *sides, alone.first_position or 0, tolerance, weights)


def _log_softmax(logits: Float[np.ndarray, "B T V"]) -> Float[np.ndarray, "B T V"]:
    """In float64: KL is a small difference of large numbers."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

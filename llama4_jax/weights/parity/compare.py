"""The walk through the model, one layer of each side at a time: forwards, and backwards for gradients."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from llama4_jax.inputs.tokenizer import load_tokenizer
from llama4_jax.model.config import LayerSpec, ModelConfig
from llama4_jax.weights.parity.causes import diagnose, diagnose_head
from llama4_jax.weights.parity.ours import OurLayer, Ours
from llama4_jax.weights.parity.plot import plot, require_matplotlib
from llama4_jax.weights.parity.report import (
    Boundaries,
    Difference,
    Divergence,
    Gradients,
    LayerReport,
    Logits,
    Report,
)
from llama4_jax.weights.parity.sides import CHOSEN, Head, Side, SideWithGradients, Stages, Tensors, positions_at_once
from llama4_jax.weights.source import Weights, open_weights

# Of a part alone, by the number format of ours. Measured on tiny models of eight layers, and a little above:
# float32 1e-6, bfloat16 2e-2.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
_CARRIED = 10  # what is carried through the whole model may differ by this much more
_GRADIENTS = 10  # and so may gradients

_MOST_TOKENS = 256  # of a row, unless asked for
_LEAST_TOKENS = 64
_DECODED = 32  # positions at most
_COMPARED = ("attention output", "feed-forward output", "layer output")


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """What is compared with what.

    - path: a Hugging Face or Meta directory, or a run: what the reference computes
    - against: the directory that ours computes; `path` itself if not given
    - reference: the code that runs `path`. auto: transformers for a Hugging Face directory, Meta's llama-models for a
      Meta directory, ours in float32 for a run
    - tokens: of a row; by default enough to pass two chunks and temperature buckets, if 256 are
    - batch: rows
    - seed: of random tokens
    - text: a file to take the tokens from instead, by the tokenizer in `path`
    - dtype: of our parameters and computation
    - grads: compare gradients of the next-token loss too
    - json, plot: files to write the report and its picture to
    - tolerance: of a part of the model alone, as a fraction of its output's largest magnitude
    """

    path: Path
    against: Path | None = None
    reference: Literal["auto", "transformers", "meta", "ours"] = "auto"
    tokens: int | None = None
    batch: int = 2
    seed: int = 0
    text: Path | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    grads: bool = False
    json: Path | None = None
    plot: Path | None = None
    tolerance: float | None = None


def run(options: ParityOptions) -> Report:
    """Compares, and writes the files that are asked for.

    Raises ValueError for options that make no sense or do not fit the directories, and for packages that are not
    installed; FileNotFoundError for a path that is not there.
    """
    _check(options)
    weights = open_weights(options.path)
    against = weights if options.against is None else open_weights(options.against)
    _check_sizes(weights, against)
    length = _length(options, weights.config)
    tokens, source = _tokens(options, weights.config, length)
    tolerance = TOLERANCE[options.dtype] if options.tolerance is None else options.tolerance
    # Elsewhere than on a CPU, products of float32 are made of less unless told otherwise.
    with jax.default_matmul_precision("highest"), _open_reference(options, weights, length) as reference:
        report = _compare(reference, Ours(against, options.dtype), tokens, source, tolerance, options.grads)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report.as_json(), indent=1, allow_nan=False), encoding="utf-8")
    if options.plot is not None:
        plot(report, options.plot)
    return report


def _check(options: ParityOptions) -> None:
    if options.tokens is not None and options.tokens < 2:
        raise ValueError(f"--tokens must be at least 2, one to predict another from; got {options.tokens}.")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}.")
    if options.tolerance is not None and not options.tolerance > 0:
        raise ValueError(f"--tolerance must be positive, got {options.tolerance}.")
    if options.plot is not None:
        require_matplotlib()


_SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "expert_mlp_dim",
          "num_experts")  # fmt: skip


def _check_sizes(weights: Weights, against: Weights) -> None:
    a, b = weights.config, against.config
    sizes = [(name, getattr(a, name), getattr(b, name)) for name in _SIZES]
    lines = [f"{name}: {one} != {other}" for name, one, other in sizes if one != other]
    if not lines and [spec.moe for spec in a.layers] != [spec.moe for spec in b.layers]:
        lines = ["the layers with experts are not the same"]
    if lines:
        raise ValueError(
            f"{weights.path} and {against.path} differ in their sizes and cannot be compared: {'; '.join(lines)}."
        )


def _length(options: ParityOptions, config: ModelConfig) -> int:
    """Of a row in tokens."""
    if options.tokens is not None:
        if options.tokens > config.context_length:
            raise ValueError(
                f"--tokens is {options.tokens}, but the context of {options.path} is {config.context_length} tokens."
            )
        return options.tokens
    return default_length(config)


def default_length(config: ModelConfig) -> int:
    """Tokens of a row that pass two chunks and temperature buckets, if that many can be afforded."""
    wanted = [_LEAST_TOKENS]
    if config.attention_chunk is not None:
        wanted.append(2 * config.attention_chunk + config.attention_chunk // 2)
    if any(spec.query_scale == "temperature" for spec in config.layers):
        wanted.append(2 * config.temperature_floor)
    return min(config.context_length, _MOST_TOKENS, max(wanted))


def _tokens(options: ParityOptions, config: ModelConfig, length: int) -> tuple[Int[np.ndarray, "B T"], str]:
    shape = (options.batch, length)
    if options.text is None:
        random = np.random.default_rng(options.seed).integers(0, config.vocab_size, shape)
        return random, f"random, seed {options.seed}"
    if not options.text.is_file():
        raise FileNotFoundError(f"no such file: {options.text}")
    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.text} is not UTF-8: {error}.") from error
    ids = np.array(load_tokenizer(options.path).encode(text), np.int64)
    if ids.size < shape[0] * shape[1]:
        raise ValueError(
            f"{options.text} has {ids.size} tokens, but {shape[0]} rows of {shape[1]} are {shape[0] * shape[1]}. Give "
            f"a longer text, or a smaller --tokens or --batch."
        )
    if ids.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {options.path} gives the id {ids.max()}, but the model's vocabulary has "
            f"{config.vocab_size} ids: they do not belong together."
        )
    return ids[: shape[0] * shape[1]].reshape(shape), f"the first of {options.text}"


@contextlib.contextmanager
def _open_reference(options: ParityOptions, weights: Weights, length: int) -> Iterator[Side]:
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
        yield Ours(weights, "float32")
        return
    if kind == "meta" and options.grads:
        raise ValueError(
            "--grads has nothing to compare with: Meta's code cuts the gradients of its experts' input. Convert the "
            "directory to Hugging Face's format, or give --reference ours."
        )
    try:
        from llama4_jax.weights.parity import torch_sides

        side = (
            contextlib.nullcontext(torch_sides.Transformers(weights, length))
            if kind == "transformers"
            else torch_sides.meta(weights, options.batch, length)
        )
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(side)
            leave = stack.pop_all()
    except ImportError as error:
        raise ValueError(
            f"--reference {kind} needs a package that is not installed ({error}): pip install 'llama4-jax[convert]', "
            f"or give --reference ours, which needs none."
        ) from error
    with leave:
        yield opened


def _boundaries(config: ModelConfig, length: int) -> Boundaries:
    chunk = config.attention_chunk if any(spec.chunk is not None for spec in config.layers) else None
    floor = config.temperature_floor if any(s.query_scale == "temperature" for s in config.layers) else None
    chunks = [] if chunk is None else list(range(chunk, length, chunk))
    # position p is in bucket (p + 1) // floor
    temperatures = [] if floor is None else list(range(floor - 1, length, floor))
    missed = []
    if chunk is not None and not chunks:
        missed.append(f"the first chunk boundary, at position {chunk}: --tokens {chunk + _DECODED} goes beyond")
    if floor is not None and not temperatures:
        beyond = f"--tokens {floor + _DECODED} goes beyond"
        missed.append(f"the first step of the temperature, at position {floor - 1}: {beyond}")
    return Boundaries(chunks, temperatures, missed)


# ---------------------------------------------------------------------------------------------------------------------
# The walk


def _compare(
    reference: Side, ours: Ours, tokens: Int[np.ndarray, "B T"], source: str, tolerance: float, grads: bool
) -> Report:
    batch, length = tokens.shape
    decoded = min(_DECODED, length - 1)
    theirs, mine = reference.embed(tokens), ours.embed(tokens)
    embedding = _difference(mine, theirs, tolerance)
    divergence = None if embedding.within(tolerance) else Divergence("the embedding", None, None)
    inputs, layers = [], []
    for i in range(reference.config.num_layers):
        inputs += [(theirs, mine)] if grads else []
        layer, divergence, (theirs, mine) = _layer(
            i, reference, ours, theirs, mine, tolerance=tolerance, decoded=decoded, known=divergence
        )
        layers.append(layer)
    their_head, our_head = reference.head(), ours.head()
    head, logits = _logits(their_head, our_head, theirs, mine, tokens, reference.config.vocab_size, tolerance)
    if divergence is None and not head.within(tolerance):
        cause = diagnose_head(our_head.tensors(), their_head.tensors(), head.first_position or 0, tolerance)
        divergence = Divergence("the final norm and output head", None, cause)
    report = Report(
        reference=reference.label,
        candidate=ours.label,
        tokens=source,
        shape=(batch, length),
        tolerance=tolerance,
        carried_tolerance=_CARRIED * tolerance,
        gradient_tolerance=_GRADIENTS * tolerance,
        boundaries=_boundaries(reference.config, length),
        decoded=decoded,
        embedding=embedding,
        layers=layers,
        head=head,
        logits=logits,
        gradients={},
        divergence=divergence,
    )
    if grads:
        _backwards(report, (reference, ours), (their_head, our_head), inputs, (theirs, mine), tokens)
    return report


def _layer(
    i: int,
    reference: Side,
    ours: Ours,
    theirs: Float[np.ndarray, "B T D"],
    mine: Float[np.ndarray, "B T D"],
    *,
    tolerance: float,
    decoded: int,
    known: Divergence | None,
) -> tuple[LayerReport, Divergence | None, tuple[np.ndarray, np.ndarray]]:
    """Layer i of both sides, given what came out of the one before. If it is the first to differ, none being `known`
    before, then why."""
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
        decode=_decode(our_layer, theirs, alone, decoded, tolerance),
    )
    if known is None and not report.alone.within(tolerance):
        cause = diagnose(
            i,
            theirs,
            (ours.config, alone, our_layer.tensors()),
            (reference.config, right, their_layer.tensors()),
            same,
            tolerance,
        )
        known = Divergence(f"layer {i} ({report.kind})", i, cause)
    elif known is None and not report.decode.within(tolerance):
        known = Divergence(f"decoding in layer {i} ({report.kind})", i, None)
    return report, known, (right["layer output"], carried["layer output"])


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
        a = mine[name] if name == "attention output" else np.where(same[..., None], mine[name], theirs[name])
        found.append(_difference(a, theirs[name], tolerance))
    beyond = [d.first_position for d in found if d.first_position is not None]
    # np.max, as NaN must win
    return Difference(
        float(np.max([d.max for d in found])), float(np.max([d.mean for d in found])), min(beyond, default=None)
    )


def _routing(mine: Stages, theirs: Stages, tolerance: float) -> tuple[Bool[np.ndarray, "B T"], float | None, int]:
    """Where both chose the same experts, or others by a tie; the share where they chose the same; how many ties.

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
    return equal | tie, float(equal.mean()), int(tie.sum())


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


def _logits(
    their_head: Head,
    our_head: Head,
    theirs: Float[np.ndarray, "B T D"],
    mine: Float[np.ndarray, "B T D"],
    tokens: Int[np.ndarray, "B T"],
    vocab: int,
    tolerance: float,
) -> tuple[Difference, Logits]:
    """The head alone, and the logits at the end of both ways. A few positions at a time: all may not fit."""
    length = theirs.shape[1]
    block = positions_at_once(len(tokens), vocab)
    scale, same_top, kl, loss = 0.0, 0, [], np.zeros(2)
    errors = {"alone": ([], 0.0), "end": ([], 0.0)}  # the largest at each position; the sum
    for start in range(0, length, block):
        part = slice(start, min(start + block, length))
        right, end = their_head.logits(theirs[:, part]), our_head.logits(mine[:, part])
        for name, logits in (("alone", our_head.logits(theirs[:, part])), ("end", end)):
            error, (largest, total) = np.abs(logits - right), errors[name]
            errors[name] = ([*largest, *error.max(axis=(0, 2)).tolist()], total + float(error.sum(dtype=np.float64)))
        scale = max(scale, float(np.abs(right).max()))
        same_top += int((right.argmax(axis=-1) == end.argmax(axis=-1)).sum())
        log_p, log_q = _log_softmax(right), _log_softmax(end)
        kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean(axis=0).tolist()
        targets = tokens[:, part.start + 1 : part.stop + 1, None]  # the last position has none
        for side, log in enumerate((log_q, log_p)):
            loss[side] -= np.take_along_axis(log[:, : targets.shape[1]], targets, -1).sum()

    def difference(name: str, tolerance: float) -> Difference:
        largest, total = errors[name]
        by_position = np.array(largest) / (scale or 1.0)
        beyond = np.flatnonzero(~(by_position <= tolerance))
        mean = total / (tokens.size * vocab * (scale or 1.0))
        return Difference(float(by_position.max()), mean, int(beyond[0]) if beyond.size else None)

    ours, reference = (loss / (tokens.size - len(tokens))).tolist()
    logits = Logits(
        difference=difference("end", _CARRIED * tolerance),
        scale=scale,
        top1=same_top / tokens.size,
        max_by_position=(np.array(errors["end"][0]) / (scale or 1.0)).tolist(),
        kl_by_position=kl,
        loss=(ours, reference),
    )
    return difference("alone", tolerance), logits


def _log_softmax(logits: Float[np.ndarray, "B T V"]) -> Float[np.ndarray, "B T V"]:
    """In float64: KL is a small difference of large numbers."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _backwards(
    report: Report,
    sides: tuple[SideWithGradients, Ours],
    heads: tuple[Head, Head],
    inputs: list[tuple[np.ndarray, np.ndarray]],
    outputs: tuple[Float[np.ndarray, "B T D"], Float[np.ndarray, "B T D"]],
    tokens: Int[np.ndarray, "B T"],
) -> None:
    """Adds gradients to the report: from the loss back to the embedding. `inputs` are those of each layer, of both
    sides."""
    reference, ours = sides
    targets = tokens[:, 1:]
    theirs, mine = (hidden[:, :-1] for hidden in outputs)  # the last position predicts nothing
    _, their_g, right = heads[0].gradients(theirs, targets)
    _, alone_g, alone = heads[1].gradients(theirs, targets)
    _, our_g, carried = heads[1].gradients(mine, targets)
    report.gradients["head"] = _gradients(alone | {"input": alone_g}, carried, right | {"input": their_g})
    their_g, our_g = (np.pad(g, ((0, 0), (0, 1), (0, 0))) for g in (their_g, our_g))
    for i in reversed(range(len(inputs))):
        their_layer, our_layer = reference.layer(i), ours.layer(i)
        theirs, mine = inputs.pop()
        below, right = their_layer.gradients(theirs, their_g)
        alone_g, alone = our_layer.gradients(theirs, their_g)
        our_g, carried = our_layer.gradients(mine, our_g)
        their_g = below
        report.layers[i].gradients = _gradients(alone | {"input": alone_g}, carried, right | {"input": their_g})
    right = reference.embed_gradients(tokens, their_g)
    alone, carried = ours.embed_gradients(tokens, their_g), ours.embed_gradients(tokens, our_g)
    report.gradients["embedding"] = _gradients(alone, carried, right)
    if report.divergence is None:
        parts = [("the head", report.gradients["head"])]
        parts += [(f"layer {r.layer} ({r.kind})", r.gradients) for r in reversed(report.layers) if r.gradients]
        parts += [("the embedding", report.gradients["embedding"])]
        wrong = [(where, g.worst) for where, g in parts if not g.max <= report.gradient_tolerance]
        if wrong:
            where, worst = wrong[0]
            report.divergence = Divergence(f"the gradient of {worst} in {where}, coming backwards", None, None)


def _gradients(alone: Tensors, carried: Tensors, right: Tensors) -> Gradients:
    def error(mine: np.ndarray, name: str) -> np.ndarray:
        return np.abs(mine - right[name]) / (np.abs(right[name]).max() or 1.0)

    errors = {name: error(alone[name], name) for name in right}
    worst = max(errors, key=lambda name: float(np.nan_to_num(errors[name].max(), nan=np.inf)))
    return Gradients(
        worst=worst,
        max=float(errors[worst].max()),
        mean=float(errors[worst].mean()),
        carried=max(float(error(mine, name).max()) for name, mine in carried.items() if name in right),
    )

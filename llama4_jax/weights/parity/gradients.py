"""The way back: every tensor's gradient, one layer of each side at a time, from the inputs kept on the way forth."""

import numpy as np
from jaxtyping import Bool, Float, Int

from llama4_jax.weights.parity.ours import Ours
from llama4_jax.weights.parity.report import Divergence, Gradients, Report
from llama4_jax.weights.parity.sides import SideWithGradients, Tensors


def backwards(
    report: Report,
    reference: SideWithGradients,
    ours: Ours,
    hidden: list[tuple[np.ndarray, np.ndarray]],
    ties: list[Bool[np.ndarray, "B T"]],
    tokens: Int[np.ndarray, "B T"],
) -> None:
    """Adds the gradients of the mean next-token loss to a report.

    - hidden: what goes into each layer and into the head, [B, T, D], of (the reference, ours). Empty in the end.
    - ties: in each layer, the tokens for which the two chose other experts by a tie
    """
    their_g, our_g, report.gradients["head"] = _head(reference, ours, *hidden.pop(), tokens)
    for layer in reversed(report.layers):
        their_g, our_g, layer.gradients = _layer(
            layer.layer, reference, ours, *hidden.pop(), their_g, our_g, ties[layer.layer]
        )
    right = reference.embed_gradients(tokens, their_g)
    alone, carried = (ours.embed_gradients(tokens, g) for g in (their_g, our_g))
    report.gradients["embedding"] = _compare(alone, carried, right)
    if report.divergence is None:
        report.divergence = _first(report)


def _first(report: Report) -> Divergence | None:
    """The first gradient to differ, coming backwards."""
    parts = [("the head", None, report.gradients["head"])]
    parts += [(f"layer {r.layer} ({r.kind})", r.layer, r.gradients) for r in reversed(report.layers)]
    parts += [("the embedding", None, report.gradients["embedding"])]
    for where, layer, gradients in parts:
        if not gradients.max <= report.gradient_tolerance:
            return Divergence(f"the gradient of {gradients.worst}, in {where}, coming backwards", layer, None)
    return None


# Functions of their own, so that a layer's weights go before the next one's come.


def _head(
    reference: SideWithGradients,
    ours: Ours,
    theirs: Float[np.ndarray, "B T D"],
    mine: Float[np.ndarray, "B T D"],
    tokens: Int[np.ndarray, "B T"],
) -> tuple[Float[np.ndarray, "B T D"], Float[np.ndarray, "B T D"], Gradients]:
    """Both sides' gradients of what goes into the head, and how those of its tensors compare."""
    targets = tokens[:, 1:]
    theirs, mine = theirs[:, :-1], mine[:, :-1]  # the last position predicts nothing
    their_head, our_head = reference.head(), ours.head()
    _, their_g, right = their_head.gradients(theirs, targets)
    _, alone_g, alone = our_head.gradients(theirs, targets)
    _, our_g, carried = our_head.gradients(mine, targets)
    compared = _compare(alone | {_INPUT: alone_g}, carried, right | {_INPUT: their_g})
    their_g, our_g = (np.pad(g, ((0, 0), (0, 1), (0, 0))) for g in (their_g, our_g))
    return their_g, our_g, compared


def _layer(
    i: int,
    reference: SideWithGradients,
    ours: Ours,
    theirs: Float[np.ndarray, "B T D"],
    mine: Float[np.ndarray, "B T D"],
    their_g: Float[np.ndarray, "B T D"],
    our_g: Float[np.ndarray, "B T D"],
    tie: Bool[np.ndarray, "B T"],
) -> tuple[Float[np.ndarray, "B T D"], Float[np.ndarray, "B T D"], Gradients]:
    """The same for layer i, given the gradients of its output."""
    their_layer, our_layer = reference.layer(i), ours.layer(i)
    below, right = their_layer.gradients(theirs, their_g)
    our_g, carried = our_layer.gradients(mine, our_g)
    right_g = below
    if tie.any():  # what such tokens send back goes through other experts
        their_g = np.where(tie[..., None], np.float32(0), their_g)
        right_g, right = their_layer.gradients(theirs, their_g)
    alone_g, alone = our_layer.gradients(theirs, their_g)
    return below, our_g, _compare(alone | {_INPUT: alone_g}, carried, right | {_INPUT: right_g})


_INPUT = "its input"  # the gradient that goes on to the layer before


def _compare(alone: Tensors, carried: Tensors, right: Tensors) -> Gradients:
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

"""Which linear layer multiplies how: `precision.matmul` and its rules, applied to a model that is built.

This is the only place that knows. Layers have the name of a matmul, and hand it on to the product.
"""

import re
from collections.abc import Iterator

from flax import nnx

from llama4_jax.model.config import Precision
from llama4_jax.model.moe import MoE
from llama4_jax.model.stack import Stack


def choose_matmuls(model: nnx.Module, precision: Precision) -> None:
    """Sets the matmul of every linear layer, and of every layer's routed experts, by its name: layers.3.attention.q,
    layers.3.mlp.gate_up, layers.3.moe.experts, vision.layers.0.mlp.fc1, projector …

    Raises ValueError for a rule that decides for no layer, and for rules that tell apart layers that are scanned
    together.
    """
    used, every = set(), []
    for module, names in _layers(model):
        chosen = {name: precision.matmul_of(name) for name in names}
        if len(set(chosen.values())) > 1:
            differing = ", ".join(f"{name}: {matmul}" for name, matmul in chosen.items())
            raise ValueError(
                f"precision.rules tell apart layers that are scanned together ({differing}): set scan_layers to False, "
                f"or write rules that treat them alike."
            )
        module.matmul = chosen[names[0]]
        used |= {precision.rule_for(name) for name in names}
        every += names
    for rule in precision.rules:
        if rule not in used:
            known = ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in every))
            raise ValueError(f"precision.rules: {rule!r} decides for no layer. The layers are {known}.")


def _layers(model: nnx.Module) -> Iterator[tuple[nnx.Module, list[str]]]:
    """Everything that has a matmul, and its names: one for each repetition, if it is scanned."""
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "matmul"):
            last = ["experts"] if isinstance(module, MoE) else []
            yield module, [".".join(map(str, [*name, *last])) for name in _names(model, path)]


def _names(model: nnx.Module, path: tuple) -> list[list]:
    match path:
        case [stack, "group" | "rest" as kind, place, *rest] if isinstance(owner := getattr(model, stack), Stack):
            before = ["layers"] if stack == "decoder" else [stack, "layers"]
            scanned = owner.repeats * len(owner.group)
            places = range(place, scanned, len(owner.group)) if kind == "group" else [scanned + place]
            return [[*before, i, *rest] for i in places]
    return [list(path)]

"""One vocabulary of names for a model's layers and parameters, the same whether layers are scanned or not.

    layers.3.attention.q      layers.3.moe.experts      vision.layers.0.mlp.fc1      projector      lm_head

are linear layers (a layer's routed experts count as one); layers.3.attention.q.kernel is a parameter. Precision rules
and LoRA's targets are patterns of the former; `weights.table` and `llama4 inspect` list the latter.
"""

import difflib
import re
from collections.abc import Iterable, Iterator

from flax import nnx

from llama4_jax.model.stack import Stack


def names_of(model: nnx.Module, path: tuple) -> list[str]:
    """The names of what is at this path of attributes: one, or of a scanned layer one for each repetition, in order."""
    match path:
        case [stack, "group" | "rest" as kind, place, *rest] if isinstance(owner := getattr(model, stack), Stack):
            before = ["layers"] if stack == "decoder" else [stack, "layers"]
            scanned = owner.repeats * len(owner.group)
            places = range(place, scanned, len(owner.group)) if kind == "group" else [scanned + place]
            return [".".join(map(str, [*before, i, *rest])) for i in places]
    return [".".join(map(str, path))]


def linear_layers(model: nnx.Module) -> Iterator[tuple[nnx.Module, list[str]]]:
    """Every linear layer, and every MoE for its routed experts, with its names."""
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "matmul"):
            last = ("experts",) if hasattr(module, "router") else ()
            yield module, names_of(model, (*path, *last))


def kinds(names: Iterable[str]) -> list[str]:
    """The names with * for the number of a layer, each once."""
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def nearest(pattern: str, names: Iterable[str]) -> str:
    """What to say after a pattern that chooses nothing: the kinds of names that are like it, or all."""
    known = kinds(names)
    wanted = re.sub(r"\b\d+\b", "*", pattern)
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else f"The layers are {', '.join(known)}."

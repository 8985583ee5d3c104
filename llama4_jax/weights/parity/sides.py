"""What the sides of a comparison have in common: one layer at a time in and out of memory, numpy in and out.

A layer is run on given hidden states and returns its `Stages`: what passed at fixed points inside it. Each side takes
these from the code it really runs, by watching its functions and modules, not from a copy of that code.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from llama4_jax.model.config import ModelConfig

# Points inside a layer, in the order in which they are computed. All are [B, T, width] in float32, heads side by side,
# but the chosen experts: int [B, T, top_k], ascending. A side leaves out what its layer does not have.
CHOSEN = "chosen experts"
STAGES = (
    "attention norm",
    "q projection",
    "k projection",
    "v projection",
    "q after RoPE",
    "k after RoPE",
    "q after qk-norm and temperature",
    "k after qk-norm",
    "attention output",
    "feed-forward norm",
    "router logits",
    CHOSEN,
    "feed-forward output",
    "layer output",
)
Stages = dict[str, np.ndarray]
Tensors = dict[str, np.ndarray]  # by the names of `weights.table`


@runtime_checkable
class Layer(Protocol):
    def run(self, x: Float[np.ndarray, "B T D"]) -> Stages: ...

    def tensors(self) -> Tensors:
        """The layer's parameters."""
        ...


@runtime_checkable
class Head(Protocol):
    """The final norm and the output head."""

    def logits(self, x: Float[np.ndarray, "B T D"]) -> Float[np.ndarray, "B T V"]: ...

    def tensors(self) -> Tensors:
        """Its parameters."""
        ...

    def gradients(
        self, x: Float[np.ndarray, "B T D"], targets: Int[np.ndarray, "B T"]
    ) -> tuple[float, Float[np.ndarray, "B T D"], Tensors]:
        """The mean cross entropy in nats, and its gradients with respect to x and to each parameter."""
        ...


@runtime_checkable
class Side(Protocol):
    """One implementation with its weights. Everything in and out is float32.

    - label: what it is, for the report
    - config: what its configuration file says, in our words
    """

    label: str
    config: ModelConfig

    def embed(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T D"]: ...

    def layer(self, i: int) -> Layer:
        """Layer i with its weights, which are in memory for as long as it is."""
        ...

    def head(self) -> Head: ...


@runtime_checkable
class LayerWithGradients(Layer, Protocol):
    def gradients(
        self, x: Float[np.ndarray, "B T D"], g: Float[np.ndarray, "B T D"]
    ) -> tuple[Float[np.ndarray, "B T D"], Tensors]:
        """Of sum(g · output): with respect to x, and to each parameter."""
        ...


@runtime_checkable
class SideWithGradients(Side, Protocol):
    def embed_gradients(self, tokens: Int[np.ndarray, "B T"], g: Float[np.ndarray, "B T D"]) -> Tensors:
        """Of sum(g · embed(tokens)), with respect to the table."""
        ...

    def layer(self, i: int) -> LayerWithGradients: ...


@contextlib.contextmanager
def watching(owner: Any, name: str, see: Callable[[tuple, Any], None]) -> Iterator[None]:
    """While open, each call of the function `owner.name` is followed by see(its positional arguments, its result)."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args, **kwargs):
        result = original(*args, **kwargs)
        see(args, result)
        return result

    setattr(owner, name, watched)
    try:
        yield
    finally:
        setattr(owner, name, original)


def positions_at_once(batch: int, vocab: int) -> int:
    """For how many positions the logits fit in a quarter of a GiB."""
    return max(1, 2**26 // (batch * vocab))

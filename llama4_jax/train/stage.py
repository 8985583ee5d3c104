"""A stage of training: what it reads and what it minimises. Pretraining, fine-tuning and distillation differ in this
one value; the step and the loop are the same."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from llama4_jax.data.batch import Batch
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.moe import RouterStats


class LossOutput(NamedTuple):
    """Sums, so that micro-batches add up to the large batch: its loss is Σ total / Σ weight."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    router: RouterStats | None


# (model, batch, frozen) → sums
Loss = Callable[[Llama4, Batch, Any], LossOutput]


class Stage(NamedTuple):
    batches: Iterator[Batch]
    loss: Loss
    # What the loss reads but training does not change: a reference model, a teacher. An argument of the compiled step,
    # never a constant in it.
    frozen: Any = None

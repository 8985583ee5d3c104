"""Pretraining's loss: the negative log likelihood of each next token, in nats."""

from llama4_jax.data.batch import Batch
from llama4_jax.model.llama4 import Llama4
from llama4_jax.ops.cross_entropy import linear_cross_entropy
from llama4_jax.train.stage import LossOutput


def next_token(model: Llama4, batch: Batch, frozen: None = None) -> LossOutput:
    hidden, router = model.hidden(
        batch.tokens, images=batch.images, positions=batch.positions, segment_ids=batch.segment_ids
    )
    how = {"head_learns": model.head_learns}
    total, weight = linear_cross_entropy(hidden, model.head(), batch.targets, batch.weights, **how)
    return LossOutput(total, weight, router)

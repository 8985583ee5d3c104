"""A user's function that changes logits before a token is chosen from them, and what it is shown."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.infer.rows import NOTHING

LogitsProcessor = Callable[[Float[Array, "B V"], Int[Array, "B S"], Int[Array, " B"]], Float[Array, "B V"]]


class Past(NamedTuple):
    """The tokens of each row so far."""

    tokens: Int[Array, "B S"]  # -1 after the last
    lengths: Int[Array, " B"]

    def extended(self, token: Int[Array, " B"], real: Bool[Array, " B"]) -> "Past":
        """By one more token in the rows where it is real."""
        at = jnp.arange(self.tokens.shape[1]) == jnp.asarray(self.lengths)[:, None]
        tokens = jnp.where(at & real[:, None], token[:, None], self.tokens)
        return Past(tokens, self.lengths + real.astype(jnp.int32))


def empty_past(rows: int, slots: int) -> Past:
    return Past(np.full((rows, slots), NOTHING, np.int32), np.zeros((rows,), np.int32))


def processed(logits: Float[Array, "B V"], past: Past | None, processor: LogitsProcessor | None) -> Float[Array, "B V"]:
    """What the function makes of the logits; the same ones without a function. Raises ValueError, when it is traced,
    for one that returns something else."""
    if processor is None:
        return logits
    changed = processor(logits, *past)
    shape, dtype = getattr(changed, "shape", None), getattr(changed, "dtype", None)
    if shape != logits.shape or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"logits_processor must return floats of the shape {list(logits.shape)}, [B, V], as it got; it returned "
            f"{type(changed).__name__ if shape is None else f'{dtype} {list(shape)}'}."
        )
    return changed.astype(logits.dtype)

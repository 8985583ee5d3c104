"""How well a model predicts a text: negative log-likelihood, token by token."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llama4_jax.model.llama4 import Llama4
from llama4_jax.ops.cross_entropy import token_nll

_LEAST = 64  # lengths are rounded up to powers of two, so that texts of many lengths compile a few times only


def score(model: Llama4, tokens: Sequence[int] | Int[np.ndarray, " all"]) -> Float[np.ndarray, " n"]:
    """Negative log-likelihood in nats, float32, of every token but the first, given those before it.

    Longer than the model's context_length, the tokens are taken as consecutive documents of that length: each starts
    with no past but its first token. Works on a mesh, as `generate` does.

    Raises ValueError for fewer than two tokens, and for a token id outside the vocabulary.
    """
    tokens = np.asarray(tokens, np.int64)
    if len(tokens) < 2:
        raise ValueError(
            f"scoring needs at least two tokens, the first being the past of the second; got {len(tokens)}."
        )
    vocab = model.config.vocab_size
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocab))
    if len(outside):
        i = outside[0]
        raise ValueError(
            f"tokens[{i}] is the token id {tokens[i]}, but the model's vocabulary has {vocab} ids, 0 to {vocab - 1}. "
            f"Is the tokenizer this model's own?"
        )
    graphdef, state = nnx.split(model)
    return np.concatenate(
        [
            _score_document(graphdef, state, tokens[start : start + model.config.context_length + 1])
            for start in range(0, len(tokens) - 1, model.config.context_length)
        ]
    )


def _score_document(graphdef, state, tokens: Int[np.ndarray, " all"]) -> Float[np.ndarray, " n"]:
    count = len(tokens) - 1
    padded = np.zeros((max(_LEAST, 1 << (count - 1).bit_length()) + 1,), np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_nll(graphdef, state, padded[None, :-1], padded[None, 1:], count))[0, :count]


@functools.partial(jax.jit, static_argnames="graphdef")
def _nll(
    graphdef, state, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], count: Int[Array, ""]
) -> Float[Array, "B T"]:
    model = nnx.merge(graphdef, state)
    is_text = jnp.arange(tokens.shape[1]) < count
    hidden, _ = model.hidden(tokens, segment_ids=jnp.broadcast_to(is_text, tokens.shape).astype(jnp.int32))
    return token_nll(hidden, model.head(), targets)


class Span(NamedTuple):
    """Mean over the tokens predicted from `first` to `last` tokens of past, both included."""

    first: int
    last: int
    tokens: int
    nats: float


def by_position(nll: Float[np.ndarray, " n"], context_length: int) -> list[Span]:
    """The mean by length of the past, in spans that double: 1, 2-3, 4-7, …"""
    past = np.arange(len(nll)) % context_length + 1
    spans = []
    for power in range(int(past.max()).bit_length()):
        first, last = 1 << power, (2 << power) - 1
        inside = nll[(past >= first) & (past <= last)]
        spans.append(Span(first, min(last, int(past.max())), len(inside), float(inside.mean())))
    return spans


def bits_per_byte(nll: Float[np.ndarray, " n"], num_bytes: int) -> float:
    """What a text of that many bytes costs in this model, in bits, for each byte."""
    return float(nll.sum(dtype=np.float64)) / math.log(2) / num_bytes

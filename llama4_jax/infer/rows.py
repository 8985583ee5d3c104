"""The rows of a batch that decodes, each with settings of its own, and how their next tokens are chosen.

Settings are arrays, so that other values compile nothing. What no row wants costs nothing: it is behind a `lax.cond`.
And what a row gets depends on its own settings alone: where another row wants a filter, this one's logits pass through
it unchanged, bit for bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llama4_jax.infer.sampling import draw, fewest

STOPS = 8  # ids that end a reply, at most
BIASES = 300  # tokens whose logits are moved, at most: as many as OpenAI's API takes
TOPS = 20  # the likeliest tokens that can be asked for
NOTHING = -1  # in place of a token


class Row(NamedTuple):
    """Settings and state of each row; without the leading axis, those of one."""

    key: Key[Array, "*B"]  # the row's random numbers, whatever the other rows are
    temperature: Float[Array, "*B"]  # 0: the most likely token
    top_k: Int[Array, "*B"]  # the size of the vocabulary: every token
    top_p: Float[Array, "*B"]  # 1: every token
    frequency: Float[Array, "*B"]  # taken off a logit for each time that the reply has the token
    presence: Float[Array, "*B"]  # taken off if the reply has it at all
    bias_ids: Int[Array, "*B biases"]  # NOTHING where there is none
    bias: Float[Array, "*B biases"]
    stops: Int[Array, "*B stops"]  # ids that end the reply
    left: Int[Array, "*B"]  # tokens that may still be drawn
    wants_top: Bool[Array, "*B"]  # the likeliest tokens are asked for

    drawn: Int[Array, "*B"]  # tokens of the reply so far
    token: Int[Array, "*B"]  # the newest of them, which is not in the cache yet
    active: Bool[Array, "*B"]  # it is to go on
    counts: Int[Array, "*B V"]  # how often the reply has each token


class Choice(NamedTuple):
    """The next token of each row, with the model's own opinion: log-probabilities at temperature 1, before anything
    else is done to the logits."""

    token: Int[Array, "*B"]
    logprob: Float[Array, "*B"]
    top: Int[Array, "*B tops"]  # the likeliest tokens; NOTHING where no row asked
    top_logprobs: Float[Array, "*B tops"]


class Settings(NamedTuple):
    """What a request wants of its row, as numbers and arrays of numpy, so that each has one type."""

    seed: np.uint32
    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    frequency: np.float32
    presence: np.float32
    bias_ids: Int[np.ndarray, " biases"]
    bias: Float[np.ndarray, " biases"]
    stops: Int[np.ndarray, " stops"]
    left: np.int32
    wants_top: np.bool_

    def row(self, vocab_size: int) -> "Row":
        """Before its first token. The random numbers of a seed are those of `generate`'s first row."""
        key = jax.random.fold_in(jax.random.key(self.seed), 0)
        nothing = {"drawn": jnp.int32(0), "token": jnp.int32(0), "active": jnp.bool_(False)}
        return Row(key, *map(jnp.asarray, self[1:]), **nothing, counts=jnp.zeros((vocab_size,), jnp.int16))


def empty_rows(rows: int, vocab_size: int) -> Row:
    """Rows that are not active."""

    def full(value, *shape, dtype=jnp.float32):
        return jnp.full((rows, *shape), value, dtype)

    whole = jnp.int32
    return Row(
        key=jax.vmap(jax.random.key)(jnp.zeros(rows, jnp.uint32)),
        temperature=full(0), top_k=full(vocab_size, dtype=whole), top_p=full(1), frequency=full(0), presence=full(0),
        bias_ids=full(NOTHING, BIASES, dtype=whole), bias=full(0, BIASES), stops=full(NOTHING, STOPS, dtype=whole),
        left=full(0, dtype=whole), wants_top=full(False, dtype=bool), drawn=full(0, dtype=whole),
        token=full(0, dtype=whole), active=full(False, dtype=bool), counts=full(0, vocab_size, dtype=jnp.int16),
    )  # fmt: skip


def choose(logits: Float[Array, "B V"], rows: Row, mask: UInt32[Array, "B words"] | None = None) -> Choice:
    """The next token of each row.

    - mask: bit i % 32 of word i // 32: token i may be chosen. One at least must be, or any token is
    """
    logits = logits.astype(jnp.float32)
    opinion = logits
    size = logits.shape[-1]
    penalized = jnp.any((rows.frequency != 0) | (rows.presence != 0))
    logits = lax.cond(penalized, _penalized, lambda logits, rows: logits, logits, rows)
    logits = lax.cond(jnp.any(rows.bias_ids != NOTHING), _biased, lambda logits, rows: logits, logits, rows)
    if mask is not None:
        bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        logits = jnp.where(bits.reshape(bits.shape[0], -1)[:, :size] == 1, logits, -jnp.inf)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = lax.cond(jnp.any(rows.temperature > 0), _drawn, lambda logits, rows: likeliest, logits, rows)
    token = jnp.where(rows.temperature > 0, drawn, likeliest)
    return scored(opinion, token, jnp.any(rows.wants_top))


def scored(logits: Float[Array, "B V"], token: Int[Array, " B"], wants_top: Bool[Array, ""]) -> Choice:
    """What the model thinks of these tokens."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    def top(logits):
        values, ids = lax.top_k(logits, min(TOPS, logits.shape[-1]))
        pad = ((0, 0), (0, TOPS - ids.shape[1]))
        return jnp.pad(ids, pad, constant_values=NOTHING), jnp.pad(values - total, pad)

    def none(logits):
        shape = (logits.shape[0], TOPS)
        return jnp.full(shape, NOTHING, jnp.int32), jnp.zeros(shape, jnp.float32)

    own = jnp.take_along_axis(logits, token[:, None], axis=-1) - total
    return Choice(token, own[:, 0], *lax.cond(wants_top, top, none, logits))


def _penalized(logits: Float[Array, "B V"], rows: Row) -> Float[Array, "B V"]:
    times = rows.counts.astype(jnp.float32)
    off = rows.frequency[:, None] * times + rows.presence[:, None] * (times > 0)
    wants = (rows.frequency != 0) | (rows.presence != 0)
    return jnp.where(wants[:, None], logits - off, logits)


def _biased(logits: Float[Array, "B V"], rows: Row) -> Float[Array, "B V"]:
    def one(logits, ids, bias):
        return logits.at[jnp.where(ids == NOTHING, logits.shape[0], ids)].add(bias, mode="drop")

    return jax.vmap(one)(logits, rows.bias_ids, rows.bias)


def _drawn(logits: Float[Array, "B V"], rows: Row) -> Int[Array, " B"]:
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    size = logits.shape[-1]

    def best(scaled):
        kept = fewest(scaled, jnp.ones_like(scaled), rows.top_k[:, None])
        return jnp.where(kept | (rows.top_k >= size)[:, None], scaled, -jnp.inf)

    def nucleus(scaled):
        kept = fewest(scaled, jax.nn.softmax(scaled, axis=-1), rows.top_p[:, None])
        return jnp.where(kept | (rows.top_p >= 1)[:, None], scaled, -jnp.inf)

    scaled = lax.cond(jnp.any(rows.top_k < size), best, lambda scaled: scaled, scaled)
    scaled = lax.cond(jnp.any(rows.top_p < 1), nucleus, lambda scaled: scaled, scaled)
    keys = jax.vmap(jax.random.fold_in)(rows.key, rows.drawn)
    return draw(jax.nn.softmax(scaled, axis=-1), 1 - jax.vmap(jax.random.uniform)(keys))


def advanced(rows: Row, choice: Choice, where: Bool[Array, " B"]) -> Row:
    """The rows with their new tokens, where there is one."""
    count = jax.vmap(lambda counts, token: counts.at[token].add(1))(rows.counts, choice.token)
    left = rows.left - 1
    goes_on = (left > 0) & ~jnp.any(choice.token[:, None] == rows.stops, axis=-1)
    return rows._replace(
        token=jnp.where(where, choice.token, rows.token),
        drawn=jnp.where(where, rows.drawn + 1, rows.drawn),
        left=jnp.where(where, left, rows.left),
        active=jnp.where(where, goes_on, rows.active),
        counts=jnp.where(where[:, None], count, rows.counts),
    )

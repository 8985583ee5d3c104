"""The rows of a batch that decodes, each with settings of its own, and how their next tokens are chosen.

Settings are arrays, so that other values compile nothing. What no row wants costs nothing: it is behind a `lax.cond`.
And what a row gets depends on its own settings alone: where another row wants a filter, this one's logits pass through
it unchanged, bit for bit.

Penalties, biases and log-probabilities take memory and time even so. Where nobody can ask for them, as in `generate`,
rows are plain: those fields are None, and nothing of it is compiled.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from llama4_jax.infer.sampling import LEAST_TEMPERATURE, draw, fewest

STOPS = 8  # ids that end a reply, at most
BIASES = 300  # tokens whose logits are moved, at most: as many as OpenAI's API takes
TOPS = 20  # the likeliest tokens that can be asked for
NOTHING = -1  # in place of a token


class Row(NamedTuple):
    """Settings and state of each row; without the leading axis, those of one. None: in plain rows."""

    key: Key[Array, "*B"]  # the row's random numbers, whatever the other rows are
    temperature: Float[Array, "*B"]  # 0: the most likely token
    top_k: Int[Array, "*B"]  # the size of the vocabulary: every token
    top_p: Float[Array, "*B"]  # 1: every token
    frequency: Float[Array, "*B"] | None  # taken off a logit for each time that the reply has the token
    presence: Float[Array, "*B"] | None  # taken off if the reply has it at all
    bias_ids: Int[Array, "*B biases"] | None  # NOTHING where there is none
    bias: Float[Array, "*B biases"] | None
    stops: Int[Array, "*B stops"]  # ids that end the reply
    left: Int[Array, "*B"]  # tokens that may still be drawn
    wants_top: Bool[Array, "*B"] | None  # the likeliest tokens are asked for

    drawn: Int[Array, "*B"]  # tokens of the reply so far
    token: Int[Array, "*B"]  # the newest of them, which is not in the cache yet
    active: Bool[Array, "*B"]  # it is to go on
    counts: Int[Array, "*B V"] | None  # how often the reply has each token


class Choice(NamedTuple):
    """The next token of each row, with the model's own opinion: log-probabilities at temperature 1, before anything
    else is done to the logits. Plain rows have none."""

    token: Int[Array, "*B"]
    logprob: Float[Array, "*B"] | None = None
    top: Int[Array, "*B tops"] | None = None  # the likeliest tokens; NOTHING where no row asked
    top_logprobs: Float[Array, "*B tops"] | None = None


class Settings(NamedTuple):
    """What a request wants of its row, as numbers and arrays of numpy, so that each has one type; with a leading axis,
    what several want."""

    seed: np.uint32
    stream: np.uint32  # of random numbers, of those that the seed has
    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    frequency: np.float32 | None
    presence: np.float32 | None
    bias_ids: Int[np.ndarray, "*B biases"] | None
    bias: Float[np.ndarray, "*B biases"] | None
    stops: Int[np.ndarray, "*B stops"]
    left: np.int32
    wants_top: np.bool_ | None

    def row(self, vocab_size: int) -> "Row":
        """One row before its first token."""
        key = jax.random.fold_in(jax.random.key(self.seed), self.stream)
        counts = None if self.frequency is None else jnp.zeros((vocab_size,), jnp.int16)
        nothing = {"drawn": jnp.int32(0), "token": jnp.int32(0), "active": jnp.bool_(False)}
        return Row(key, *(None if x is None else jnp.asarray(x) for x in self[2:]), **nothing, counts=counts)


def settings_of(
    vocab_size: int,
    *,
    seed: int = 0,
    stream: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    stop_ids: Sequence[int] = (),
    most_stops: int = STOPS,
    max_new_tokens: int = 1,
    wants_top: bool = False,
    plain: bool = False,
) -> Settings:
    """Settings from checked arguments. A temperature below `LEAST_TEMPERATURE` takes the most likely token; a top_p too
    small for a float32 leaves that one, too."""
    ids, bias = np.full((BIASES,), NOTHING, np.int32), np.zeros((BIASES,), np.float32)
    for i, (token, value) in enumerate((logit_bias or {}).items()):
        ids[i], bias[i] = token, value
    stops = np.full((most_stops,), NOTHING, np.int32)
    stops[: len(stop_ids)] = stop_ids
    temperature = float(temperature)
    return Settings(
        seed=np.uint32(seed),
        stream=np.uint32(stream),
        temperature=np.float32(0 if temperature < LEAST_TEMPERATURE else temperature),
        top_k=np.int32(vocab_size if top_k is None else min(int(top_k), vocab_size)),
        top_p=np.float32(max(float(top_p), float(np.finfo(np.float32).tiny))),
        frequency=None if plain else np.float32(frequency_penalty),
        presence=None if plain else np.float32(presence_penalty),
        bias_ids=None if plain else ids,
        bias=None if plain else bias,
        stops=stops,
        left=np.int32(max(1, max_new_tokens)),
        wants_top=None if plain else np.bool_(wants_top),
    )


def stacked(each: Sequence[Settings]) -> Settings:
    """Those of several requests, alike in what they leave out."""
    return Settings(*(None if values[0] is None else np.stack(values) for values in zip(*each, strict=True)))


def rows_of(settings: Settings, vocab_size: int) -> Row:
    """The rows of several requests before their first tokens."""
    return jax.vmap(lambda one: Settings(*one).row(vocab_size))(settings)


def choose(logits: Float[Array, "B V"], rows: Row, mask: UInt32[Array, "B words"] | None = None) -> Choice:
    """The next token of each row.

    - mask: bit i % 32 of word i // 32: token i may be chosen. One at least must be, or any token is
    """
    logits = logits.astype(jnp.float32)
    opinion = logits
    size = logits.shape[-1]
    if rows.frequency is not None:
        penalized = jnp.any((rows.frequency != 0) | (rows.presence != 0))
        logits = lax.cond(penalized, _penalized, lambda logits, rows: logits, logits, rows)
        logits = lax.cond(jnp.any(rows.bias_ids != NOTHING), _biased, lambda logits, rows: logits, logits, rows)
    if mask is not None:
        bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        logits = jnp.where(bits.reshape(bits.shape[0], -1)[:, :size] == 1, logits, -jnp.inf)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = lax.cond(jnp.any(rows.temperature > 0), _drawn, lambda logits, rows: likeliest, logits, rows)
    token = jnp.where(rows.temperature > 0, drawn, likeliest)
    return Choice(token) if rows.wants_top is None else scored(opinion, token, jnp.any(rows.wants_top))


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


def filtered(logits: Float[Array, "B V"], rows: Row) -> Float[Array, "B V"]:
    """The logits of the distribution that is drawn from: divided by the temperature, -inf where a filter applies."""
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    size = logits.shape[-1]

    def best(scaled):
        kept = fewest(scaled, jnp.ones_like(scaled), rows.top_k[:, None])
        return jnp.where(kept | (rows.top_k >= size)[:, None], scaled, -jnp.inf)

    def nucleus(scaled):
        kept = fewest(scaled, jax.nn.softmax(scaled, axis=-1), rows.top_p[:, None])
        return jnp.where(kept | (rows.top_p >= 1)[:, None], scaled, -jnp.inf)

    scaled = lax.cond(jnp.any(rows.top_k < size), best, lambda scaled: scaled, scaled)
    return lax.cond(jnp.any(rows.top_p < 1), nucleus, lambda scaled: scaled, scaled)


def _drawn(logits: Float[Array, "B V"], rows: Row) -> Int[Array, " B"]:
    keys = jax.vmap(jax.random.fold_in)(rows.key, rows.drawn)
    return draw(jax.nn.softmax(filtered(logits, rows), axis=-1), 1 - jax.vmap(jax.random.uniform)(keys))


def advanced(rows: Row, choice: Choice, where: Bool[Array, " B"]) -> Row:
    """The rows with their new tokens, where there is one."""
    counts = rows.counts
    if counts is not None:
        count = jax.vmap(lambda counts, token: counts.at[token].add(1))(counts, choice.token)
        counts = jnp.where(where[:, None], count, counts)
    left = rows.left - 1
    goes_on = (left > 0) & ~jnp.any(choice.token[:, None] == rows.stops, axis=-1)
    return rows._replace(
        token=jnp.where(where, choice.token, rows.token),
        drawn=jnp.where(where, rows.drawn + 1, rows.drawn),
        left=jnp.where(where, left, rows.left),
        active=jnp.where(where, goes_on, rows.active),
        counts=counts,
    )

"""What the engine runs on the devices: a few compiled programs, with the cache and the rows donated.

- `read` reads a piece of a prompt, of one slot of the cache or of all of them, and draws the first token of a reply
- `decode` runs all rows for some tokens in one loop on the device, since starting a computation costs as much as a
  small model's step
- `encode` turns pictures into features, `copy` what one slot holds into another; `take` and `put` are for `snapshots`

Everything that distinguishes requests is an array, so that other prompts, lengths, seeds or settings compile nothing.
Padding is written to no cache and routed to no expert, so that each row gets what it would get alone.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from llama4_jax.infer.logits_processor import LogitsProcessor, Past, processed
from llama4_jax.infer.rows import NOTHING, TOPS, Choice, Row, Settings, advanced, choose, rows_of, scored
from llama4_jax.model.cache import Cache
from llama4_jax.model.llama4 import Images
from llama4_jax.sharding import SERVING, constrain, use_rules

TOKENS_PER_CALL = 32  # of `decode`, at most


class Pieces(NamedTuple):
    """Where pieces of prompts go: R of them, one of a slot or one of each slot, empty ones among them."""

    slot: Int[Array, ""] | None  # None: R is the number of slots
    start: Int[Array, " R"]  # tokens that are before it
    count: Int[Array, " R"]  # tokens that it has, the rest is padding
    last: Bool[Array, " R"]  # a reply follows


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "context", "dtype"))
@use_rules(SERVING)
def empty_cache(graphdef, state, slots: int, context: int, dtype: str | None) -> Cache:
    return nnx.merge(graphdef, state).empty_cache(slots, context, dtype)


@functools.partial(jax.jit, static_argnames="vocab_size")
@use_rules(SERVING)
def idle_rows(settings: Settings, vocab_size: int) -> Row:
    """Rows that are not active."""
    return _everywhere(rows_of(settings, vocab_size))


@functools.partial(jax.jit, static_argnames="graphdef")
@use_rules(SERVING)
def encode(graphdef, state, tiles: Images) -> Float[Array, "1 patches D"]:
    return constrain(nnx.merge(graphdef, state).encode_images(tiles), None, None, None)


@functools.partial(jax.jit, donate_argnames="cache")
@use_rules(SERVING)
def copy(cache: Cache, source: Int[Array, ""], slot: Int[Array, ""]) -> Cache:
    """What one slot holds into another."""
    return cache._replace(layers=_with_slot(cache.layers, slot, _of_slot(cache.layers, source)))


@functools.partial(jax.jit, static_argnames=("chunked", "size"))
@use_rules(SERVING)
def take(cache: Cache, slot: Int[Array, ""], start: Int[Array, ""], *, chunked: tuple[bool, ...], size: int):
    """What a slot holds: of the layers that are not chunked `size` tokens from `start` on; with size 0, of those that
    are chunked all."""

    def part(layer, is_chunked):
        if is_chunked != (size == 0):
            return None
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size or x.shape[2], axis=2), layer)

    return _everywhere(tuple(map(part, _of_slot(cache.layers, slot), chunked)))


@functools.partial(jax.jit, donate_argnames="cache")
@use_rules(SERVING)
def put(cache: Cache, slot: Int[Array, ""], start: Int[Array, ""], parts) -> Cache:
    """What `take` took into a slot."""

    def written(layer, part):
        if part is None:
            return layer
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice(x, y, (slot, 0, start, 0)[: x.ndim]), layer, part)

    return cache._replace(layers=tuple(map(written, cache.layers, parts)))


@functools.partial(jax.jit, static_argnames=("graphdef", "processor"), donate_argnames=("cache", "rows"))
@use_rules(SERVING)
def read(
    graphdef,
    state,
    cache: Cache,
    rows: Row,
    past: Past | None,
    tokens: Int[Array, "R P"],
    features: Float[Array, "R P D"] | None,
    pieces: Pieces,
    settings: Settings,
    mask: UInt32[Array, "R words"] | None,
    targets: Int[Array, " P"] | None,
    prompts: Int[Array, "R S"] | None,
    processor: LogitsProcessor | None = None,
) -> tuple[Cache, Row, Past | None, Choice, Choice | None]:
    """Reads pieces of prompts; after the last of one, draws the first token of the reply, and the row is active.

    - targets: what follows each token of the piece of one slot. Their scores are the last result; None: not asked for
    - past, prompts: for a `processor`, with the pieces of all slots
    """
    model = nnx.merge(graphdef, state)
    slot, alone = pieces.slot, pieces.slot is not None
    layers = _of_slot(cache.layers, slot) if alone else cache.layers
    if alone:
        layers = _emptied(layers, pieces.start[0], [spec.chunk for spec in model.config.layers])
    lengths = pieces.start if alone else jnp.where(pieces.count > 0, pieces.start, cache.lengths)
    hidden, after = model.step(tokens, Cache(layers, lengths), pieces.count, features)
    is_read = jnp.arange(len(cache.lengths)) == slot if alone else pieces.count > 0
    cache = Cache(
        _with_slot(cache.layers, slot, after.layers) if alone else after.layers,
        jnp.where(is_read, after.lengths, cache.lengths),
    )
    last = jnp.take_along_axis(hidden, jnp.maximum(pieces.count - 1, 0)[:, None, None], axis=1)
    begins = is_read & pieces.last
    logits = model.logits(last)[:, 0]
    if processor is not None:
        whole = pieces.start + pieces.count
        past = Past(jnp.where(begins[:, None], prompts, past.tokens), jnp.where(begins, whole, past.lengths))
        logits = processed(logits, past, processor)
    fresh = rows_of(settings, model.config.vocab_size)
    choice = choose(logits, fresh, mask)
    begun = advanced(fresh, choice, jnp.ones((len(tokens),), bool))

    def put(old, new):
        return jnp.where(begins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    rows = jax.tree.map(put, rows, begun)
    past = None if past is None else past.extended(choice.token, begins)
    scores = None
    if targets is not None:
        scores = scored(model.logits(hidden)[0].astype(jnp.float32), targets, settings.wants_top[0])
    return cache, rows, past, _everywhere(jax.tree.map(lambda x: x[:, None], choice)), _everywhere(scores)


@functools.partial(jax.jit, static_argnames=("graphdef", "processor"), donate_argnames=("cache", "rows", "past"))
@use_rules(SERVING)
def decode(
    graphdef,
    state,
    cache: Cache,
    rows: Row,
    past: Past | None,
    alive: Bool[Array, " B"],
    limit: Int[Array, ""],
    others_wait: Bool[Array, ""],
    mask: UInt32[Array, "B words"] | None,
    processor: LogitsProcessor | None = None,
) -> tuple[Cache, Row, Past | None, Choice]:
    """Up to `limit` tokens of all rows that are active and alive; fewer when none is any more, or when one has ended
    and others wait for its slot."""
    model = nnx.merge(graphdef, state)
    rows = rows._replace(active=rows.active & alive)
    begun, shape = rows.active, (len(alive), TOKENS_PER_CALL)
    blank = Choice(jnp.full(shape, NOTHING, jnp.int32))
    if rows.wants_top is not None:
        top = jnp.full((*shape, TOPS), NOTHING, jnp.int32)
        blank = Choice(blank.token, jnp.zeros(shape), top, jnp.zeros(top.shape))

    def running(carry):
        i, _, rows, _, _ = carry
        return (i < limit) & jnp.any(rows.active) & ~(others_wait & jnp.any(begun & ~rows.active))

    def one(carry):
        i, cache, rows, past, written = carry
        hidden, cache = model.step(rows.token[:, None], cache, rows.active.astype(jnp.int32))
        choice = choose(processed(model.logits(hidden)[:, 0], past, processor), rows, mask)
        new = choice._replace(token=jnp.where(rows.active, choice.token, NOTHING))
        written = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y[:, None], i, axis=1), written, new)
        past = None if past is None else past.extended(choice.token, rows.active)
        return i + 1, cache, advanced(rows, choice, rows.active), past, written

    first = jnp.int32(0), cache, rows, past, blank
    _, cache, rows, past, written = lax.while_loop(running, one, first)
    return cache, rows, past, _everywhere(written)


def _of_slot(layers, slot: Int[Array, ""]):
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, axis=0), layers)


def _with_slot(layers, slot: Int[Array, ""], new):
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, slot, axis=0), layers, new)


def _emptied(layers, start: Int[Array, ""], chunks: Sequence[int | None]):
    """Without what others left behind in the slots from `start` on. It has no weight, but a NaN times 0 is NaN."""

    def emptied(layer, chunk):
        def without(x):
            first = start if chunk is None else start % chunk
            at = lax.expand_dims(jnp.arange(x.shape[2]), (0, 1, *range(3, x.ndim)))
            return jnp.where(at < first, x, jnp.zeros((), x.dtype))

        return jax.tree.map(without, layer)

    return tuple(map(emptied, layers, chunks))


def _everywhere(tree):
    """What the host reads: whole on every device, so that every process has it."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)

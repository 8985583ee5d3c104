"""Keys and values of the past, with static shapes.

A chunked layer never looks out of its chunk, so it keeps one chunk: position p lives in slot p % C, and the slots of
the current chunk are those up to the current position's. A global layer keeps the whole context: slot = position.
Rows of a batch have lengths of their own.

On a mesh, rows and heads are apart, and the slots of a global layer are split over the axes of "cache": each device
writes what belongs in its own slots and attends to them, and the devices' sums are put together. A chunk is small, so
all of them hold it and do the same.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.model.config import ModelConfig
from llama4_jax.ops.attention import attention, partial_attention
from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.ops.partial_attention import combine, normalize
from sharding import activation_spec, axes_of, constrain


class LayerCache(NamedTuple):
    """Head-major: XLA on a CPU copies a cache whose two batch axes are apart."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


class Cache(NamedTuple):
    layers: tuple[LayerCache, ...]  # one a layer
    lengths: Int[Array, " B"]  # tokens seen so far, row by row


def empty_cache(config: ModelConfig, batch: int, max_length: int, dtype) -> Cache:
    """A cache for `batch` rows of at most `max_length` tokens. Chunked layers hold min(chunk, max_length) slots."""

    def layer(chunk: int | None) -> LayerCache:
        slots = max_length if chunk is None else min(chunk, max_length)
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        return LayerCache(*(constrain(jnp.zeros(shape, dtype), *cache_axes(chunk)) for _ in "kv"))

    return Cache(tuple(layer(spec.chunk) for spec in config.layers), jnp.zeros((batch,), jnp.int32))


def cache_axes(chunk: int | None) -> tuple[str | None, ...]:
    """Names of the axes of a layer's cache. A chunk is whole on every device of `cache`."""
    return "batch", "kv_heads", "cache" if chunk is None else None, "head_dim"


class Step(NamedTuple):
    """Where the new tokens of a cached forward pass go. The same for every layer."""

    lengths: Int[Array, " B"]  # tokens in the cache before this step
    counts: Int[Array, " B"]  # new tokens of each row; the others, on the right, are padding
    positions: Int[Array, "B T"]

    @property
    def valid(self) -> Bool[Array, "B T"]:
        return jnp.arange(self.positions.shape[1]) < self.counts[:, None]


def make_step(lengths: Int[Array, " B"], counts: Int[Array, " B"], num_tokens: int) -> Step:
    return Step(lengths, counts, lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32))


def cached_attention(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    cache: LayerCache,
    step: Step,
    *,
    chunk: int | None,
    scale: float,
) -> tuple[Float[Array, "B N T H"], LayerCache]:
    """Adds the keys and values of the new tokens to the cache, and attends from them to all that they may see in it."""
    slots = activation_spec(cache.k.shape, *cache_axes(chunk))
    new = PartitionSpec(slots[0], slots[1], None, None)  # query heads are split as their kv heads are
    axes = axes_of(slots[2])

    def local(q, k, v, cache, step):
        first = lax.axis_index(axes) * cache.k.shape[2] if axes else 0
        cache, seen = extend(cache, k, v, step, chunk, first)
        at = {"q_positions": step.positions, "k_positions": seen.positions, "chunk": chunk, "scale": scale}
        if axes:
            out = normalize(combine(partial_attention(q, seen.k, seen.v, **at), axes), q.dtype)
        else:
            out = attention(q, seen.k, seen.v, **at)
        return out, cache

    rows = Step(PartitionSpec(slots[0]), PartitionSpec(slots[0]), PartitionSpec(slots[0], None))
    cached = LayerCache(slots, slots)
    return on_mesh(local, (new, new, new, cached, rows), (new, cached))(q, k, v, cache, step)


class Visible(NamedTuple):
    """The keys that a cached step attends to. A negative position is an empty slot."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    positions: Int[Array, "B S"]


def extend(
    cache: LayerCache,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    step: Step,
    chunk: int | None,
    first: int | Int[Array, ""] = 0,
) -> tuple[LayerCache, Visible]:
    """Adds the new keys and values; returns the new cache and what the new queries may see of it.

    `first`: the position of the first slot, where a global layer's cache is one of several parts; only what belongs in
    this one is written. Lengths beyond the cache are not checked here (they are traced): `generate` checks before it
    starts.
    """
    if chunk is None:
        cache = _scatter(cache, k, v, step.positions - first, step.valid)
        return cache, Visible(cache.k, cache.v, _slot_positions(cache, step, chunk, first))
    if k.shape[2] == 1:
        cache = _scatter(cache, k, v, step.positions % chunk, step.valid)
        return cache, Visible(cache.k, cache.v, _slot_positions(cache, step, chunk))
    # Several tokens may leave the chunk that the cache holds, so they see the old slots and each other.
    before = step._replace(counts=jnp.zeros_like(step.counts))
    seen = Visible(
        jnp.concatenate([cache.k, k], axis=2),
        jnp.concatenate([cache.v, v], axis=2),
        jnp.concatenate([_slot_positions(cache, before, chunk), jnp.where(step.valid, step.positions, -1)], axis=1),
    )
    return _keep_last_chunk(cache, k, v, step, chunk), seen


def _slot_positions(cache: LayerCache, step: Step, chunk: int | None, first=0) -> Int[Array, "B S"]:
    """The position that each slot holds after the step, or -1."""
    end = (step.lengths + step.counts)[:, None]
    slots = jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None]
    start = first if chunk is None else jnp.maximum(end - 1, 0) // chunk * chunk
    positions = start + slots
    return jnp.where(positions < end, positions, -1)


def _scatter(cache: LayerCache, k, v, slots: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> LayerCache:
    rows = jnp.arange(slots.shape[0])[:, None]
    size = cache.k.shape[2]
    slots = jnp.where(valid & (slots >= 0) & (slots < size), slots, size)  # out of range: dropped

    def write(old, new):
        return old.at[rows, :, slots].set(new.swapaxes(1, 2).astype(old.dtype), mode="drop")

    return LayerCache(write(cache.k, k), write(cache.v, v))


def _keep_last_chunk(cache: LayerCache, k, v, step: Step, chunk: int) -> LayerCache:
    """Each slot takes the new token that belongs in it once all are in, if there is one."""
    end = (step.lengths + step.counts)[:, None]
    positions = jnp.maximum(end - 1, 0) // chunk * chunk + jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None]
    index = positions - step.lengths[:, None]  # among the new tokens
    is_new = (index >= 0) & (index < step.counts[:, None])
    index = jnp.clip(index, 0, k.shape[2] - 1)[:, None, :, None]

    def write(old, new):
        return jnp.where(is_new[:, None, :, None], jnp.take_along_axis(new, index, axis=2).astype(old.dtype), old)

    return LayerCache(write(cache.k, k), write(cache.v, v))

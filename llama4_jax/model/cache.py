"""Keys and values of the past, with static shapes.

A chunked layer never looks out of its chunk, so it keeps one chunk: position p lives in slot p % C, and the slots of
the current chunk are those up to the current position's. A global layer keeps the whole context: slot = position.
Rows of a batch have lengths of their own.

On a mesh, rows and heads are apart, and the slots of a global layer are split over the axes of "cache": each device
writes what belongs in its own slots and attends to them, and the devices' sums are put together. A chunk is small, so
all of them hold it and do the same.

A cache of int8 takes half the memory of one of bfloat16, but for a scale beside each key and each value of a head.
Keys and values are rounded when they are new, so that a token attends to the same ones in prefill as in decoding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int8

from llama4_jax.model.config import ModelConfig
from llama4_jax.ops.attention import (
    DECODE_QUERIES,
    Held,
    attention,
    block_of_slots,
    decode_held,
    partial_attention,
)
from llama4_jax.ops.cache_write import write_slots
from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.ops.partial_attention import combine, normalize
from llama4_jax.ops.quantization import Quantized, Scheme, quantize
from llama4_jax.sharding import activation_spec, axes_of, constrain


class LayerCache(NamedTuple):
    """Head-major: XLA on a CPU copies a cache whose two batch axes are apart."""

    k: Float[Array, "B K S H"] | Int8[Array, "B K S H"]
    v: Float[Array, "B K S H"] | Int8[Array, "B K S H"]
    k_scale: Float[Array, "B K S"] | None = None  # float32, of int8: value · scale
    v_scale: Float[Array, "B K S"] | None = None


class Cache(NamedTuple):
    layers: tuple[LayerCache, ...]  # one a layer
    lengths: Int[Array, " B"]  # tokens seen so far, row by row


def empty_cache(config: ModelConfig, batch: int, max_length: int, dtype) -> Cache:
    """A cache for `batch` rows of at most `max_length` tokens. Chunked layers hold min(chunk, max_length) slots.

    - dtype: a float's, or int8
    """

    def layer(chunk: int | None) -> LayerCache:
        slots = max_length if chunk is None else min(chunk, max_length)
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        axes = cache_axes(chunk)
        k, v = (constrain(jnp.zeros(shape, dtype), *axes) for _ in "kv")
        if k.dtype != jnp.int8:
            return LayerCache(k, v)
        return LayerCache(k, v, *(constrain(jnp.zeros(shape[:3], jnp.float32), *axes[:3]) for _ in "kv"))

    return Cache(tuple(layer(spec.chunk) for spec in config.layers), jnp.zeros((batch,), jnp.int32))


def cache_axes(chunk: int | None) -> tuple[str | None, ...]:
    """Names of the axes of a layer's cache; its scales have the first three. A chunk is whole on every device of
    `cache`."""
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
        at = {"q_positions": step.positions, "chunk": chunk, "scale": scale}
        few = seen.held is not None and q.shape[2] <= DECODE_QUERIES
        if few and (block := block_of_slots(cache.k.shape[2])) is not None:
            part = decode_held(q, seen.k, seen.v, held=seen.held, block=block, **at)
        elif axes or cache.k_scale is not None:
            part = partial_attention(q, seen.k, seen.v, k_positions=seen.positions, **at)
        else:
            return attention(q, seen.k, seen.v, k_positions=seen.positions, **at), cache
        return normalize(combine(part, axes) if axes else part, q.dtype), cache

    rows = Step(PartitionSpec(slots[0]), PartitionSpec(slots[0]), PartitionSpec(slots[0], None))
    cached = jax.tree.map(lambda part: PartitionSpec(*slots[: part.ndim]), cache)
    return on_mesh(local, (new, new, new, cached, rows), (new, cached))(q, k, v, cache, step)


class Visible(NamedTuple):
    """The keys that a cached step attends to. A negative position is an empty slot."""

    k: Float[Array, "B K S H"] | Quantized
    v: Float[Array, "B K S H"] | Quantized
    positions: Int[Array, "B S"]
    held: Held | None  # the same, where the keys are a cache's slots and no others


def _visible(entries: LayerCache, positions: Int[Array, "B S"], held: Held | None = None) -> Visible:
    k, v, k_scale, v_scale = entries
    return Visible(*((k, v) if k_scale is None else (Quantized(k, k_scale), Quantized(v, v_scale))), positions, held)


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
    new = _entries(k, v, cache)
    end = jnp.where(step.counts > 0, step.lengths + step.counts, 0)  # a row without new tokens has nothing to read
    if chunk is None:
        cache = _scatter(cache, new, step.positions - first, step.valid)
        return cache, _all_slots(cache, _held(end, chunk, first))
    if k.shape[2] == 1:
        cache = _scatter(cache, new, step.positions % chunk, step.valid)
        return cache, _all_slots(cache, _held(end, chunk))
    # Several tokens may leave the chunk that the cache holds, so they see the old slots and each other.
    before = _all_slots(cache, _held(step.lengths, chunk))
    seen = _visible(
        jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=2), cache, new),
        jnp.concatenate([before.positions, jnp.where(step.valid, step.positions, -1)], axis=1),
    )
    return _keep_last_chunk(cache, new, step, chunk), seen


def _entries(k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], cache: LayerCache) -> LayerCache:
    """New keys and values as this cache holds them."""
    if cache.k_scale is None:
        return LayerCache(k.astype(cache.k.dtype), v.astype(cache.v.dtype))
    (k, k_scale), (v, v_scale) = (quantize(x, Scheme("int8"), start=3) for x in (k, v))
    return LayerCache(k, v, k_scale[..., 0], v_scale[..., 0])


def _held(end: Int[Array, " B"], chunk: int | None, first: int | Int[Array, ""] = 0) -> Held:
    """What the slots hold of rows of this length, the first of them that of position `first` in a global layer."""
    start = jnp.full_like(end, first) if chunk is None else jnp.maximum(end - 1, 0) // chunk * chunk
    return Held(start, jnp.maximum(end - start, 0))


def _all_slots(cache: LayerCache, held: Held) -> Visible:
    return _visible(cache, held.positions(jnp.arange(cache.k.shape[2], dtype=jnp.int32)), held)


def _scatter(cache: LayerCache, new: LayerCache, slots: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> LayerCache:
    slots = jnp.where(valid, slots, -1)  # in no slot
    return jax.tree.map(lambda old, new: write_slots(old, new, slots), cache, new)


def _keep_last_chunk(cache: LayerCache, new: LayerCache, step: Step, chunk: int) -> LayerCache:
    """Each slot takes the new token that belongs in it once all are in, if there is one."""
    end = (step.lengths + step.counts)[:, None]
    positions = jnp.maximum(end - 1, 0) // chunk * chunk + jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None]
    index = positions - step.lengths[:, None]  # among the new tokens
    is_new = (index >= 0) & (index < step.counts[:, None])
    index = jnp.clip(index, 0, new.k.shape[2] - 1)

    def write(old, new):
        of_slot, at = (lax.expand_dims(x, (1, *range(3, old.ndim))) for x in (is_new, index))
        return jnp.where(of_slot, jnp.take_along_axis(new, at, axis=2), old)

    return jax.tree.map(write, cache, new)

"""Attention to some of the keys, so that devices which hold different ones can put theirs together.

softmax(scores) v = Σ exp(s - peak) v / Σ exp(s - peak) for any peak, so both sums may be made in parts, each with a
peak of its own, and scaled to the greatest of them when they meet.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from llama4_jax.ops.attention_reference import HIDDEN


class PartialAttention(NamedTuple):
    """float32. Of a query that saw no key yet, `total` and `out` are 0 and `peak` is very low, but finite."""

    peak: Float[Array, "B N T"]  # the greatest score
    total: Float[Array, "B N T"]  # Σ exp(score - peak)
    out: Float[Array, "B N T H"]  # Σ exp(score - peak) v


def combine(part: PartialAttention, axes: tuple[str, ...]) -> PartialAttention:
    """All parts that the devices along these mesh axes have, on each of them. For use in `shard_map`."""
    peak = lax.pmax(part.peak, axes)
    share = jnp.exp(part.peak - peak)
    total, out = lax.psum((part.total * share, part.out * share[..., None]), axes)
    return PartialAttention(peak, total, out)


def nothing_seen(q: Float[Array, "B N T H"]) -> PartialAttention:
    """Of queries before their first key."""
    return PartialAttention(jnp.full(q.shape[:3], HIDDEN), jnp.zeros(q.shape[:3]), jnp.zeros(q.shape, jnp.float32))


def merge(one: PartialAttention, other: PartialAttention) -> PartialAttention:
    """Of the same queries to the keys of both."""
    peak = jnp.maximum(one.peak, other.peak)
    shares = tuple(jnp.exp(part.peak - peak) for part in (one, other))
    total = sum(part.total * share for part, share in zip((one, other), shares, strict=True))
    out = sum(part.out * share[..., None] for part, share in zip((one, other), shares, strict=True))
    return PartialAttention(peak, total, out)


def normalize(part: PartialAttention, dtype) -> Float[Array, "B N T H"]:
    """The output; 0 for a query that saw no key."""
    return (part.out / jnp.where(part.total == 0, 1, part.total)[..., None]).astype(dtype)

"""Attention to some of the keys, so that devices which hold different ones can put theirs together.

softmax(scores) v = Σ exp(s - peak) v / Σ exp(s - peak) for any peak, so both sums may be made in parts, each with a
peak of its own, and scaled to the greatest of them when they meet.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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


def normalize(part: PartialAttention, dtype) -> Float[Array, "B N T H"]:
    """The output; 0 for a query that saw no key."""
    return (part.out / jnp.where(part.total == 0, 1, part.total)[..., None]).astype(dtype)

"""Rotary positions (RoFormer, arXiv 2104.09864), interleaved: elements (2j, 2j+1) are one complex number.

Both references use this form for the text model, and Llama 3's frequency scaling for Scout. Angles are float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama4_jax.model.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[np.ndarray, " half"]:
    """Radians a position, for each of the head_dim/2 pairs: theta^(-2j/head_dim), scaled as Llama 3 does.

    Reference: `_compute_llama3_parameters` of transformers, `apply_scaling` of llama-models.
    """
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain.astype(np.float32)
    turns = scaling.original_context * plain / (2 * np.pi)  # made within the original context
    band = scaling.high_freq_factor - scaling.low_freq_factor
    # Scout's band is empty (low = high): a hard cut, and no 0/0.
    keep = (turns - scaling.low_freq_factor) / band if band else (turns >= scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (keep * plain + (1 - keep) * plain / scaling.factor).astype(np.float32)


class Rotation(NamedTuple):
    """Cosine and sine of each pair's angle at each position, float32: the same for every layer and head."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotation(positions: Int[Array, "B T"], frequency: Float[np.ndarray, " half"]) -> Rotation:
    """The rotation at each position. Angles are position · frequency in float32, as in both references."""
    angle = positions.astype(jnp.float32)[..., None] * frequency
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B heads T H"], by: Rotation) -> Float[Array, "B heads T H"]:
    """Rotates each pair of x. float32 inside, returned in x's dtype."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = by.cos[:, None], by.sin[:, None]  # the same for every head
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)

"""What devices say to each other, within `shard_map`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(w: jax.Array, dtype, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """All parts of a parameter along the dimension that these mesh axes split, cast to `dtype` before they travel. Its
    gradient is summed in float32, and each device gets its own part."""
    w = w.astype(dtype)
    return lax.all_gather(w, axes, axis=dimension, tiled=True) if axes else w


def _gradient(dtype, axes, dimension, like, g):
    if axes:
        g = lax.psum_scatter(g.astype(jnp.float32), axes, scatter_dimension=dimension, tiled=True)
    return (g.astype(like.dtype),)


# The empty slice carries w's dtype to the backward pass.
gathered.defvjp(lambda w, dtype, axes, dimension: (gathered(w, dtype, axes, dimension), w[:0]), _gradient)


def own_part(total: jax.Array, home: tuple[str, ...], summed: tuple[str, ...], dimension: int) -> jax.Array:
    """This device's part, along a dimension that the axes `home` split, of the sum over the axes `summed`."""
    if set(home) <= set(summed):
        part = lax.psum_scatter(total, home, scatter_dimension=dimension, tiled=True) if home else total
        others = tuple(axis for axis in summed if axis not in home)
        return lax.psum(part, others) if others else part
    total = lax.psum(total, summed) if summed else total
    size = total.shape[dimension] // lax.axis_size(home)
    return lax.dynamic_slice_in_dim(total, lax.axis_index(home) * size, size, dimension)

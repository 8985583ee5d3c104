"""What devices say to each other, within `shard_map`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sharding.mesh import platform


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(w: jax.Array, dtype, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """All parts of a parameter along the dimension that these mesh axes split, cast to `dtype` before they travel. Its
    gradient is summed in float32, and each device gets its own part."""
    if platform() != "cpu":
        # Of layers in a scan XLA would cast the whole stack before it, and keep that.
        w = lax.optimization_barrier(w)
    w = w.astype(dtype)
    for axis in reversed(axes):  # one at a time: over all devices of a mesh a TPU would add up zeros instead
        w = lax.all_gather(w, axis, axis=dimension, tiled=True)
    return w


def given_back(g: jax.Array, dtype, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """The gradient of a parameter that was `gathered`, given that of what was gathered."""
    return _scattered(g.astype(jnp.float32) if axes else g, axes, dimension).astype(dtype)


def _scattered(total: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Its sum over the axes, of which each device keeps its part: over the last axis first, the rest being the less."""
    before, after = total.shape[:dimension], total.shape[dimension + 1 :]
    part = total.reshape(*before, *[lax.axis_size(axis) for axis in axes], -1, *after)
    for i, axis in reversed(list(enumerate(axes))):
        part = lax.psum_scatter(part, axis, scatter_dimension=dimension + i, tiled=True)
    return part.reshape(*before, -1, *after)


# The empty slice carries w's dtype to the backward pass.
gathered.defvjp(
    lambda w, dtype, axes, dimension: (gathered(w, dtype, axes, dimension), w[:0]),
    lambda dtype, axes, dimension, like, g: (given_back(g, like.dtype, axes, dimension),),
)


def own_part(total: jax.Array, home: tuple[str, ...], summed: tuple[str, ...], dimension: int) -> jax.Array:
    """This device's part, along a dimension that the axes `home` split, of the sum over the axes `summed`."""
    if set(home) <= set(summed):
        part = _scattered(total, home, dimension)
        others = tuple(axis for axis in summed if axis not in home)
        return lax.psum(part, others) if others else part
    total = lax.psum(total, summed) if summed else total
    size = total.shape[dimension] // lax.axis_size(home)
    return lax.dynamic_slice_in_dim(total, lax.axis_index(home) * size, size, dimension)

"""What devices say to each other, within `shard_map`."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from llama4_jax.sharding.mesh import platform


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(w: jax.Array, dtype, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """All parts of a parameter along the dimension that these mesh axes split, cast to `dtype` before they travel. Its
    gradient is summed in float32, and each device gets its own part."""
    if platform() != "cpu":
        # Of layers in a scan XLA would cast the whole stack before it, and keep that.
        w = lax.optimization_barrier(w)
    return all_parts(w.astype(dtype), axes, dimension)


def all_parts(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Of an array that these mesh axes split along this dimension."""
    for group in reversed(in_groups(axes)):
        x = lax.all_gather(x, group, axis=dimension, tiled=True)
    return x


def in_groups(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The mesh axes over which to gather or scatter at once: all of them if there are several replicas (`data`), or
    else one after another. What XLA for TPUs makes of it decides:

    - over all devices at once it gathers by an all-reduce of parts among zeros, and sends twice as much
    - a gradient that replicas add up, too, it adds up over all axes but the first before it scatters
    """
    replicas = dict(jax.sharding.get_abstract_mesh().shape).get("data", 1)
    return [axes] if axes and replicas > 1 else [(axis,) for axis in axes]


def given_back(g: jax.Array, dtype, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """The gradient of a parameter that was `gathered`, given that of what was gathered."""
    return _scattered(g.astype(jnp.float32) if axes else g, axes, dimension).astype(dtype)


def _scattered(total: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Its sum over the axes, of which each device keeps its part."""
    if not axes:
        return total
    if 0 < dimension < total.ndim - 1:  # XLA for TPUs would scatter the last or the first, or else sum up everywhere
        before = total.shape[:dimension]
        if math.prod(before) == 1:
            part = _scattered(total.reshape(total.shape[dimension:]), axes, 0)
            return part.reshape(*before, *part.shape)
        return jnp.moveaxis(_scattered(jnp.moveaxis(total, dimension, 0), axes, 0), 0, dimension)
    for group in in_groups(axes):
        total = lax.psum_scatter(total, group, scatter_dimension=dimension, tiled=True)
    return total


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

"""Random numbers for arrays of many gigabytes, made in place: JAX's own generator would need several times as much.

Each number is a hash of its place (the finalizer of MurmurHash3), uniform, with the deviation that weights have. Zeros
would not do: products of zeros run faster than those of other numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

STD = 0.02  # of weights


@functools.partial(jax.jit, static_argnums=(0, 1))
def filled(shape: tuple[int, ...], dtype, std: float, seed: int) -> jax.Array:
    """Floats from -√3 std to √3 std; of 8-bit floats and integers all values but the least."""
    dtype = jnp.dtype(dtype)
    index = jnp.uint32(0)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    bits = index * np.uint32(0x9E3779B1) + jnp.asarray(seed, jnp.uint32) * np.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    bits ^= bits >> 16
    unit = bits.astype(jnp.float32) * np.float32(2**-31) - 1  # -1 to 1
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.round(unit * jnp.iinfo(dtype).max).astype(dtype)
    if dtype.itemsize == 1:
        return (unit * float(jnp.finfo(dtype).max)).astype(dtype)
    return (unit * (3**0.5 * std)).astype(dtype)


def filled_state(state: nnx.State, seed: int = 0) -> nnx.State:
    """Parameters of these shapes and dtypes: matrices random, norms 1, biases of the router 0, and scales of quantized
    matrices such that their products have the size of those of weights."""
    shapes = dict(nnx.to_flat_state(state))

    def made(number: int, path: tuple) -> jax.Array:
        value, name = shapes[path].get_value(), str(path[-1])
        if name == "scale":
            return jnp.ones(value.shape, value.dtype)
        if name == "bias":
            return jnp.zeros(value.shape, value.dtype)
        if name.endswith("_scale"):
            dtype = shapes[(*path[:-1], name.removesuffix("_scale"))].get_value().dtype
            largest = (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).max
            return jnp.full(value.shape, STD * 3**0.5 / float(largest), value.dtype)
        return filled(value.shape, value.dtype, STD, seed * 1000 + number)

    flat = [(path, leaf.replace(made(number, path))) for number, (path, leaf) in enumerate(shapes.items())]
    return nnx.from_flat_state(flat)

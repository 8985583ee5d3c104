"""silu(gate) · up, with its backward pass written out: it keeps the input alone, where autodiff keeps several arrays of
its size, and makes its gradient in one pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama4_jax.ops.plain import own_gradient


def swiglu(gate_up: Float[Array, "*rows 2 F"]) -> Float[Array, "*rows F"]:
    """silu(gate) · up of the two halves."""
    return _swiglu(gate_up, False)


def swiglu_flat(gate_up: Float[Array, "R FF"]) -> Float[Array, "R F"]:
    """The same of halves that lie side by side in one dimension."""
    return _swiglu(gate_up, True)


def _halves(x: Float[Array, "..."], flat: bool) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    width = x.shape[-1] // 2
    return (x[..., :width], x[..., width:]) if flat else (x[..., 0, :], x[..., 1, :])


@own_gradient(nondiff_argnums=(1,))
def _swiglu(gate_up, flat: bool):
    gate, up = _halves(gate_up, flat)
    return jax.nn.silu(gate) * up


def _backward(flat, gate_up, g):
    gate, up = _halves(gate_up, flat)
    sigmoid = jax.nn.sigmoid(gate)
    parts = g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid
    return (jnp.concatenate(parts, axis=-1) if flat else jnp.stack(parts, axis=-2),)


_swiglu.defvjp(lambda gate_up, flat: (_swiglu(gate_up, flat), gate_up), _backward)

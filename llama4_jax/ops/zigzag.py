"""The order of a sequence over devices in which each has as much of causal attention to compute as any other.

Split into runs of equal length, the device with the end of a sequence would see everything and that with its beginning
almost nothing. So the sequence is cut into 2n stripes, and device d of n holds stripes d and 2n - 1 - d: what one
stripe sees less, the other sees more. Layers see this order; outside of the model, sequences are in their own.

From one order to the other each device sends two stripes, its even one and its odd one, and receives one of each.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.sharding import activation_spec, mesh_axes, ways


def can_zigzag(length: int) -> bool:
    """Whether the rules and the mesh in use split a sequence of this length, and into stripes of equal length."""
    devices = ways(mesh_axes("seq"))
    return devices > 1 and length % (2 * devices) == 0


def to_zigzag(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """From the order of the sequence; needs `can_zigzag`."""
    axes, devices = mesh_axes("seq"), ways(mesh_axes("seq"))

    def local(x):
        even, odd = jnp.split(x, 2, axis=1)
        even = lax.ppermute(even, axes, [(i, _holder(2 * i, devices)) for i in range(devices)])
        odd = lax.ppermute(odd, axes, [(i, _holder(2 * i + 1, devices)) for i in range(devices)])
        return _in_order(even, odd, axes)

    return _on_sequence(local, x)


def from_zigzag(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Back to the order of the sequence."""
    axes, devices = mesh_axes("seq"), ways(mesh_axes("seq"))

    def local(x):
        # A device's first stripe is even where the device is, and then its second is odd.
        even, odd = jnp.split(_in_order(*jnp.split(x, 2, axis=1), axes), 2, axis=1)
        even = lax.ppermute(even, axes, [(_holder(2 * i, devices), i) for i in range(devices)])
        odd = lax.ppermute(odd, axes, [(_holder(2 * i + 1, devices), i) for i in range(devices)])
        return jnp.concatenate([even, odd], axis=1)

    return _on_sequence(local, x)


def _holder(stripe: int, devices: int) -> int:
    return min(stripe, 2 * devices - 1 - stripe)


def _in_order(a, b, axes: tuple[str, ...]):
    """a, b on even devices; b, a on odd ones."""
    even = lax.axis_index(axes) % 2 == 0
    return jnp.concatenate([jnp.where(even, a, b), jnp.where(even, b, a)], axis=1)


def _on_sequence(local, x):
    spec = activation_spec(x.shape, "batch", "seq", *[None] * (x.ndim - 2))
    return on_mesh(local, spec, spec)(x)

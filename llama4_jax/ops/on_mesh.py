"""Running a function on each device's own part of its arrays."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec


def parts(spec: PartitionSpec, axis: int) -> tuple[str, ...]:
    """Mesh axes over which `spec` splits an axis of an array."""
    part = spec[axis]
    return () if part is None else part if isinstance(part, tuple) else (part,)


def on_mesh(f: Callable, in_specs, out_specs) -> Callable:
    """`f` in `shard_map` over all axes of the mesh in use: `f` sees a device's parts, and nothing moves but what it
    moves itself. Just `f` without a mesh, on one of a single device, and in `shard_map` already.

    Where the specs leave out a mesh axis, all devices along it do the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)

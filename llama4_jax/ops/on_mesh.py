"""Running a function on each device's own part of its arrays."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from llama4_jax.sharding import axes_of


def on_mesh(f: Callable, in_specs, out_specs) -> Callable:
    """`f` in `shard_map` over all axes of the mesh in use: `f` sees a device's parts, and nothing moves but what it
    moves itself. Just `f` without a mesh, on one of a single device, and in `shard_map` already.

    Where the specs leave out a mesh axis, all devices along it do the same, and gradients are the mean of theirs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return f
    single = tuple(axis for axis, size in mesh.shape.items() if size == 1)

    def naming_all(spec: PartitionSpec) -> PartitionSpec:
        # An axis of one device splits any array. Were it left out, the backward pass would have a sum over it.
        return PartitionSpec(axes_of(spec[0]) + single, *spec[1:])

    def is_spec(x) -> bool:
        return isinstance(x, PartitionSpec)

    in_specs, out_specs = jax.tree.map(naming_all, (in_specs, out_specs), is_leaf=is_spec)
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)

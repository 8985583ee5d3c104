"""What an axis is, and over which mesh axes it is split: one closed vocabulary, two tables.

An array's axes are named by what they *are* ("embed", "q_heads"), never by where they go. The parameter table and
the activation table say where each goes. Parameters are split over `fsdp` along their embed axis; activations are not.
"""

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]

# name of the axis: mesh axes it is split over, when the array is a parameter
PARAMETERS: dict[str, tuple[str, ...]] = {
    "layers": (),  # layers of one kind, stacked for `scan`
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "gate_up": (),  # the two halves of a SwiGLU
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),  # the experts as outputs of the router: too few columns to be worth splitting
    "patch": (),  # patches of a tile, or the pixels of one
    "norm": (),
}

# the same, when it is an activation
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "seq": ("context",),
    "embed": (),
    "vocab": ("tensor",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "cache": (),  # positions of a key/value cache
    "patch": (),
    "tiles": (),  # of the pictures of a row
    "pixels": (),
}


def spec(axes: Axes, table: dict[str, tuple[str, ...]]) -> PartitionSpec:
    """The PartitionSpec of an array with these named axes. Raises ValueError for a name outside the table."""
    parts: list[str | tuple[str, ...] | None] = []
    for name in axes:
        if name is not None and name not in table:
            raise ValueError(f"unknown axis {name!r}: expected one of {', '.join(table)}.")
        mesh_axes = () if name is None else table[name]
        parts.append(None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the partitioner where activation `x`, with these named axes, lives. No-op outside `jax.set_mesh`."""
    if len(axes) != x.ndim:
        raise ValueError(f"an array of shape {x.shape} needs {x.ndim} axis names, got {axes}.")
    partition = spec(axes, ACTIVATIONS)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition)


def check_divides(shape: tuple[int, ...], axes: Axes, table: dict, mesh: Mesh | AbstractMesh, what: str) -> None:
    """Raises ValueError if a mesh axis does not divide the dimension that it splits."""
    for size, name in zip(shape, axes, strict=True):
        if name is None:
            continue
        for_axis = {axis: mesh.shape[axis] for axis in table[name]}
        ways = 1
        for n in for_axis.values():
            ways *= n
        if size % ways:
            split = " x ".join(f"mesh.{axis}={n}" for axis, n in for_axis.items())
            raise ValueError(
                f"{what}: its {name!r} axis has size {size}, which {split} does not divide. "
                f"Choose mesh sizes whose product divides {size}, or change that size."
            )


def parameter_sharding(
    shape: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh, what: str = "parameter"
) -> NamedSharding:
    """Where a parameter with these named axes lives on `mesh`. Raises ValueError where the mesh does not divide it."""
    partition = spec(axes, PARAMETERS)
    check_divides(shape, axes, PARAMETERS, mesh, what)
    return NamedSharding(mesh, partition)


def activation_sharding(axes: Axes, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where an activation with these named axes lives on `mesh`."""
    return NamedSharding(mesh, spec(axes, ACTIVATIONS))

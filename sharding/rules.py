"""What an axis is, and over which mesh axes it is split: one closed vocabulary, and two tables for each use.

An array's axes are named by what they *are* ("embed", "q_heads"), never by where they go. The parameter table and
the activation table of `Rules` say where each goes. A mesh axis splits an array once: where two of its axes ask for the
same one, the first gets it. So one row of a table serves experts, whose `experts` take `expert`, and all other
matrices, whose `embed` takes it too.

- TRAINING: tokens stay where they are and parameters are gathered for use, layer by layer, wherever `embed` is split
- SERVING: parameters stay where they are, split along what they put out, and the few tokens of a step are gathered
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llama4_jax.sharding.collectives import in_groups

Axes = tuple[str | None, ...]
Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)  # hashable, as `jit` wants of what is static
class Rules:
    """name of an axis: mesh axes it is split over. Of these the first must divide it, unless it may be of any size; the
    others join if they do."""

    parameters: Table
    activations: Table


TRAINING = Rules(
    parameters={
        "layers": (),  # layers of one kind, stacked for `scan`
        "embed": ("fsdp", "expert", "context"),
        "vocab": ("tensor",),
        "q_heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (
            "expert",
        ),  # this and `mlp`, for kernels that put out `embed`: of that a device would have too few
        "gate_up": (),  # the two halves of a SwiGLU
        "mlp": ("tensor", "expert"),
        "experts": ("expert",),
        "router": (),  # the experts as outputs of the router: too few columns to be worth splitting
        "patch": (),  # patches of a tile, or the pixels of one
        "norm": (),
        "rank": (),  # of LoRA's factors
    },
    activations={
        "batch": ("data", "fsdp", "expert"),
        "rows": ("data", "fsdp", "expert"),  # the batch, as the feed-forward sees it
        "seq": ("context",),
        "embed": (),
        "vocab": ("tensor",),
        "q_heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "mlp": ("tensor",),
        "gate_up": (),
        "router": (),
        "norm": (),
        "rank": (),
        "cache": ("context",),  # positions of a key/value cache
        "patch": (),
        "tiles": (),  # of the pictures of a row
        "pixels": (),
    },
)

SERVING = Rules(
    parameters={
        **TRAINING.parameters,
        "embed": ("fsdp",),
        "vocab": ("tensor", "expert"),
        "head_dim": (),
    },
    activations={
        **TRAINING.activations,
        "rows": ("data", "fsdp"),  # gathered over `expert`: every device's experts see all of them
        "seq": (),
        "vocab": ("tensor", "expert"),
        "mlp": ("tensor", "expert"),
    },
)

_OF_ANY_SIZE = frozenset({"head_dim"})  # what no mesh axis must divide

_current: ContextVar[Rules] = ContextVar("rules", default=TRAINING)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Within it, activations live where `rules` say. Matters while a function is traced, not when it runs."""
    token = _current.set(rules)
    try:
        yield
    finally:
        _current.reset(token)


def spec(shape: tuple[int, ...] | None, axes: Axes, table: Table, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array of this shape, with these named axes, is split. Mesh axes of size 1, and those that do not divide
    what is left of a dimension, are left out; without a shape all are taken to divide it. Raises ValueError for a name
    outside the table."""
    used: set[str] = set()
    parts: list[str | tuple[str, ...] | None] = []
    for size, name in zip(shape or [0] * len(axes), axes, strict=True):
        if name is not None and name not in table:
            raise ValueError(f"unknown axis {name!r}: expected one of {', '.join(table)}.")
        own: list[str] = []
        for axis in () if name is None else table[name]:
            ways = mesh.shape[axis]
            if ways > 1 and axis not in used and size % ways == 0:
                size //= ways
                own.append(axis)
        used.update(own)
        parts.append(tuple(own) if len(own) > 1 else own[0] if own else None)
    return PartitionSpec(*parts)


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if part is None else (part,) if isinstance(part, str) else part


def activation_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """The same for an activation, by the rules and on the mesh in use; all parts are None outside `jax.set_mesh`."""
    return _spec_in_use(shape, axes, _current.get().activations)


def _spec_in_use(shape: tuple[int, ...], axes: Axes, table: Table) -> PartitionSpec:
    mesh = jax.sharding.get_abstract_mesh()
    return PartitionSpec(*[None] * len(axes)) if mesh.empty else spec(shape, axes, table, mesh)


def parameter_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """Where a parameter lives, by the rules and on the mesh in use; all parts are None outside `jax.set_mesh`."""
    return _spec_in_use(shape, axes, _current.get().parameters)


def for_use(w: jax.Array, dtype, *axes: str | None) -> jax.Array:
    """Parameter `w`, with these named axes, as a product uses it: cast to `dtype` where it lives, and then gathered, so
    that what travels is of that dtype. Its gradient goes back to where it lives."""
    places = where_used(w.shape, *axes)
    return w.astype(dtype) if places is None else _for_use(w, dtype, *places)


def where_used(shape: tuple[int, ...], *axes: str | None) -> tuple[PartitionSpec, PartitionSpec] | None:
    """Where a parameter lives, and where products use it. None where nothing is to be said: without a mesh, on one
    device, and in `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    return parameter_spec(shape, *axes), activation_spec(shape, *axes)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _for_use(w, dtype, home: PartitionSpec, use: PartitionSpec):
    # XLA would cast a whole stack of layers before the scan over them, and keep that.
    return brought(jax.lax.optimization_barrier(w).astype(dtype), home, use)


_for_use.defvjp(
    lambda w, dtype, home, use: (_for_use(w, dtype, home, use), w[:0]),
    lambda dtype, home, use, like, g: (given_home(g, home, use).astype(like.dtype),),
)


def brought(w: jax.Array, home: PartitionSpec, use: PartitionSpec) -> jax.Array:
    """A parameter that lives where `home` says, in the dtype it has, to where `use` says."""
    first, *on = _way(home, use)
    # XLA would gather what w is made of.
    w = jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(w, first))
    for place in on:
        w = jax.lax.with_sharding_constraint(w, place)
    return w


def given_home(g: jax.Array, home: PartitionSpec, use: PartitionSpec) -> jax.Array:
    """The gradient of what was `brought`, to where the parameter lives."""
    for place in reversed(_way(home, use)[:-1]):
        g = jax.lax.with_sharding_constraint(g, place)
    return g


def _way(home: PartitionSpec, use: PartitionSpec) -> list[PartitionSpec]:
    """Places from `home` to `use`, on the way those that gathering by `in_groups` comes by."""
    parts, goals, places = [axes_of(part) for part in home], [axes_of(part) for part in use], [home]
    gathered = tuple(axis for part in parts for axis in part if not any(axis in goal for goal in goals))
    for group in reversed(in_groups(gathered)):
        parts = [tuple(axis for axis in part if axis not in group) for part in parts]
        places.append(PartitionSpec(*[part or None for part in parts]))
    return places if places[-1] == use and gathered else [*places, use]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the partitioner where activation `x`, with these named axes, lives. No-op outside `jax.set_mesh`, and
    within `shard_map`, where an array is a device's own part."""
    if len(axes) != x.ndim:
        raise ValueError(f"an array of shape {x.shape} needs {x.ndim} axis names, got {axes}.")
    partition = activation_spec(x.shape, *axes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, partition)


def mesh_axes(*names: str) -> tuple[str, ...]:
    """Mesh axes in use, larger than 1, that split an activation's axes of these names; none outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    table = _current.get().activations
    return () if mesh.empty else tuple(axis for name in names for axis in table[name] if mesh.shape[axis] > 1)


def ways(axes: tuple[str, ...]) -> int:
    """Into how many parts these axes of the mesh in use split an array."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes) if axes else 1


def parameter_sharding(
    shape: tuple[int, ...],
    axes: Axes,
    mesh: Mesh | AbstractMesh,
    what: str = "parameter",
    rules: Rules = TRAINING,
) -> NamedSharding:
    """Where a parameter with these named axes lives on `mesh`. Raises ValueError where the mesh does not divide it."""
    table = rules.parameters
    partition = spec(shape, axes, table, mesh)
    taken = {axis for part in partition for axis in axes_of(part)}
    for size, name in zip(shape, axes, strict=True):
        first = table[name][:1] if name is not None and name not in _OF_ANY_SIZE else ()
        for axis in first:
            if axis not in taken and size % mesh.shape[axis]:
                raise ValueError(
                    f"{what}: its {name!r} axis has size {size}, which mesh.{axis}={mesh.shape[axis]} does not divide. "
                    f"Choose a mesh.{axis} that divides {size}, or change that size."
                )
    return NamedSharding(mesh, partition)


def activation_sharding(axes: Axes, mesh: Mesh | AbstractMesh, rules: Rules = TRAINING) -> NamedSharding:
    """Where an activation with these named axes lives on `mesh`, which must divide it."""
    return NamedSharding(mesh, spec(None, axes, rules.activations, mesh))

"""Layers one after another, those of a repeating group stacked for `scan`.

`scan` compiles the group once and runs it as often as it occurs, with the group's parameters stacked; layers that are
left over at the end follow one by one. The numbers of a seed do not depend on the layout.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from llama4_jax.ops.dot_general import PRODUCT

_INPUT = "layer_input"

# `remat`: what the backward pass may keep of each layer, beside the layer's input. "none" keeps all it needs.
REMAT_POLICIES = {
    "none": None,
    # results of products with parameters, and the rows that went to experts: attention and what is cheap come again
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
    # and the input is in the host's memory until the backward pass comes to the layer
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Stack(nnx.Module):
    """Layers. Attributes:

    - group: one module a layer of the repeating group, each parameter stacked over the repetitions; empty if nothing
      is scanned
    - rest: the layers after the repetitions; all of them if nothing is scanned
    """

    def __init__(
        self,
        make: Callable[[int, Array], nnx.Module],
        *,
        num_layers: int,
        period: int,
        scan_layers: bool,
        remat: str,
        key: Array,
    ):
        """`make(i, key)` is layer i; it may depend on i through i % period alone."""
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}, got {remat!r}.")
        repeats = num_layers // period if scan_layers else 0
        if repeats < 2:  # nothing repeats: stacking one group would only hide its layers
            repeats = 0
        keys = jax.random.split(key, num_layers)
        scanned = repeats * period
        self.group = nnx.List(
            [
                _stack_axes(jax.vmap(lambda k, i=i: make(i, k))(keys[i:scanned:period]))
                for i in range(period if repeats else 0)
            ]
        )
        self.rest = nnx.List([make(i, keys[i]) for i in range(scanned, num_layers)])
        self.repeats = repeats
        self.remat = remat

    def run(self, each: Callable[[Any, Array], tuple[Array, Any]], x: Array) -> tuple[Array, list[Any]]:
        """each(layer, x) → (x, out), layer by layer; returns the last x and, in order, each out that is not None."""
        if self.remat == "offload":
            each = _named_input(each)
        each = _with_captures(each)
        if self.remat != "none":
            each = jax.checkpoint(each, policy=REMAT_POLICIES[self.remat])

        def run(layers, x):
            collected, captured = [], []
            for layer in layers:
                x, (out, of_layer) = each(layer, x)
                collected += [] if out is None else [out]
                captured.append(of_layer)
            return x, (collected, captured)

        collected = []
        if self.repeats:
            x, (scanned, captured) = jax.lax.scan(lambda x, group: run(group, x), x, self.group)
            _put_captures(self.group, captured)
            by_repeat = [jax.tree.map(lambda leaf, r=r: leaf[r], scanned) for r in range(self.repeats)]
            collected = [out for repeat in by_repeat for out in repeat]
        x, (rest, captured) = run(self.rest, x)
        _put_captures(self.rest, captured)
        return x, collected + rest

    def layers(self) -> list:
        """The layers one by one, in order; those of the scanned group as slices of their stacks."""
        return [self.layer(i) for i in range(self.num_scanned + len(self.rest))]

    @property
    def num_scanned(self) -> int:
        """Layers in stacks: the first so many."""
        return self.repeats * len(self.group)

    def layer(self, i: int) -> nnx.Module:
        """The layer of this number."""
        if i >= self.num_scanned:
            return self.rest[i - self.num_scanned]
        repeat, place = divmod(i, len(self.group))
        return _unstack_axes(jax.tree.map(lambda leaf: leaf[repeat], self.group[place]))

    def unscanned(self):
        """The same layers with nothing stacked: what decoding wants, since a slice of a stack is a copy."""
        graphdef, state = nnx.split(self)
        copy = nnx.merge(graphdef, state)
        copy.rest, copy.group, copy.repeats = nnx.List(self.layers()), nnx.List([]), 0
        return copy


class Layers(Sequence):
    """The layers of a stack, to be looked at one by one: layers[3], layers[-1], layers[:2], len(layers).

    A layer of a scanned group is a slice of its stack, made when it is asked for. Its parameters are copies, so setting
    one raises ValueError: it would change nothing in the model.
    """

    def __init__(self, stack: Stack):
        self._stack = stack

    def __len__(self) -> int:
        return self._stack.num_scanned + len(self._stack.rest)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        place = range(len(self))[i]  # raises IndexError, and takes negative ones
        layer = self._stack.layer(place)
        return _read_only(layer) if place < self._stack.num_scanned else layer


def _read_only(module: nnx.Module) -> nnx.Module:
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(on_set_value=_refuse)
    return module


def _refuse(variable: nnx.Variable, value):
    raise ValueError(
        "this layer is a slice of a scanned stack: setting its parameters changes nothing in the model. Make it with "
        "Llama4(..., scan_layers=False), or of it model.unscanned(), and set those."
    )


def _named_input(each):
    return lambda layer, x: each(layer, checkpoint_name(x, _INPUT))


def _with_captures(each):
    """`each`, which also returns what the layer captured. `jax.lax.scan` and `jax.checkpoint` run a copy of the layer,
    and what `nnx.capture` finds there would be lost with the copy."""

    def wrapped(layer, x):
        x, out = each(layer, x)
        return x, (out, _captures(layer))

    return wrapped


def _captures(layer: nnx.Module) -> list[list[dict[str, Any]]]:
    """What each module of a layer captured by name, for each type of variable; nothing outside of `nnx.capture`."""
    return [
        [dict(variable.get_value()) for variable in module.__captures__]
        for _, module in nnx.iter_modules(layer)
        if hasattr(module, "__captures__")
    ]


def _put_captures(layers, captured: list) -> None:
    """Into the layers themselves, where `nnx.capture` looks. Those of a group have an axis of its repetitions."""
    for layer, of_layer in zip(layers, captured, strict=True):
        modules = (module for _, module in nnx.iter_modules(layer) if hasattr(module, "__captures__"))
        for module, values in zip(modules, of_layer, strict=True):
            for variable, value in zip(module.__captures__, values, strict=True):
                variable.set_value(value)


def _map_axes(module: nnx.Module, change) -> nnx.Module:
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(axes=change(variable.axes))
    return module


def _stack_axes(module: nnx.Module) -> nnx.Module:
    return _map_axes(module, lambda axes: ("layers", *axes))


def _unstack_axes(module: nnx.Module) -> nnx.Module:
    return _map_axes(module, lambda axes: axes[1:])

"""Parameters that do not learn, always or for the first part of a run.

So a run can have stages: first the vision encoder and the projector learn to speak to a language model that stays as it
is, then all of it learns together, as Llama 4's report of its training has it in outline.
"""

import fnmatch
from dataclasses import dataclass

import jax
from flax import nnx


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Some parameters, for some time. Raises ValueError for no parameters, or no time."""

    paths: tuple[str, ...]  # names by the model's attributes, or patterns: vision, decoder.*, *.router.*
    until: int | None = None  # how many updates leave them as they are; None: all

    def __post_init__(self):
        if not self.paths:
            raise ValueError("freeze.paths is empty: name the parameters that should stay as they are.")
        if self.until is not None and self.until < 1:
            raise ValueError(f"freeze.until must be at least 1 update, or None for all, got {self.until}.")


def frozen_at(freeze: tuple[FreezeConfig, ...], step: int, params: nnx.State) -> frozenset[str]:
    """Names of the parameters that the update after `step` others leaves alone.

    Raises ValueError for a pattern that fits no parameter, and if nothing is left to learn.
    """
    names = list(parameter_names(params))
    frozen = set()
    for rule in freeze:
        for pattern in rule.paths:
            found = fnmatch.filter(names, pattern) or fnmatch.filter(names, f"{pattern}.*")
            if not found:
                parts = sorted({name.split(".")[0] for name in names})
                raise ValueError(
                    f"freeze.paths: {pattern!r} fits no parameter. The model's parts are {', '.join(parts)}; "
                    f"decoder.* is all of the decoder."
                )
            if rule.until is None or step < rule.until:
                frozen.update(found)
    if len(frozen) == len(names):
        raise ValueError(f"freeze: no parameter is left to learn at step {step}.")
    return frozenset(frozen)


def changes(freeze: tuple[FreezeConfig, ...]) -> list[int]:
    """The steps at which other parameters begin to learn, the first step included, in order."""
    return sorted({0, *(rule.until for rule in freeze if rule.until is not None)})


def parameter_names(params: nnx.State) -> dict[str, nnx.Variable]:
    """Variables by their attributes' names, joined with dots."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_variable)
    return {_name(path): variable for path, variable in flat}


def without_gradient(params: nnx.State, frozen: frozenset[str]) -> nnx.State:
    """The same parameters; nothing is computed for the gradients of those that are frozen, which are zero."""

    def stop(path, variable):
        return jax.tree.map(jax.lax.stop_gradient, variable) if _name(path) in frozen else variable

    return jax.tree_util.tree_map_with_path(stop, params, is_leaf=_is_variable)


def restored(new, old, frozen: frozenset[str]):
    """`new` with what belongs to frozen parameters as in `old`: themselves, or what an optimizer keeps of each."""

    def choose(path, new, old):
        name = _name(path)
        return old if any(name == one or name.endswith(f".{one}") for one in frozen) else new

    return jax.tree_util.tree_map_with_path(choose, new, old, is_leaf=_is_variable) if frozen else new


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")

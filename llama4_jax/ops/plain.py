"""Operations whose gradient is written out, and plain JAX in their place where one derivative is not enough.

A gradient that is written out (`jax.custom_vjp`) saves memory and time, and takes away forward-mode differentiation:
JAX can then compute neither `jax.jvp` nor a Hessian. Within `plain()` every operation is its formula instead, which JAX
differentiates as often as it is asked to, forwards and backwards.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax

from llama4_jax.sharding import all_parts, gathered

_plain: ContextVar[bool] = ContextVar("plain", default=False)

ADVICE = (
    "the fast operations have a gradient of their own, which can be taken once and in reverse mode only. For jax.jvp, "
    'jax.hessian or Hessian-vector products make the model with Llama4(..., attention="reference", '
    'experts="reference") (from_pretrained takes them too), and compute the whole loss within '
    "`with llama4_jax.ops.plain():` if it calls llama4_jax.ops itself."
)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, operations are their formulas in plain JAX, differentiable any number of times in either mode.

    It acts where a function is traced, not where it runs: a `jax.jit` that was compiled outside of it stays as it is.
    Attention and experts are then their "reference" implementations, which are slow and need memory for all scores and
    all experts. Not for products in 8-bit floats, nor under `jax.set_mesh`: what moves between devices has a gradient
    of its own.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    return _plain.get()


class OwnGradient:
    """`jax.custom_vjp`, but for within `plain()`, where it is the function itself."""

    def __init__(self, formula: Callable, nondiff_argnums: tuple[int, ...] = ()):
        functools.update_wrapper(self, formula)
        self._formula = formula
        self._fast = jax.custom_vjp(formula, nondiff_argnums)

    def defvjp(self, forward: Callable, backward: Callable) -> None:
        self._fast.defvjp(forward, backward)

    def __call__(self, *args):
        if _plain.get():
            return self._formula(*args)
        with explained():
            return self._fast(*args)


def own_gradient(formula: Callable | None = None, *, nondiff_argnums: tuple[int, ...] = ()):
    """Decorates a function whose `defvjp` then says how its gradient is computed."""
    if formula is None:
        return functools.partial(OwnGradient, nondiff_argnums=nondiff_argnums)
    return OwnGradient(formula)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """JAX's error for forward-mode differentiation, with what to do. (One that is raised later, when a `jax.jit` around
    the derivative is compiled, is JAX's own.)"""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error) or ADVICE in str(error):
            raise
        raise TypeError(f"{str(error).rstrip('.')}: {ADVICE}") from error


def gathered_for_use(w: jax.Array, dtype, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """`sharding.gathered`, in plain JAX where that is asked for."""
    return all_parts(w.astype(dtype), axes, dimension) if _plain.get() else gathered(w, dtype, axes, dimension)

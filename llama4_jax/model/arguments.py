"""What callers give a model, checked before anything is computed: token arrays and what stands beside them, seeds."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key


def check_tokens(tokens: Any, vocab_size: int) -> None:
    """Raises ValueError unless `tokens` is an integer array [B, T] of ids in [0, vocab_size). The values are looked at
    where they are known: not while a function is traced, and not where other processes hold a part of them."""
    _check_integers("tokens", tokens)
    if tokens.ndim != 2:
        hint = " For one sequence: tokens[None]." if tokens.ndim == 1 else ""
        raise ValueError(f"tokens must be int32 [B, T], rows of ids, got the shape {list(tokens.shape)}.{hint}")
    if not tokens.size or isinstance(tokens, jax.core.Tracer):
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    known = np.asarray(tokens)  # numpy's, since JAX's of a constant would be traced with the function around it
    least, most = int(known.min()), int(known.max())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"tokens has the id {least if least < 0 else most}, but the model's vocabulary has the ids 0 to "
            f"{vocab_size - 1}. Is the tokenizer this model's own? (tokens are int32 [B, T]; padding has segment 0.)"
        )


def check_beside(tokens, positions, segment_ids, images) -> None:
    """Raises ValueError unless these are None, or fit the tokens [B, T]."""
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is None:
            continue
        _check_integers(name, array)
        if array.shape != tokens.shape:
            raise ValueError(
                f"{name} must be int32 [B, T] as tokens is, {list(tokens.shape)}, got the shape {list(array.shape)}."
            )
    if images is None:
        return
    known = hasattr(images, "dtype") and hasattr(images, "ndim")
    if not known or not (images.dtype == jnp.uint8 or jnp.issubdtype(images.dtype, jnp.floating)):
        got = images.dtype if known else f"a {type(images).__name__}"
        raise ValueError(f"images must be tiles [B, tiles, S, S, 3], uint8 or floats from -1 to 1, got {got}.")
    if images.ndim != 5 or images.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"images must be [B, tiles, S, S, 3] with a row for each of the {tokens.shape[0]} rows of tokens, got the "
            f"shape {list(images.shape)}."
        )


def _check_integers(name: str, array: Any) -> None:
    if not (hasattr(array, "dtype") and hasattr(array, "shape")):
        raise ValueError(
            f"{name} must be an array, int32 [B, T], got a {type(array).__name__}: "
            f"jnp.asarray({name}, jnp.int32) makes one of rows of equal length."
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, int32 [B, T], got {array.dtype} {list(array.shape)}.")


def random_key(seed: Any) -> Key[Array, ""]:
    """The key of a seed: an integer of Python, numpy or JAX (traced too, so that `jax.vmap` over seeds works), or a
    key, `jax.random.key` or `jax.random.PRNGKey`. Raises ValueError for anything else."""
    if isinstance(seed, jax.Array | np.ndarray | np.generic):
        if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and seed.shape == ():
            return seed
        if jnp.issubdtype(seed.dtype, jnp.integer) and seed.shape == ():
            return jax.random.key(seed)
        if seed.dtype == jnp.uint32 and seed.shape == jax.random.PRNGKey(0).shape:
            return jax.random.wrap_key_data(seed)
        raise ValueError(
            f"seed must be one integer or one key, got {seed.dtype} of the shape {list(seed.shape)}. For a model for "
            f"each of several seeds: jax.vmap(lambda seed: Llama4(config, seed=seed))(seeds)."
        )
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ValueError(f"seed must be an integer or a key of jax.random, got {seed!r:.60}.")
    try:
        return jax.random.key(operator.index(seed))
    except OverflowError:
        raise ValueError(f"seed must fit into 64 bits, got {seed}.") from None

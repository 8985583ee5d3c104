"""Drawing tokens, and the numbers that say how. `rows` applies temperature, top-k and top-p, in that order, as
transformers does.

Neither filter sorts the vocabulary: both keep the tokens at or above some logit, and a search over the 32 bits of a
float32 finds that logit exactly. (Sorting 202 048 logits takes longer than the rest of a small model's step.) Tokens
that tie with the last one kept are kept.
"""

import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

# Below it a temperature is 0: logits, divided by it, could leave float32, and no two of a model's are so near that the
# draw would be another one.
LEAST_TEMPERATURE = 1e-30
MOST_ROWS = 4096  # of one call of `generate` by the command line: all have their cache at the same time


def check_sampling(
    *,
    max_new_tokens: Any = 1,
    temperature: Any = 0.0,
    top_p: Any = 1.0,
    top_k: Any = None,
    seed: Any = 0,
) -> None:
    """Raises ValueError, naming the argument, for one that `generate` would refuse; asks for no device.

    Whole numbers are ints of any kind, numpy's and JAX's too, and no bools; numbers are those and floats.
    """
    check_whole("max_new_tokens", max_new_tokens, 1)
    if not 0 <= check_whole("seed", seed, -1 << 62, 1 << 62) < 1 << 31:
        raise ValueError(f"seed must be from 0 to {(1 << 31) - 1}, got {seed}.")
    value = _number("temperature", temperature)
    if not 0 <= value <= float(np.finfo(np.float32).max):
        raise ValueError(f"temperature must be 0 (the most likely token) or a positive number, got {_shown(value)}.")
    value = _number("top_p", top_p)
    if not 0 < value <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (every token), got {_shown(value)}.")
    if top_k is not None:
        check_whole("top_k", top_k, 1, hint=", or None to consider every token")


def check_whole(name: str, value: Any, least: int, most: int = 2**31 - 1, *, hint: str = "") -> int:
    """The whole number, as an int. Raises ValueError, naming it, for anything else and outside of the range."""
    number = _number(name, value)
    if not isinstance(number, int):
        raise ValueError(f"{name} must be a whole number{hint}, got {number}.")
    if number < least:
        raise ValueError(f"{name} must be at least {least}{hint}, got {_shown(number)}.")
    if number > most:
        raise ValueError(f"{name} must be below {most + 1}, got {_shown(number)}.")
    return number


def _number(name: str, value: Any) -> int | float:
    """As one of Python's numbers; those of numpy and of JAX are taken too. Raises ValueError, naming it, for others."""
    if not isinstance(value, bool | np.bool_ | str | bytes):
        try:
            return operator.index(value)
        except TypeError:
            pass
        if isinstance(value, numbers.Real) or getattr(value, "shape", None) == ():
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                pass
    raise ValueError(f"{name} must be a number, got {_shown(value)}.")


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:
        return "one of more than 30 digits"
    return f"{value!r:.60}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"


_BLOCK = 512  # near the square root of a large vocabulary


def draw(probabilities: Float[Array, "B V"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """The token at which each row's running sum of probabilities reaches u, of (0, 1]. Never one of probability zero.

    One uniform number a row, where the usual Gumbel noise takes one for each token of the vocabulary, and thirteen
    times as long. The sum runs over blocks first, then within the one block it is reached in.
    """
    blocks = jnp.pad(probabilities, ((0, 0), (0, -probabilities.shape[1] % _BLOCK)))
    blocks = blocks.reshape(blocks.shape[0], -1, _BLOCK)
    totals = jnp.sum(blocks, axis=-1)
    through = jnp.cumsum(totals, axis=-1)  # the end of each block
    target = (u * through[:, -1])[:, None]
    block = _first_to_reach(target, through, totals)
    before = jnp.take_along_axis(through - totals, block, axis=1)
    chosen = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    within = _first_to_reach(target - before, jnp.cumsum(chosen, axis=-1), chosen)
    return (block * _BLOCK + within)[:, 0]


def _first_to_reach(
    target: Float[Array, "B 1"], running_sum: Float[Array, "B n"], weights: Float[Array, "B n"]
) -> Int[Array, "B 1"]:
    """The first with any weight to reach the target; the heaviest if rounding lets none."""
    reached = (running_sum >= target) & (weights > 0)
    index = jnp.where(jnp.any(reached, axis=-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1))
    return index.astype(jnp.int32)[:, None]


def fewest(
    values: Float[Array, "B V"],
    weights: Float[Array, "B V"],
    target: Float[Array, ""] | Int[Array, ""] | Float[Array, "B 1"] | Int[Array, "B 1"],
) -> Bool[Array, "B V"]:
    """The largest values of each row, as few as weigh `target` together; all of them if they weigh less."""
    ordered = _ordered_bits(values)

    def decide(i, threshold):
        raised = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        weight = jnp.sum(jnp.where(ordered >= raised, weights, 0), axis=-1, keepdims=True)
        return jnp.where(weight >= target, raised, threshold)

    # From the highest bit to the lowest: the greatest threshold above which there is weight enough.
    threshold = jax.lax.fori_loop(0, 32, decide, jnp.zeros((values.shape[0], 1), jnp.uint32))
    return ordered >= threshold


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of the float32s: IEEE 754 orders positive numbers so, and negative ones
    backwards."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

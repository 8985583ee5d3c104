"""Continuing prompts: prefill, then decode, a batch at a time.

Two compiled functions do all the work, pure in the model's state and with the cache donated:

- `_prefill` reads a piece of every row's prompt into the cache and draws each row's first token
- `_decode` runs up to `TOKENS_PER_CALL` tokens in one loop on the device, since starting a computation costs as much
  as a small model's step

Pictures are encoded before them, some tiles at a time (`_encode`).

Shapes are rounded up to a few sizes, so that calls with other prompts, lengths, seeds or temperatures compile nothing.
Rows of unequal length are padded on the right; padding is written to no cache and routed to no expert, so each row
gets what it would get alone.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from llama4_jax.infer.sampling import Sampling, check_sampling, make_sampling, row_keys, sample
from llama4_jax.model.cache import Cache
from llama4_jax.model.config import ModelConfig, VisionConfig
from llama4_jax.model.llama4 import Images, Llama4
from llama4_jax.sharding import SERVING, constrain, use_rules

_PIECE = 512  # tokens of each prompt read at once: bounds the memory of a long prompt
_TILES = 8  # encoded at once: as many tokens of the encoder as a piece of a prompt has, and more
TOKENS_PER_CALL = 32
_SECONDS_BETWEEN_REPORTS = 0.1  # to `on_tokens`, about
_NOTHING = -1  # in place of a token, in a row that has stopped

LogitsProcessor = Callable[[Float[Array, "B V"], Int[Array, "B S"], Int[Array, " B"]], Float[Array, "B V"]]
Tiles = UInt8[np.ndarray, "_ S S c"] | Float[np.ndarray, "_ S S c"]


class Past(NamedTuple):
    """The tokens of each row so far, for a `LogitsProcessor`."""

    tokens: Int[Array, "B S"]  # -1 after the last
    lengths: Int[Array, " B"]

    def extended(self, token: Int[Array, " B"], real: Bool[Array, " B"]) -> "Past":
        """By one more token in the rows where it is real."""
        at = jnp.arange(self.tokens.shape[1]) == jnp.asarray(self.lengths)[:, None]
        tokens = jnp.where(at & real[:, None], token[:, None], self.tokens)
        return Past(tokens, self.lengths + real.astype(jnp.int32))


def generate(
    model: Llama4,
    prompts: Sequence[Sequence[int]],
    *,
    images: Sequence[Tiles | None] | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_ids: Iterable[int] = (),
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    cache: str = "float",
    logits_processor: LogitsProcessor | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the prompt. A row ends with the stop id that ended it, if one did.

    - prompts: token ids; rows may differ in length
    - images: of each prompt the tiles of its pictures, for its `<|patch|>` tokens in order; None where it has none
    - max_new_tokens: of each row, at most
    - temperature: 0 takes the most likely token; otherwise tokens are drawn, the more freely the higher
    - top_k, top_p: draw only among the top_k most likely tokens; among the fewest whose probabilities sum to top_p
    - seed: with temperature above 0. Row i draws the same numbers whatever the other rows are
    - on_tokens: is called every 0.1 s or so with the tokens that each row gained since; with empty lists for rows
      that have stopped
    - cache: of keys and values: "float", in the dtype of computation, or "int8", of half the size of bfloat16's
    - logits_processor: changes the logits before a token is chosen from them: a function (logits float32 [B, V], tokens
      int32 [B, S], lengths int32 [B]) → logits [B, V]. The first lengths[b] of tokens[b] are the row so far, prompt and
      reply; the rest is -1, and S does not change. It is traced into the compiled step, so it must be pure, made of
      jax.numpy, and what it reads from outside is a constant. A function that is not the same object as before is
      compiled anew, so define it once and not as a lambda in each call. A row whose logits are all -inf draws any token

    Works on a mesh: under `jax.set_mesh`, or with parameters placed on one. A model with scanned layers is unstacked
    for each call, which copies it: `model.unscanned()` once is better for many.

    Raises ValueError, before anything is computed, for an empty prompt, a token id outside the vocabulary, a prompt
    that leaves no room for max_new_tokens in the context, sampling arguments out of range, and pictures that do not
    fit the prompts.
    """
    how = make_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_cache(cache)
    stop_ids = sorted(set(stop_ids))
    longest = _check(model.config, prompts, max_new_tokens, stop_ids, seed)
    images = check_images(model.config.vision, prompts, [None] * len(prompts) if images is None else images)
    if not prompts:
        return []

    graphdef, state = nnx.split(model.unscanned())
    slots = min(_rounded(longest + max_new_tokens, 64), model.config.context_length)
    features = _encode_all(graphdef, state, images)
    past = None if logits_processor is None else _past(prompts, slots)
    change = {"processor": logits_processor}
    filled, token, past = _read_prompts(graphdef, state, prompts, features, slots, how, seed, cache, past, **change)
    stops = np.array(stop_ids, np.int32)

    results: list[list[int]] = [[] for _ in prompts]

    def collect(new: Int[np.ndarray, "B n"]) -> None:
        gained = [[int(t) for t in row if t != _NOTHING] for row in new]
        for result, tokens in zip(results, gained, strict=True):
            result += tokens
        if on_tokens is not None:
            on_tokens(gained)

    collect(token[:, None])
    stopped = np.isin(token, stops)
    drawn, limit = 1, TOKENS_PER_CALL if on_tokens is None else 1
    while drawn < max_new_tokens and not np.all(stopped):
        limit = min(limit, max_new_tokens - drawn)
        started = time.perf_counter()
        filled, past, *small = _decode(
            graphdef, state, filled, token, stopped, drawn, limit, how, seed, stops, past, **change
        )
        token, stopped, new = jax.device_get(small)
        collect(new[:, :limit])
        drawn += limit
        if on_tokens is not None:
            per_token = (time.perf_counter() - started) / limit
            limit = int(np.clip(_SECONDS_BETWEEN_REPORTS / per_token, 1, TOKENS_PER_CALL))
    return results


CACHES = {"float": None, "int8": "int8"}  # their dtypes; None: that of computation


def check_cache(cache: str) -> None:
    """Raises ValueError for a cache that `generate` does not have."""
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}.")


def _check(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: list[int], seed: int
) -> int:
    """Raises ValueError for what cannot be generated. Returns the length of the longest prompt."""
    check_sampling(max_new_tokens=max_new_tokens, seed=seed)
    for token in stop_ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"stop_ids has {token}, but the model's vocabulary has the ids 0 to {config.vocab_size - 1}."
            )
    for row, prompt in enumerate(prompts):
        check_prompt(prompt, config.vocab_size, f"prompts[{row}]")
        if len(prompt) + max_new_tokens > config.context_length:
            raise ValueError(
                f"prompts[{row}] has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} exceeds the "
                f"model's context_length of {config.context_length}. Shorten the prompt or ask for fewer tokens."
            )
    return max((len(prompt) for prompt in prompts), default=0)


def check_prompt(prompt: Sequence[int], vocab_size: int, name: str = "the prompt") -> None:
    """Raises ValueError for a prompt without tokens, and for ids outside of the vocabulary."""
    if not len(prompt):
        raise ValueError(f"{name} is empty: give at least one token, such as the begin-of-text token.")
    for index, token in enumerate(prompt):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name}[{index}] is the token id {token}, but the model's vocabulary has {vocab_size} ids, 0 to "
                f"{vocab_size - 1}. Is the tokenizer this model's own?"
            )


def check_images(
    vision: VisionConfig | None, prompts: Sequence[Sequence[int]], images: Sequence[Tiles | None]
) -> list[Tiles]:
    """The tiles of each prompt. Raises ValueError unless they are exactly those that its `<|patch|>` tokens need."""
    if len(images) != len(prompts):
        raise ValueError(f"images has {len(images)} entries for {len(prompts)} prompts: give one for each, or None.")
    if vision is None:
        if any(tiles is not None and len(tiles) for tiles in images):
            raise ValueError("images were given, but this model has no vision encoder: it reads text alone.")
        return []
    size = (vision.image_size, vision.image_size, vision.num_channels)
    checked = [np.zeros((0, *size), np.uint8) if tiles is None else np.asarray(tiles) for tiles in images]
    for row, (prompt, tiles) in enumerate(zip(prompts, checked, strict=True)):
        if tiles.shape[1:] != size:
            raise ValueError(f"images[{row}] must be tiles of {list(size)}, got {list(tiles.shape[1:])}.")
        places, given = sum(token == vision.patch_token_id for token in prompt), len(tiles) * vision.tokens_per_tile
        if places != given:
            raise ValueError(
                f"prompts[{row}] has {places} <|patch|> tokens, but the {len(tiles)} tiles of images[{row}] have "
                f"features for {given}: give each picture's tiles, and its tokens, once (llama4_jax.Processor does)."
            )
    return checked


def _encode_all(graphdef, state, images: list[Tiles]) -> Float[Array, "patches D"] | None:
    """The features of all rows' tiles, one row after another, and then perhaps of padding; None if there are none."""
    tiles = np.concatenate(images) if images else ()
    if not len(tiles):
        return None
    features = []
    for start in range(0, len(tiles), _TILES):
        piece = tiles[start : start + _TILES]
        padding = np.zeros((_rounded(len(piece), 1) - len(piece), *piece.shape[1:]), piece.dtype)
        features.append(_encode(graphdef, state, np.concatenate([piece, padding])[None])[0])
    return jnp.concatenate(features)


def _read_prompts(
    graphdef,
    state,
    prompts: Sequence[Sequence[int]],
    features: Float[Array, "patches D"] | None,
    slots: int,
    how: Sampling,
    seed: int,
    kind: str,
    past: Past | None,
    processor: LogitsProcessor | None,
) -> tuple[Cache, Int[np.ndarray, " B"], Past | None]:
    """The cache of this kind that holds all prompts, the first new token of each row, and the past with it."""
    rows = len(prompts)
    cache = _empty_cache(graphdef, state, rows, slots, CACHES[kind])
    token = np.zeros((rows,), np.int32)
    numbers = _feature_numbers(graphdef, state, prompts) if features is not None else prompts
    longest = max(len(prompt) for prompt in prompts)
    for start in range(0, longest, _PIECE):
        piece = np.zeros((rows, _rounded(min(longest - start, _PIECE), 16)), np.int32)
        index = np.zeros_like(piece)
        counts = np.zeros((rows,), np.int32)
        for row, prompt in enumerate(prompts):
            tokens = prompt[start : start + _PIECE]
            piece[row, : len(tokens)], counts[row] = tokens, len(tokens)
            index[row, : len(tokens)] = numbers[row][start : start + _PIECE]
        in_place = None if features is None else features[index]
        cache, first = _prefill(graphdef, state, cache, piece, counts, in_place, how, seed, past, processor=processor)
        token = np.where(counts > 0, first, token)  # the prompts that end here, and those that go on
    return cache, token, None if past is None else past.extended(token, np.ones(rows, bool))


def _feature_numbers(graphdef, state, prompts: Sequence[Sequence[int]]) -> list[Int[np.ndarray, " T"]]:
    """For each token of each prompt which of all features is its own, if it is a `<|patch|>`; else any number."""
    patch_id = nnx.merge(graphdef, state).config.vision.patch_token_id
    is_patch = np.concatenate([np.asarray(prompt) == patch_id for prompt in prompts])
    numbers = np.maximum(np.cumsum(is_patch) - 1, 0)
    return np.split(numbers, np.cumsum([len(prompt) for prompt in prompts])[:-1])


def _rounded(length: int, least: int) -> int:
    """The next power of two."""
    return max(least, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("graphdef", "rows", "slots", "dtype"))
@use_rules(SERVING)
def _empty_cache(graphdef, state, rows: int, slots: int, dtype: str | None) -> Cache:
    return nnx.merge(graphdef, state).empty_cache(rows, slots, dtype)


@functools.partial(jax.jit, static_argnames="graphdef")
@use_rules(SERVING)
def _encode(graphdef, state, tiles: Images) -> Float[Array, "1 patches D"]:
    return nnx.merge(graphdef, state).encode_images(tiles)


def _past(prompts: Sequence[Sequence[int]], slots: int) -> Past:
    tokens = np.full((len(prompts), slots), _NOTHING, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return Past(jnp.asarray(tokens), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32))


def _processed(
    logits: Float[Array, "B V"], past: Past | None, processor: LogitsProcessor | None
) -> Float[Array, "B V"]:
    if processor is None:
        return logits
    changed = processor(logits, *past)
    shape, dtype = getattr(changed, "shape", None), getattr(changed, "dtype", None)
    if shape != logits.shape or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"logits_processor must return floats of the shape {list(logits.shape)}, [B, V], as it got; it returned "
            f"{type(changed).__name__ if shape is None else f'{dtype} {list(shape)}'}."
        )
    return changed.astype(logits.dtype)


@functools.partial(jax.jit, static_argnames=("graphdef", "processor"), donate_argnames="cache")
@use_rules(SERVING)
def _prefill(
    graphdef,
    state,
    cache: Cache,
    piece: Int[Array, "B T"],
    counts: Int[Array, " B"],
    features: Float[Array, "B T D"] | None,
    how: Sampling,
    seed: Int[Array, ""],
    past: Past | None,
    *,
    processor: LogitsProcessor | None,
) -> tuple[Cache, Int[Array, " B"]]:
    """Reads the first counts[b] tokens of each row of `piece`, and draws what follows the last of them."""
    model = nnx.merge(graphdef, state)
    hidden, cache = model.step(piece, cache, counts, features)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = model.logits(jnp.take_along_axis(hidden, last, axis=1))[:, 0]
    logits = _processed(logits, past, processor)
    return cache, constrain(sample(logits, how, row_keys(seed, len(counts)), 0), None)


@functools.partial(jax.jit, static_argnames=("graphdef", "processor"), donate_argnames="cache")
@use_rules(SERVING)
def _decode(
    graphdef,
    state,
    cache: Cache,
    token: Int[Array, " B"],
    stopped: Bool[Array, " B"],
    drawn: Int[Array, ""],
    limit: Int[Array, ""],
    how: Sampling,
    seed: Int[Array, ""],
    stop_ids: Int[Array, " stops"],
    past: Past | None,
    *,
    processor: LogitsProcessor | None,
) -> tuple[Cache, Past | None, Int[Array, " B"], Bool[Array, " B"], Int[Array, "B n"]]:
    """`limit` more tokens of each row after its newest, `token`; fewer when all rows have stopped."""
    model = nnx.merge(graphdef, state)
    keys = row_keys(seed, len(token))
    new = jnp.full((len(token), TOKENS_PER_CALL), _NOTHING, jnp.int32)

    def running(carry):
        i, _, _, stopped, _, _ = carry
        return (i < limit) & ~jnp.all(stopped)

    def one(carry):
        i, cache, token, stopped, new, past = carry
        hidden, cache = model.step(token[:, None], cache, (~stopped).astype(jnp.int32))
        logits = _processed(model.logits(hidden)[:, 0], past, processor)
        token = jnp.where(stopped, token, sample(logits, how, keys, drawn + i))
        past = None if past is None else past.extended(token, ~stopped)
        new = jax.lax.dynamic_update_slice(new, jnp.where(stopped, _NOTHING, token)[:, None], (0, i))
        stopped |= jnp.any(token[:, None] == stop_ids, axis=-1)
        return i + 1, cache, token, stopped, new, past

    first = 0, cache, token, stopped, new, past
    _, cache, token, stopped, new, past = jax.lax.while_loop(running, one, first)
    return cache, past, constrain(token, None), constrain(stopped, None), constrain(new, None, None)

"""Continuing prompts that begin together: the engine's slots are the rows of a batch."""

import time
from collections.abc import Callable, Iterable, Sequence

from llama4_jax.infer.checks import Tiles, check_cache, check_images, check_prompt
from llama4_jax.infer.engine_core import EngineCore, rounded
from llama4_jax.infer.logits_processor import LogitsProcessor
from llama4_jax.infer.rows import STOPS
from llama4_jax.infer.sampling import check_sampling
from llama4_jax.model.config import ModelConfig
from llama4_jax.model.llama4 import Llama4

PIECE = 512  # tokens of each prompt read at once: bounds the memory of a long prompt
_SIZES = (16, 32, 64, 128, 256)  # of what is left of a prompt
_SECONDS_BETWEEN_REPORTS = 0.1  # to `on_tokens`, about


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
    check_cache(cache)
    stop_ids = sorted(set(stop_ids))
    longest = _check(
        model.config, prompts, stop_ids,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
    )  # fmt: skip
    images = check_images(model.config.vision, prompts, [None] * len(prompts) if images is None else images)
    if not prompts:
        return []
    core = EngineCore(
        model, slots=len(prompts), context=min(rounded(longest + max_new_tokens, 64), model.config.context_length),
        cache=cache, piece=PIECE, sizes=_SIZES, together=True, plain=True, most_stops=max(STOPS, len(stop_ids)),
        logits_processor=logits_processor,
    )  # fmt: skip
    handles = [
        core.submit(
            prompt, tiles=tiles, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            seed=seed, stream=row, stop_ids=stop_ids,
        )
        for row, (prompt, tiles) in enumerate(zip(prompts, images or [None] * len(prompts), strict=True))
    ]  # fmt: skip
    replies: list[list[int]] = [[] for _ in prompts]
    told: float | None = None

    def tell() -> None:
        nonlocal told
        gained = [
            [one.id for one in handle.so_far()[len(reply) :]] for handle, reply in zip(handles, replies, strict=True)
        ]
        if not any(gained):
            return
        for reply, new in zip(replies, gained, strict=True):
            reply += new
        told = time.perf_counter()
        if on_tokens is not None:
            on_tokens(gained)

    with core.placed():
        while core.turn():
            due = told is None or time.perf_counter() - told >= _SECONDS_BETWEEN_REPORTS
            if on_tokens is not None and due:
                tell()
    tell()
    return replies


def _check(
    config: ModelConfig, prompts: Sequence[Sequence[int]], stop_ids: list[int], *, max_new_tokens: int, **sampling
) -> int:
    """Raises ValueError for what cannot be generated. Returns the length of the longest prompt."""
    check_sampling(max_new_tokens=max_new_tokens, **sampling)
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

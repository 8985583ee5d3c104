"""What can be generated: prompts, pictures and settings that are refused before anything is computed."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from llama4_jax.model.config import VisionConfig

Tiles = UInt8[np.ndarray, "_ S S c"] | Float[np.ndarray, "_ S S c"]

CACHES = {"float": None, "int8": "int8"}  # their dtypes; None: that of computation


def check_cache(cache: str) -> None:
    """Raises ValueError for a kind of cache that there is not."""
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}.")


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

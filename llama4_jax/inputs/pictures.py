"""The pictures of a prompt or a document: opened, cut into tiles, and put where they stand."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from llama4_jax.inputs.image import ImageConfig, picture_tokens, tile_picture
from llama4_jax.inputs.messages import Picture
from llama4_jax.inputs.picture_files import Source, open_picture
from llama4_jax.inputs.tokenizer import Tokenizer

IMAGE = "<|image|>"  # the place of a picture, where a text may mark it


class CutPictures(NamedTuple):
    """The ids that stand for each picture, and the tiles of all, in order."""

    tokens: list[list[int]]
    tiles: UInt8[np.ndarray, "tiles S S 3"] | None


def cut_pictures(sources: Sequence[tuple[Any, str]], config: ImageConfig | None, tokenizer: Tokenizer) -> CutPictures:
    """Opens and cuts pictures, each given with what errors call it.

    Raises ValueError for a picture without a `config` (the model reads text alone), for what is no source of one, and
    as `open_picture`.
    """
    if not sources:
        return CutPictures([], None)
    if config is None:
        raise ValueError(f"{sources[0][1]}: a picture was given, but this model reads text alone.")
    tokens, tiles = [], []
    for source, where in sources:
        if not isinstance(source, Source):
            raise ValueError(f"{where} should be a path, bytes, a PIL image or an array, and is {source!r:.60}.")
        cut = tile_picture(open_picture(source, name=where), config)
        tokens.append(picture_tokens(cut.rows, cut.cols, config.tokens_per_tile, tokenizer.special_tokens))
        tiles.append(cut.pixels)
    return CutPictures(tokens, np.concatenate(tiles))


def encode_illustrated(
    content: Sequence[str | Picture], pictures: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> list[int]:
    """The ids of texts and pictures in their order, after begin_of_text; `pictures` has those of each picture."""
    rest, ids = iter(pictures), [tokenizer.bos_id]
    for part in content:
        ids += next(rest) if isinstance(part, Picture) else tokenizer.encode(part)
    return ids

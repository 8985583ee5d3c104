"""A picture as the model sees it: tiles of pixels, and the tokens that stand for them.

The picture is resized, its shape kept, to fit the best of the canvases of up to 16 tiles; padded with black to the
right and below; and cut into tiles. With more than one tile, the whole picture squeezed into one more tile comes last.
Nothing is ever cropped. A tile becomes 144 `<|patch|>` tokens.

Numpy and Pillow alone, and every pixel that of Meta's own code, which resizes with Pillow too. Sources:
`llama4/preprocess.py` and `llama4/chat_format.py` of llama-models 0.3.0; `image_processing_llama4.py` and
`processing_llama4.py` of transformers 5.23. Canvas and tokens are the same in both, always. Hugging Face's code resizes
with torchvision and rounds to bfloat16, so its pixels are these within a step of 1/255 and that rounding. It also
computes the resized size in float32, so that one side may be a pixel shorter or longer where the exact size is a whole
number: 1200×1600 becomes 1007×1344 there, and 1008×1344 here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from llama4_jax.untrusted_json import shown

MOST_TILES = 256  # of a picture, for which all canvases of so many are looked at


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How pictures become tiles. The defaults are Scout's and Maverick's.

    - tile_size: S, the side of a tile in pixels
    - max_tiles: the most tiles of a canvas; the global tile comes on top
    - tokens_per_tile: patches of a tile after pixel shuffle: (336 / 14)² / 4 = 144
    - resize_to_max_canvas: enlarge small pictures as far as a canvas allows, instead of to one tile at most
    """

    tile_size: int = 336
    max_tiles: int = 16
    tokens_per_tile: int = 144
    resize_to_max_canvas: bool = False

    def __post_init__(self):
        for field, most in zip(fields(self), (2**16, MOST_TILES, 2**24), strict=False):
            value = getattr(self, field.name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(
                    f"image config: {field.name} is {shown(value)}, and should be a whole number from 1 to {most}"
                )


class Tiles(NamedTuple):
    """A picture of rows × cols tiles, row by row; if those are more than one, the global tile is the last."""

    pixels: UInt8[np.ndarray, "tiles S S 3"]
    rows: int
    cols: int


def choose_canvas(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """The canvas for a picture of that many pixels, in tiles: (rows, cols).

    The one on which the picture need not shrink and has the least room to grow; if it must shrink on all, the one on
    which it shrinks least; of several alike, the smallest.
    """
    _check_size(width, height)
    n = config.max_tiles
    rows, cols = np.array([(r, c) for r in range(1, n + 1) for c in range(1, n // r + 1)]).T
    # In float32, as in both references.
    scales = np.minimum(
        np.float32(cols * config.tile_size) / np.float32(width),
        np.float32(rows * config.tile_size) / np.float32(height),
    )
    enough = scales[scales >= 1]
    scale = enough.min() if enough.size and not config.resize_to_max_canvas else scales.max()
    alike = np.flatnonzero(scales == scale)
    smallest = alike[np.argmin((rows * cols)[alike])]
    return int(rows[smallest]), int(cols[smallest])


def resized_size(width: int, height: int, rows: int, cols: int, config: ImageConfig) -> tuple[int, int]:
    """What a picture of that many pixels is resized to before it is put on a canvas: (width, height).

    Its shape is kept, up to rounding down. It grows to the size of one tile at most, if not by `resize_to_max_canvas`.
    """
    _check_size(width, height)
    most_width, most_height = cols * config.tile_size, rows * config.tile_size
    if not config.resize_to_max_canvas:
        most_width = min(max(width, config.tile_size), most_width)
        most_height = min(max(height, config.tile_size), most_height)
    by_width, by_height = most_width / width, most_height / height
    if by_width < by_height:
        return most_width, max(1, min(math.floor(height * by_width), most_height))
    return max(1, min(math.floor(width * by_height), most_width)), most_height


def tile_picture(picture: Image.Image, config: ImageConfig) -> Tiles:
    """The tiles of an RGB picture, as `open_picture` gives it. Raises ValueError for other modes, and no pixels."""
    if picture.mode != "RGB":
        raise ValueError(f"a picture of mode {picture.mode} cannot be tiled: open_picture makes it RGB")
    side = config.tile_size
    rows, cols = choose_canvas(picture.width, picture.height, config)
    canvas = np.zeros((rows * side, cols * side, 3), np.uint8)
    resized = _resize(picture, resized_size(picture.width, picture.height, rows, cols, config))
    canvas[: resized.shape[0], : resized.shape[1]] = resized
    tiles = canvas.reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if rows * cols > 1:
        tiles = np.concatenate([tiles, _resize(picture, (side, side))[None]])
    return Tiles(tiles, rows, cols)


def normalize(pixels: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """0 … 255 to -1 … 1, in the steps and the rounding of Meta's code, so bit for bit."""
    return _NORMALIZED[pixels]


def picture_tokens(rows: int, cols: int, tokens_per_tile: int, special_tokens: Mapping[str, int]) -> list[int]:
    """The ids that stand for a picture of rows × cols tiles; `special_tokens` is the tokenizer's.

    There is one `<|patch|>` for each feature of each tile, in the order of `Tiles`. Raises ValueError if the tokenizer
    lacks a token.
    """
    if min(rows, cols, tokens_per_tile) < 1:
        raise ValueError(
            f"a picture has at least one row, one column and one token a tile, "
            f"and not {rows} rows, {cols} columns and {tokens_per_tile} tokens a tile"
        )
    names = ("image_start", "tile_x_separator", "tile_y_separator", "image", "patch", "image_end")
    missing = [f"<|{name}|>" for name in names if f"<|{name}|>" not in special_tokens]
    if missing:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}, so it cannot express pictures")
    start, next_column, next_row, whole, patch, end = (special_tokens[f"<|{name}|>"] for name in names)
    tile = [patch] * tokens_per_tile
    ids = [start]
    if rows * cols > 1:
        row = [*tile, *[next_column, *tile] * (cols - 1), next_row]
        ids += row * rows
    return [*ids, whole, *tile, end]


_NORMALIZED = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
_NORMALIZED.setflags(write=False)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}×{height} pixels has none")


def _resize(picture: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))  # Pillow's bilinear filter is antialiased

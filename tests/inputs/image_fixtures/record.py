"""Records what both references make of pictures: python tests/inputs/image_fixtures/record.py

Needs torchvision beside the packages whose versions stand in references.json. Its wheels on PyPI are built for CUDA;
beside a CPU's torch they can be imported once two operators are declared, as is done below. Written are:

- references.json: sizes of pictures and what canvas and size they are given; the tokens of every canvas; hashes of
  Meta's normalized pixels
- huggingface.npz: some of Hugging Face's pixels, bfloat16 seen as uint16, and what it makes of the 256 values of a byte
"""

# ruff: noqa: E402 - the operators are declared between the imports

import hashlib
import io
import json
import pathlib
import random
from importlib import metadata
from itertools import groupby, product

import numpy as np
import PIL.Image
import torch
from pictures import MODES, TRANSPARENT, picture

_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from llama_models.datatypes import RawMediaItem
from llama_models.llama4 import chat_format
from llama_models.llama4.args import Size, VisionArgs
from llama_models.llama4.preprocess import F, VariableSizeImageTransform
from llama_models.llama4.tokenizer import Tokenizer
from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
from transformers.models.llama4.processing_llama4 import Llama4Processor

HERE = pathlib.Path(__file__).parent
PACKAGES = ("llama-models", "transformers", "torch", "torchvision", "pillow", "numpy")

# Sides of screens, cameras and papers, and of canvases and one off: the ratios in which roundings go wrong.
SIDES = (
    *(1, 2, 3, 16, 42, 100, 168, 224, 256, 335, 336, 337, 480, 500, 600, 640, 671, 672, 673, 720, 768, 800, 960, 1000),
    *(1008, 1024, 1080, 1200, 1280, 1344, 1440, 1600, 1680, 1920, 2000, 2160, 2400, 2688, 3000, 3024, 3840, 4000, 4032),
)
LONG = [(10_000, 1), (1, 10_000), (100_000, 3), (3, 100_000), (5376, 336), (336, 5376), (5377, 335), (9000, 500)]
# tile_size, max_tiles, resize_to_max_canvas
CONFIGS = [(336, 16, False), (336, 16, True), (336, 4, False), (32, 16, False), (100, 7, True)]


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of SIDES, and as many at random, small as likely as large."""
    rng = random.Random(seed)
    known = rng.sample(list(product(SIDES, SIDES)), count)
    others = [(int(2 ** rng.uniform(0, 12.5)), int(2 ** rng.uniform(0, 12.5))) for _ in range(count)]
    return [*known, *others, *LONG]


def meta_geometry(size: tuple[int, int], tile: int, most: int, to_max: bool) -> list[int]:
    """rows, cols and the resized width and height, of Meta's transform on a picture whose pixels do not matter."""
    seen = []

    def resize(image, height_width, **_):
        seen.append(height_width)
        return PIL.Image.new("RGB", (height_width[1], height_width[0]))

    true_resize, F.resize = F.resize, resize
    try:
        tiles, (rows, cols) = VariableSizeImageTransform(tile)(PIL.Image.new("RGB", size), most, True, to_max)
    finally:
        F.resize = true_resize
    assert len(tiles) == rows * cols
    return [rows, cols, seen[0][1], seen[0][0]]


class Measuring(Llama4ImageProcessor):
    """Resizes to nothing but zeros, and remembers to which sizes."""

    def resize(self, image, size, **_):
        self.seen.append((size.width, size.height))
        return torch.zeros((*image.shape[:-2], size.height, size.width), dtype=torch.uint8)


def hf_geometry(size: tuple[int, int], tile: int, most: int, to_max: bool) -> list[int]:
    """The same of Hugging Face's processor, and the number of its tiles, the global one among them."""
    processor = hf_processor(Measuring, tile, most, to_max)
    processor.seen = []
    image = torch.zeros((1, 1, 1), dtype=torch.uint8).expand(3, size[1], size[0])
    out = processor(image, return_tensors="pt", do_convert_rgb=False, input_data_format="channels_first")
    rows, cols = out["aspect_ratios"].flatten().tolist()
    width, height = processor.seen[0]
    return [rows, cols, int(width), int(height), out["pixel_values"].reshape(-1, 3, tile, tile).shape[0]]


def hf_processor(kind, tile: int, most: int, to_max: bool):
    return kind(size={"height": tile, "width": tile}, max_patches=most, resize_to_max_canvas=to_max)


def geometry() -> list[dict]:
    records = []
    for i, (tile, most, to_max) in enumerate(CONFIGS):
        rows_of_table = []
        for size in sizes(160 if i == 0 else 40, seed=i):
            meta, hf = meta_geometry(size, tile, most, to_max), hf_geometry(size, tile, most, to_max)
            assert meta[:2] == hf[:2], (size, meta, hf)
            rows_of_table.append([*size, *meta, *hf[2:]])
        records.append({"tile_size": tile, "max_tiles": most, "resize_to_max_canvas": to_max, "sizes": rows_of_table})
    return records


def runs(ids: list[int]) -> list[list[int]]:
    return [[i, len(list(same))] for i, same in groupby(ids)]


def tokens() -> list[dict]:
    """Of every canvas of up to 16 tiles: the ids as runs [id, how often]. Stops if the references differ."""
    tokenizer, format_ = meta_chat_format(336, 16)
    records = []
    for rows, cols in [(r, c) for r in range(1, 17) for c in range(1, 16 // r + 1)]:
        count = rows * cols + (rows * cols > 1)
        transformed = chat_format.TransformedImage(torch.zeros(count, 3, 336, 336), (rows, cols))
        meta = format_._encode_image(transformed)
        spelled = Llama4Processor._prompt_split_image(None, (rows, cols), 144)
        hf = [tokenizer.special_tokens[f"<|{name}|>"] for name in spelled[2:-2].split("|><|")]
        assert meta == hf
        records.append({"rows": rows, "cols": cols, "ids": runs(meta)})
    return records


def meta_chat_format(tile: int, most: int):
    tokenizer = Tokenizer.get_instance()
    vision = VisionArgs(
        image_size=Size(height=tile, width=tile), patch_size=Size(height=tile // 2, width=tile // 2), dim=8, n_layers=1,
        n_heads=1, mlp_ratio=4.0, output_dim=8, pixel_shuffle_ratio=0.5,
    ) if tile != 336 else VisionArgs(
        image_size=Size(height=336, width=336), patch_size=Size(height=14, width=14), dim=1408, n_layers=34,
        n_heads=16, mlp_ratio=4.0, output_dim=4096, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    return tokenizer, chat_format.ChatFormat(tokenizer, vision, max_num_chunks=most)


def meta_pixels() -> list[dict]:
    """What Meta's chat format makes of files, tiles and global tile: blake2b of float32 tiles × 3 × S × S."""
    small = [(1, 1), (7, 5), (32, 32), (33, 31), (64, 96), (100, 37), (37, 100), (500, 20), (20, 500), (300, 300)]
    small += [(1000, 1), (1, 1000), (129, 128), (640, 480), (90, 61)]
    large = [(1, 1), (336, 336), (337, 336), (640, 480), (480, 640), (1200, 1600), (1920, 1080), (2000, 300)]
    large += [(3000, 2000), (10_000, 1), (1, 10_000)]
    cases = [(*size, mode, 32) for size in small for mode in MODES] + [(*size, "RGB", 336) for size in large]
    cases += [(700, 500, mode, 336) for mode in MODES]
    records = []
    for width, height, mode, tile in cases:
        file = io.BytesIO()
        picture(width, height, mode).save(file, "TIFF")
        _, images = meta_chat_format(tile, 16)[1]._encode_content([RawMediaItem(data=file.getvalue())])
        tiles = images[0].image_tiles.numpy()
        records.append(
            {
                "width": width, "height": height, "mode": mode, "tile_size": tile, "tiles": len(tiles),
                "hash": hashlib.blake2b(np.ascontiguousarray(tiles).tobytes(), digest_size=12).hexdigest(),
            }
        )  # fmt: skip
    return records


# width, height, mode, tile_size, and every how manieth pixel of tiles is kept
HF_CASES = [
    *((w, h, "RGB", 16, 1) for w, h in [(1, 1), (16, 16), (9, 5), (40, 25), (61, 90), (100, 12), (7, 70), (200, 150)]),
    *((33, 29, mode, 16, 1) for mode in (*MODES[1:], *TRANSPARENT)),
    *((w, h, "RGB", 336, 28) for w, h in [(100, 80), (640, 480), (1920, 1080), (700, 2500)]),
]


def hf_pixels() -> dict[str, np.ndarray]:
    arrays = {}
    for width, height, mode, tile, step in HF_CASES:
        processor = hf_processor(Llama4ImageProcessor, tile, 16, False)
        tiles = processor(picture(width, height, mode), return_tensors="pt")["pixel_values"].reshape(-1, 3, tile, tile)
        kept = tiles[..., ::step, ::step].contiguous()
        assert kept.dtype == torch.bfloat16
        arrays[f"{width}x{height} {mode} {tile} {step}"] = kept.view(torch.uint16).numpy()
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256).expand(3, 1, 256)
    processor = Llama4ImageProcessor()
    normal = processor.rescale_and_normalize(every, True, 1 / 255, True, processor.image_mean, processor.image_std)
    arrays["bytes"] = normal[0, 0].contiguous().view(torch.uint16).numpy()
    return arrays


if __name__ == "__main__":
    recorded = {
        "recorded with": {package: metadata.version(package) for package in PACKAGES},
        "geometry": geometry(),
        "tokens": tokens(),
        "pixels": meta_pixels(),
    }
    text = json.dumps(recorded).replace(', {"', ',\n{"').replace("], [", "],\n[")
    (HERE / "references.json").write_text(text + "\n")
    np.savez_compressed(HERE / "huggingface.npz", **hf_pixels())

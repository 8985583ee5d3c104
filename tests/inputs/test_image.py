"""Tiles and their tokens are those of both references, recorded by tests/inputs/image_fixtures/record.py."""

import hashlib
import json
import pathlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_fixtures.pictures import picture
from PIL import Image

from llama4_jax.inputs.image import (
    ImageConfig,
    choose_canvas,
    normalize,
    picture_tokens,
    resized_size,
    tile_picture,
)
from llama4_jax.inputs.picture_files import open_picture
from llama4_jax.inputs.tokenizer import ByteTokenizer

FIXTURES = pathlib.Path(__file__).parent / "image_fixtures"
RECORDED = json.loads((FIXTURES / "references.json").read_text())
IDS = {"image_start": 200080, "image_end": 200081, "tile_x_separator": 200084, "tile_y_separator": 200085}
IDS = {f"<|{name}|>": i for name, i in (IDS | {"image": 200090, "patch": 200092}).items()}

side = st.one_of(st.integers(1, 4000), st.integers(1, 130).map(lambda n: 32 * n), st.sampled_from([1, 30_000]))


def recorded_sizes():
    for table in RECORDED["geometry"]:
        config = ImageConfig(**{key: table[key] for key in ("tile_size", "max_tiles", "resize_to_max_canvas")})
        for row in table["sizes"]:
            yield config, row


def test_canvas_resized_size_and_number_of_tiles_are_metas_on_hundreds_of_sizes():
    count = 0
    for config, (width, height, rows, cols, new_width, new_height, *_) in recorded_sizes():
        assert choose_canvas(width, height, config) == (rows, cols), (config, width, height)
        assert resized_size(width, height, rows, cols, config) == (new_width, new_height), (config, width, height)
        count += 1
    assert count > 600


def test_hugging_faces_resized_size_is_off_by_one_only_where_the_exact_one_is_whole():
    others = []
    for config, (width, height, rows, cols, new_width, new_height, hf_width, hf_height, tiles) in recorded_sizes():
        assert tiles == rows * cols + (rows * cols > 1)
        if (hf_width, hf_height) != (new_width, new_height):
            others.append((width, height))
            if long := hf_width == new_width:
                exact, ours, theirs = Fraction(height * new_width, width), new_height, hf_height
            else:
                exact, ours, theirs = Fraction(width * new_height, height), new_width, hf_width
            assert exact.denominator == 1, (config, width, height, long)
            assert abs(ours - theirs) == 1
            assert exact in (ours, theirs)
    assert others  # so the two do differ, and not only in theory


@pytest.mark.parametrize("canvas", RECORDED["tokens"], ids=lambda c: f"{c['rows']}x{c['cols']}")
def test_tokens_are_those_of_both_references(canvas):
    ids = picture_tokens(canvas["rows"], canvas["cols"], 144, IDS)
    assert ids == [i for i, count in canvas["ids"] for _ in range(count)]


def test_every_canvas_of_up_to_16_tiles_is_recorded():
    assert {(c["rows"], c["cols"]) for c in RECORDED["tokens"]} == {
        (r, c) for r in range(1, 17) for c in range(1, 17) if r * c <= 16
    }


@pytest.mark.parametrize(
    "case", RECORDED["pixels"], ids=lambda c: f"{c['width']}x{c['height']}-{c['mode']}-{c['tile_size']}"
)
def test_pixels_are_metas_bit_for_bit(case):
    image = picture(case["width"], case["height"], case["mode"])
    tiles = tile_picture(open_picture(image, name="it"), ImageConfig(tile_size=case["tile_size"]))
    assert len(tiles.pixels) == case["tiles"] == tiles.rows * tiles.cols + (tiles.rows * tiles.cols > 1)
    as_meta = np.ascontiguousarray(normalize(tiles.pixels).transpose(0, 3, 1, 2))
    assert hashlib.blake2b(as_meta.tobytes(), digest_size=12).hexdigest() == case["hash"]


HUGGING_FACE = np.load(FIXTURES / "huggingface.npz")


@pytest.mark.parametrize("case", [name for name in HUGGING_FACE.files if name != "bytes"])
def test_pixels_are_hugging_faces_within_one_step_and_its_rounding(case):
    """Its bfloat16 of each byte is recorded: what it gives must be that of our byte, or of one next to it."""
    size, mode, tile, step = case.split()
    width, height = map(int, size.split("x"))
    tiles = tile_picture(open_picture(picture(width, height, mode), name="it"), ImageConfig(tile_size=int(tile)))
    ours = tiles.pixels[:, :: int(step), :: int(step)].transpose(0, 3, 1, 2).astype(int)
    theirs = HUGGING_FACE[case]
    assert ours.shape == theirs.shape
    rounded = HUGGING_FACE["bytes"]
    neighbours = [rounded[np.clip(ours + by, 0, 255)] == theirs for by in (-1, 0, 1)]
    assert np.any(neighbours, axis=0).all()


def test_hugging_faces_rounding_is_of_the_numbers_that_normalize_gives():
    as_float = (HUGGING_FACE["bytes"].astype(np.uint32) << 16).view(np.float32)
    assert np.abs(as_float - normalize(np.arange(256, dtype=np.uint8))).max() < 0.004  # measured 0.0039


def test_normalize_spreads_bytes_over_minus_one_to_one():
    values = normalize(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32 and values[0] == -1 and values[255] == 1
    np.testing.assert_allclose(values, np.linspace(-1, 1, 256), atol=6e-8)
    assert normalize(np.zeros((2, 3, 3, 3), np.uint8)).shape == (2, 3, 3, 3)


@settings(max_examples=100, deadline=None)
@given(side, side, st.integers(1, 16), st.sampled_from([32, 336]), st.booleans())
def test_the_canvas_is_the_one_that_its_description_names(width, height, most, tile, to_max):
    """In exact fractions, so that float32 is seen to change nothing at these sizes."""
    config = ImageConfig(tile_size=tile, max_tiles=most, resize_to_max_canvas=to_max)
    canvases = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]
    scale = {(r, c): min(Fraction(c * tile, width), Fraction(r * tile, height)) for r, c in canvases}
    enough = [s for s in scale.values() if s >= 1]
    best = max(scale.values()) if to_max or not enough else min(enough)
    assert choose_canvas(width, height, config) == min((rc for rc in canvases if scale[rc] == best), key=np.prod)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 8), st.sampled_from([1, 16, 32]), st.booleans())
def test_tiles_put_together_are_the_resized_picture_and_black(width, height, most, tile, to_max):
    config = ImageConfig(tile_size=tile, max_tiles=most, resize_to_max_canvas=to_max)
    image = Image.new("RGB", (width, height), (255, 255, 255))
    pixels, rows, cols = tile_picture(image, config)
    assert rows * cols <= most and pixels.dtype == np.uint8
    assert len(pixels) == (rows * cols + 1 if rows * cols > 1 else 1)
    canvas = np.block([[[pixels[r * cols + c]] for c in range(cols)] for r in range(rows)])
    new_width, new_height = resized_size(width, height, rows, cols, config)
    assert (canvas[:new_height, :new_width] == 255).all()
    assert not canvas[new_height:].any() and not canvas[:, new_width:].any()
    if rows * cols > 1:
        assert (pixels[-1] == 255).all()


@pytest.mark.parametrize("size", [(64, 96), (300, 200), (90, 61)])
def test_every_pixel_of_a_picture_contributes(size):
    """Nothing is cropped: a block of one colour, wherever it is, is seen in the tiles and in the global tile."""
    width, height = size
    config = ImageConfig(tile_size=16)
    blank = tile_picture(Image.new("RGB", size), config)
    assert blank.rows * blank.cols > 1
    for left in range(0, width, 5):
        for above in range(0, height, 5):
            image = Image.new("RGB", size)
            image.paste((255, 255, 255), (left, above, min(left + 5, width), min(above + 5, height)))
            tiles = tile_picture(image, config).pixels
            assert tiles[:-1].any() and tiles[-1].any(), (left, above)


@pytest.mark.parametrize("size", [(1920, 1080), (3024, 4032)])
def test_the_corners_of_a_photo_are_the_corners_of_its_canvas(size):
    image = Image.new("RGB", size)
    block = min(size) // 8
    width, height = size
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    for colour, (x, y) in zip(
        colours, [(0, 0), (width - block, 0), (0, height - block), (width - block, height - block)], strict=True
    ):
        image.paste(colour, (x, y, x + block, y + block))
    config = ImageConfig()
    pixels, rows, cols = tile_picture(image, config)
    canvas = pixels[:-1].reshape(rows, cols, 336, 336, 3).swapaxes(1, 2).reshape(rows * 336, cols * 336, 3)
    new_width, new_height = resized_size(width, height, rows, cols, config)
    for y, x, colour in zip(
        (0, 0, new_height - 1, new_height - 1), (0, new_width - 1, 0, new_width - 1), colours, strict=True
    ):
        assert tuple(canvas[y, x]) == colour
        corner = pixels[-1][335 if y else 0, 335 if x else 0]
        assert tuple(corner) == colour
    assert min(new_width / width, new_height / height) > 0.3  # no canvas so small that the photo is lost


@pytest.mark.parametrize("size", [(1, 1), (10_000, 1), (1, 10_000)])
def test_pictures_of_one_row_or_column_work(size):
    image = Image.new("RGB", size, (10, 200, 30))
    pixels, rows, cols = tile_picture(image, ImageConfig())
    assert tuple(pixels[0, 0, 0]) == (10, 200, 30)
    assert (rows, cols) == {(1, 1): (1, 1), (10_000, 1): (1, 16), (1, 10_000): (16, 1)}[size]


def test_real_photos_are_tiled_as_described():
    photos = pytest.importorskip("sklearn.datasets").load_sample_images().images
    for photo in photos:
        image = open_picture(photo, name="a photo")
        pixels, rows, cols = tile_picture(image, ImageConfig())
        height, width = photo.shape[:2]
        assert (rows, cols) == (2, 2) and (height, width) == (427, 640)
        canvas = pixels[:-1].reshape(2, 2, 336, 336, 3).swapaxes(1, 2).reshape(672, 672, 3)
        np.testing.assert_array_equal(canvas[:height, :width], photo)  # it fits, so no pixel changes
        # the global tile is the same photo squeezed: means of quarters agree
        for y in (0, 1):
            for x in (0, 1):
                part = photo[y * height // 2 :][: height // 2, x * width // 2 :][:, : width // 2]
                seen = pixels[-1][y * 168 :][:168, x * 168 :][:, :168]
                np.testing.assert_allclose(seen.mean((0, 1)), part.mean((0, 1)), atol=1)


def test_tokens_match_the_tiles():
    tokenizer = ByteTokenizer()
    for size in [(10, 10), (100, 40), (40, 100)]:
        tiles = tile_picture(Image.new("RGB", size), ImageConfig(tile_size=32))
        ids = picture_tokens(tiles.rows, tiles.cols, 4, tokenizer.special_tokens)
        assert ids.count(tokenizer.special_tokens["<|patch|>"]) == 4 * len(tiles.pixels)
        assert ids[0] == tokenizer.special_tokens["<|image_start|>"]
        assert ids[-1] == tokenizer.special_tokens["<|image_end|>"]


def test_a_tokenizer_without_the_tokens_is_named_as_the_cause():
    with pytest.raises(ValueError, match=r"lacks <\|tile_x_separator\|>, <\|patch\|>, so it cannot express pictures"):
        picture_tokens(1, 1, 4, {k: i for k, i in IDS.items() if k not in ("<|patch|>", "<|tile_x_separator|>")})
    with pytest.raises(ValueError, match="not 0 rows, 1 columns and 4 tokens"):
        picture_tokens(0, 1, 4, IDS)


@pytest.mark.parametrize("field", ["tile_size", "max_tiles", "tokens_per_tile"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_config_that_makes_no_tiles_is_an_error(field, value):
    with pytest.raises(ValueError, match=f"image config: {field} is {value}, and should be a whole number from 1 to"):
        ImageConfig(**{field: value})


def test_what_cannot_be_tiled_is_an_error():
    with pytest.raises(ValueError, match="mode RGBA cannot be tiled: open_picture makes it RGB"):
        tile_picture(Image.new("RGBA", (4, 4)), ImageConfig())
    with pytest.raises(ValueError, match="0×4 pixels has none"):
        tile_picture(Image.new("RGB", (0, 4)), ImageConfig())
    with pytest.raises(ValueError, match="4×0 pixels has none"):
        choose_canvas(4, 0, ImageConfig())

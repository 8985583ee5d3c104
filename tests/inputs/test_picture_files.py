"""Every kind of picture that people have opens rightly, and whatever else is handed in is one clear ValueError."""

import io
import os
import struct
import time
import zlib
from itertools import product

import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_fixtures.pictures import MODES, TRANSPARENT, picture, planes
from PIL import Image, TiffImagePlugin

from llama4_jax.inputs import picture_files
from llama4_jax.inputs.picture_files import MAX_PIXELS, MAX_SIDE, file_in, open_frames, open_picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about the metadata of damaged files


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


RGB = picture(23, 17, "RGB")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_picture_is_the_same_from_a_path_bytes_an_image_and_an_array(kind, tmp_path):
    data = encoded(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "it.txt").write_bytes(data)  # the name of a file says nothing
    expected = np.asarray(RGB)
    for source in (data, tmp_path / "it.txt", str(tmp_path / "it.txt"), RGB, expected):
        np.testing.assert_array_equal(pixels(open_picture(source, name="it")), expected)


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_lossy_kinds_open_as_pillow_decodes_them(kind):
    data = encoded(RGB, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels(open_picture(data, name="it")), expected)


@pytest.mark.parametrize(("mode", "kind"), [*product(["RGBA", *TRANSPARENT], ["PNG", None]), ("LA*", "TIFF")])
def test_transparency_of_every_mode_is_put_on_white(mode, kind):
    image = picture(23, 17, mode)
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    got = pixels(open_picture(encoded(image, kind) if kind else image, name="it"))
    assert np.abs(got - expected).max() <= 0.51
    assert np.abs(got - np.asarray(image.convert("RGB")).astype(float)).max() > 100  # what leaving the alpha out gives


def test_one_transparent_colour_of_a_png_is_white():
    grey = Image.fromarray(np.array([[0, 7, 200]], np.uint8))
    np.testing.assert_array_equal(
        pixels(open_picture(encoded(grey, "PNG", transparency=7), name="it"))[0, :, 0], [0, 255, 200]
    )
    wide = Image.fromarray(np.array([[0, 7, 40000]], np.uint16))
    np.testing.assert_array_equal(
        pixels(open_picture(encoded(wide, "PNG", transparency=7), name="it"))[0, :, 0], [0, 255, 156]
    )


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "RGBA"])
def test_opaque_modes_are_converted_as_pillow_does(mode):
    image = picture(23, 17, mode)
    np.testing.assert_array_equal(pixels(open_picture(image, name="it")), np.asarray(image.convert("RGB")))


WIDE = np.array([[1, 128, 129, 255, 256, 32767, 32768, 65406, 65407]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "array", "big endian"])
def test_16_bit_greys_are_scaled_and_rounded(kind):
    if kind == "big endian":
        source = Image.fromarray(WIDE.astype(">u2"))
    else:
        source = Image.fromarray(WIDE)
        source = source if kind == "array" else encoded(source, kind)
    got = pixels(open_picture(source, name="it"))
    np.testing.assert_array_equal(got[0, :, 0], np.rint(WIDE[0] / 257))
    assert (got == got[..., :1]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_integers_and_floats_run_from_their_smallest_to_their_largest(dtype):
    values = np.array([[-1000, 0, 3000, 100]], dtype)
    for source in (Image.fromarray(values), encoded(Image.fromarray(values), "TIFF")):
        got = pixels(open_picture(source, name="it"))[0, :, 0]
        np.testing.assert_array_equal(got, np.rint((values[0] + 1000) * 255 / 4000))
    assert not pixels(open_picture(Image.fromarray(np.full((2, 2), 9, dtype)), name="it")).any()
    largest = np.finfo(np.float32).max if dtype is np.float32 else np.iinfo(np.int32).max
    extreme = Image.fromarray(np.array([[-largest, 0, largest]], dtype))
    np.testing.assert_array_equal(pixels(open_picture(extreme, name="it"))[0, :, 0], [0, 128, 255])


def test_floats_that_are_no_numbers_are_an_error():
    with pytest.raises(ValueError, match=r"^page 3 is a picture of mode F that cannot .*infinite or no numbers"):
        open_picture(Image.fromarray(np.array([[1, np.nan]], np.float32)), name="page 3")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_exif_says(kind, orientation):
    """The first row of what is stored is this side of what is seen, and its first column that, says the standard."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8, 0] = upright[8:, :8, 2] = 255
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.swapaxes(0, 1),  # left, top
        6: upright[:, ::-1].swapaxes(0, 1),  # right, top
        7: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: upright[::-1].swapaxes(0, 1),  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    got = pixels(open_picture(data, name="it"))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright)[2:-2, 2:-2].mean() < 8  # JPEG and WebP blur the edges


def test_exif_that_cannot_be_read_turns_nothing():
    data = encoded(RGB, "PNG", exif=b"no exif")
    with pytest.raises(SyntaxError, match="not a TIFF file"):
        Image.open(io.BytesIO(data)).getexif()
    np.testing.assert_array_equal(pixels(open_picture(data, name="it")), np.asarray(RGB))


def test_an_image_that_is_handed_in_stays_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(picture(8, 5, "L"), "PNG", exif=exif)))
    result = open_picture(image, name="it")
    assert (image.size, image.mode, result.size) == ((8, 5), "L", (5, 8))
    mine = RGB.copy()
    open_picture(mine, name="it").paste((0, 0, 0), (0, 0, 9, 9))
    np.testing.assert_array_equal(np.asarray(mine), np.asarray(RGB))


def test_arrays_are_grey_rgb_or_rgba():
    layers = planes(9, 7, 4)
    np.testing.assert_array_equal(pixels(open_picture(layers[..., 0], name="it"))[..., 1], layers[..., 0])
    np.testing.assert_array_equal(pixels(open_picture(layers[::-1, :, :3], name="it")), layers[::-1, :, :3])
    opaque = layers.copy()
    opaque[..., 3] = 255
    np.testing.assert_array_equal(pixels(open_picture(opaque, name="it")), layers[..., :3])
    for wrong in (layers.astype(np.float32), layers[..., :2], layers[None], layers[0, 0]):
        with pytest.raises(ValueError, match="^it is an array of .* should be of uint8, and H W"):
            open_picture(wrong, name="it")
    with pytest.raises(ValueError, match="^it is an array of shape .*nothing to see"):
        open_picture(layers[:0, :, :3], name="it")


# --- what is no picture --------------------------------------------------------------------------------------------


def test_a_missing_file_a_directory_a_pipe_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^message 2: there is no file .*gone\.png"):
        open_picture(tmp_path / "gone.png", name="message 2")
    with pytest.raises(ValueError, match="^message 2: .* is a directory, and should be a picture file"):
        open_picture(tmp_path, name="message 2")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for source in (tmp_path / "empty.png", b"", tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="^message 2 is empty: it has 0 bytes"):
            open_picture(source, name="message 2")
    for no_path in ("x" * 5000, "data:image/png;base64,iVBORw0KGgo", "a\0b"):
        with pytest.raises(FileNotFoundError, match=r"^message 2: there is no file .{0,200}$"):
            open_picture(no_path, name="message 2")


@pytest.mark.parametrize(
    "content",
    [
        b"This is no picture.",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.7\n",
    ],
)
def test_a_file_that_is_no_picture_is_an_error_whatever_its_name(content, tmp_path):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^request 7 is not a picture that can be read: PNG, JPEG"):
        open_picture(tmp_path / "photo.png", name="request 7")


def test_formats_that_pillow_knows_and_that_are_not_asked_for_are_not_tried():
    eps = encoded(RGB, "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match="^it is not a picture that can be read"):
        open_picture(eps, name="it")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_truncated_file_is_an_error(kind):
    data = encoded(picture(90, 70, "RGB"), kind)
    for part in (0.02, 0.3, 0.7, 0.95):
        with pytest.raises(ValueError, match="^item 5 "):
            open_picture(data[: int(len(data) * part)], name="item 5")


# --- what would cost too much --------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def tiff(tags: list[tuple[int, int]], data: bytes) -> bytes:
    """A file of one directory, of numbers alone; tag 0 stands for the place of the data."""
    offset = 8 + 2 + 12 * len(tags) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, offset if value < 0 else value) for tag, value in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + data


LARGEST = {"PNG": 2**31 - 1, "BMP": 2**31 - 1, "PPM": 2**31 - 1, "TIFF": 2**31 - 1, "GIF": 65535, "WEBP": 2**16}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("large", ["above the limit", "largest"])
@pytest.mark.parametrize("kind", LARGEST)
def test_gigapixels_are_refused_from_the_header(kind, large):
    width, height = (MAX_PIXELS // 2000 + 1, 2000) if large == "above the limit" else (LARGEST[kind], LARGEST[kind] - 1)
    if kind == "PNG":
        data = png_header(width, height)
    elif kind == "PPM":
        data = b"P6 %d %d 255\n" % (width, height) + bytes(100)
    elif kind == "TIFF":
        strip = [(273, -1), (278, height), (279, 100)]
        data = tiff([(256, width), (257, height), (258, 8), (259, 1), (262, 1), (277, 1), *strip], bytes(100))
    elif kind == "BMP":
        data = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "GIF":
        data = bytearray(encoded(Image.new("L", (4, 4)), "GIF"))
        data[6:10] = struct.pack("<HH", width, height)
    else:
        sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        body = b"VP8X" + struct.pack("<II", 10, 0) + sides
        data = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    start = time.monotonic()
    with pytest.raises(ValueError, match="^request 1 .*(pixels|opened as a picture)"):
        open_picture(bytes(data), name="request 1")
    assert time.monotonic() - start < 2


def test_the_limit_on_pixels_is_said_and_holds_for_images_in_memory(monkeypatch):
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 23 * 17 - 1)
    for source in (RGB, np.asarray(RGB), encoded(RGB, "PNG"), encoded(RGB, "JPEG")):
        with pytest.raises(ValueError, match=r"^it has 23×17 pixels, and pictures of at most 390 are .*scale it down"):
            open_picture(source, name="it")
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 23 * 17)
    assert open_picture(RGB, name="it").size == (23, 17)


def test_a_file_of_too_many_bytes_is_not_read(monkeypatch, tmp_path):
    monkeypatch.setattr(picture_files, "MAX_FILE_BYTES", 100)
    data = encoded(RGB, "PNG")
    (tmp_path / "it.png").write_bytes(data)
    for source in (data, tmp_path / "it.png"):
        with pytest.raises(ValueError, match=f"^it has {len(data):,} bytes, and files of at most 100 are read"):
            open_picture(source, name="it")


def test_a_tiff_whose_tiles_are_far_larger_than_itself_is_refused():
    """4 KB that say 1×1 pixels, and would take 2 GB."""
    head = [(256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1), (322, 32768), (323, 64512)]
    with pytest.raises(ValueError, match=r"^it consists of tiles of \[32768, 64512\] pixels"):
        open_picture(tiff([*head, (324, -1), (325, 4000)], bytes(4000)), name="it")
    small = dict(head) | {322: 16, 323: 16, 259: 1, 324: -1, 325: 256}
    assert open_picture(tiff(list(small.items()), bytes(256)), name="it").size == (1, 1)


def test_a_tiff_whose_pieces_lie_on_each_other_is_refused():
    image = Image.new("L", (4000, 4000))
    image.tile = [("raw", (0, 0, 4000, 3999), 0, ("L", 0, 1))] * 100
    with pytest.raises(ValueError, match="^it: its pieces have 1,599,600,000 pixels together"):
        open_picture(image, name="it")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def narrow(width: int, height: int) -> bytes:
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


ENDLESS = {
    "a JPEG that begins with fill": b"\xff\xd8" + b"\xff" * 10**8,
    "a JPEG of junk": b"\xff\xd8" + b"\xff\xfe\x00\x02" + bytes(10**7),
    "a JPEG of comments": b"\xff\xd8" + b"\xff\xfe\x00\x04ab" * 10**6 + encoded(RGB, "JPEG")[2:],
    "comments after a JPEG's header": encoded(RGB, "JPEG")[:-2] + b"\xff\xfe\x00\x04ab" * 10**6,
    "a PNG of texts": narrow(8, 8)[:33] + chunk(b"tEXt", b"k\0v") * 10**5 + narrow(8, 8)[33:],
    "a GIF of comments": encoded(RGB, "GIF")[:13] + b"\x21\xfe\x01a\x00" * 10**6 + b";",
    "a PPM with a comment": b"P6 #" + b"c" * 10**7 + b"\n1 1 255\nabc",
    "a PPM of text": b"P3 4000 4000 255\n" + b"1 " * 9_000_000,
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_file_of_endless_pieces_is_refused_at_once(name):
    started = time.process_time()
    with pytest.raises(ValueError, match="^it ") as error:
        open_picture(ENDLESS[name], name="it")
    assert time.process_time() - started < 3 and len(str(error.value)) < 300


def test_narrow_pictures_are_bounded_by_their_sides():
    for size in ((1, MAX_SIDE + 1), (MAX_SIDE + 1, 1), (1, 89_000_000)):
        with pytest.raises(ValueError, match=f"it has {size[0]}×{size[1]} pixels, and .* 65,536 on a side"):
            open_picture(narrow(size[0], size[1]) if max(size) < 10**6 else narrow(*size)[:60], name="it")
    assert open_picture(narrow(1, MAX_SIDE), name="it").size == (1, MAX_SIDE)


def test_an_error_shows_nothing_of_the_file():
    for content in (
        b"TOPSECRET of somebody",
        b"P6 TOPSECRET 3 255\n",
        b"P3 2 2 255\nTOPSECRET 1 2",
        b"P6 3 TOPSECRETTOPSECRET",
    ):
        with pytest.raises(ValueError) as error:
            open_picture(content, name="it")
        assert "TOP" not in str(error.value)


def test_a_jpeg_of_endless_scans_is_refused():
    """Each takes 130 bytes, and a pass over all pixels."""
    data = encoded(Image.new("L", (2000, 2000), 90), "JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    assert scans > 3 and picture_files._jpeg_scans(data) == scans
    last = data.rfind(b"\xff\xda")
    hostile = data[:-2] + data[last:-2] * 1000 + data[-2:]
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"^it: its {scans + 1000} scans have 4,0.* pixels together, and at most"):
        open_picture(hostile, name="it")
    assert time.monotonic() - start < 1
    assert open_picture(data, name="it").size == (2000, 2000)


def test_scans_in_what_a_jpeg_carries_along_are_not_counted():
    """Thumbnails before it, and films behind it, have markers of their own."""
    exif = Image.Exif()
    exif[0x010E] = "\xff\xda" * 3
    data = encoded(RGB, "JPEG", exif=exif.tobytes() + b"\xff\xda" * 2000, progressive=True)
    assert picture_files._jpeg_scans(data + b"\xff\xda\x00\x02" * 2000) == picture_files._jpeg_scans(
        encoded(RGB, "JPEG", progressive=True)
    )
    assert open_picture(data + b"\xff\xda\x00\x02" * 2000, name="it").size == RGB.size


# --- clips ---------------------------------------------------------------------------------------------------------


def clip(kind: str, count: int, size=(12, 10), **options) -> bytes:
    """Frame i is of the grey 10 · i."""
    frames = [Image.new("RGB", size, (10 * i,) * 3) for i in range(count)]
    if kind == "WEBP":
        options["lossless"] = True
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **options)


def greys(frames: list[Image.Image]) -> list[int]:
    assert all(frame.mode == "RGB" for frame in frames)
    return [int(np.asarray(frame)[0, 0, 0]) // 10 for frame in frames]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [5]), (2, [2, 7]), (3, [1, 5, 8]), (5, [1, 3, 5, 7, 9]), (10, list(range(10))), (99, list(range(10)))],
)
def test_an_animation_is_sampled_evenly(kind, count, expected):
    assert greys(open_frames(clip(kind, 10), count, name="it")) == expected


@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_directory_is_a_clip_sorted_by_numbers(count, tmp_path):
    for i in range(10):
        Image.new("RGB", (12, 10), (10 * i,) * 3).save(tmp_path / f"frame{i + 1}.png")
    (tmp_path / ".DS_Store").write_bytes(b"no picture")
    assert greys(open_frames(tmp_path, count, name="it")) == greys(open_frames(clip("PNG", 10), count, name="it"))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 60))
def test_frames_are_spread_evenly_and_each_is_another(n, count):
    taken = list(picture_files._spread(n, count))
    assert len(taken) == min(n, count) == len(set(taken))
    assert taken == sorted(taken) and taken[0] >= 0 and taken[-1] < n
    assert [n - 1 - i for i in reversed(taken)] == taken or n > count  # all of them
    gaps = np.diff(taken)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert abs(taken[0] - (n - 1 - taken[-1])) <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_picture_that_does_not_move_is_one_still(kind, tmp_path):
    data = encoded(RGB, kind)
    (tmp_path / "it").write_bytes(data)
    for source in (data, tmp_path / "it"):
        (frame,) = open_frames(source, 8, name="it")
        np.testing.assert_array_equal(pixels(frame), pixels(open_picture(data, name="it")))


def test_the_pages_of_a_tiff_are_no_frames():
    pages = [Image.new("RGB", (5, 5), (i, i, i)) for i in range(3)]
    assert len(open_frames(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), 8, name="it")) == 1


def test_the_picture_for_viewers_without_animation_is_no_frame():
    data = clip("PNG", 5, default_image=True)
    assert Image.open(io.BytesIO(data)).n_frames == 5
    assert greys(open_frames(data, 8, name="it")) == [1, 2, 3, 4]


def test_transparent_frames_are_put_on_white():
    frames = [Image.new("RGBA", (6, 6), (10, 20, 30, alpha)) for alpha in (255, 0)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    first, second = open_frames(data, 2, name="it")
    assert first.getpixel((0, 0)) == (10, 20, 30) and second.getpixel((0, 0)) == (255, 255, 255)


def test_clips_that_are_none_are_errors(tmp_path):
    with pytest.raises(ValueError, match="^video 1: the directory .* is empty, and should hold one picture a frame"):
        open_frames(tmp_path, 4, name="video 1")
    with pytest.raises(ValueError, match="^video 1: 0 frames were asked for"):
        open_frames(clip("GIF", 2), 0, name="video 1")
    with pytest.raises(FileNotFoundError, match="^video 1: there is no file"):
        open_frames(tmp_path / "gone", 4, name="video 1")
    RGB.save(tmp_path / "1.png")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"^video 1, notes\.txt is not a picture"):
        open_frames(tmp_path, 4, name="video 1")
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "more").mkdir()
    with pytest.raises(ValueError, match=r"^video 1, more: .* is a directory"):
        open_frames(tmp_path, 4, name="video 1")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_clip_that_ends_within_a_frame_is_an_error(kind):
    frames = [picture(40 + i, 40, "RGB").resize((40, 40)) for i in range(4)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="^video 1"):
        open_frames(data[: int(len(data) * 0.9)], 4, name="video 1")


def test_the_frames_of_a_clip_are_bounded_together(monkeypatch, tmp_path):
    monkeypatch.setattr(picture_files, "MAX_DECODED_PIXELS", 3 * 80 * 70)
    for kind in ("GIF", "WEBP", "PNG"):
        assert len(open_frames(clip(kind, 3, (80, 70)), 3, name="it")) == 3
        with pytest.raises(ValueError, match="^it: 4 of its 4 frames have 22,400 pixels together, and at most 16,800"):
            open_frames(clip(kind, 4, (80, 70)), 4, name="it")
    for i in range(4):
        Image.new("RGB", (80, 70)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="^it: its first 4 frames have 22,400 pixels together"):
        open_frames(tmp_path, 4, name="it")
    assert len(open_frames(tmp_path, 3, name="it")) == 3


def test_a_gif_that_grows_from_frame_to_frame_is_bounded_too(monkeypatch):
    """Its header and its first frame say 4×4."""
    small, large = Image.new("L", (4, 4)), Image.new("L", (300, 300))
    first, rest = encoded(small, "GIF"), encoded(large, "GIF")
    frame = rest[rest.index(b",\0\0\0\0" + struct.pack("<HH", 300, 300)) : -1]
    data = first[:-1] + frame * 50 + b";"
    assert Image.open(io.BytesIO(data)).size == (4, 4) and Image.open(io.BytesIO(data)).n_frames == 51
    assert len(open_frames(data, 99, name="it")) == 51
    monkeypatch.setattr(picture_files, "MAX_DECODED_PIXELS", 64 * 64 + 50 * 300 * 300 - 1)
    with pytest.raises(
        ValueError, match="^it: 51 of its 51 frames have 4,504,096 pixels"
    ):  # a small one counts as 64×64
        open_frames(data, 99, name="it")
    assert len(open_frames(data, 25, name="it")) == 25  # the last of these is the 50th of the 51


def test_more_frames_than_anyone_would_show_are_refused_quickly():
    """2³¹ of them, says a PNG of a few bytes."""
    data = bytearray(clip("PNG", 2))
    at = data.index(b"acTL")
    data[at + 4 : at + 8] = struct.pack(">I", 2**31 - 1)
    data[at + 12 : at + 16] = struct.pack(">I", zlib.crc32(data[at : at + 12]))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^it: [0-9]+ of its 2147483647 frames have .* pixels together"):
        open_frames(bytes(data), 4, name="it")
    assert time.monotonic() - start < 1


# --- fuzzing -------------------------------------------------------------------------------------------------------

SAMPLES = [
    *(encoded(picture(21, 13, mode), "PNG") for mode in ("RGBA", "P*", "1", "L")),
    encoded(Image.fromarray(WIDE), "PNG"),
    encoded(RGB, "JPEG"),
    encoded(RGB, "JPEG", progressive=True),
    encoded(picture(21, 13, "CMYK"), "JPEG"),
    encoded(RGB, "GIF"),
    encoded(RGB, "WEBP"),
    encoded(RGB, "WEBP", lossless=True),
    encoded(picture(21, 13, "RGBA"), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    encoded(RGB, "BMP"),
    encoded(picture(21, 13, "P"), "BMP"),
    *(encoded(RGB, "TIFF", compression=c) for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
    encoded(picture(21, 13, "1"), "TIFF", compression="group4"),
    encoded(Image.fromarray(WIDE.astype(np.float32)), "TIFF"),
    encoded(RGB, "PPM"),
    b"P3 2 2 15\n0 1 2 3 4 5 6 7 8 9 10 11\n",
    *(clip(kind, 3) for kind in ("GIF", "WEBP", "PNG")),
]


@st.composite
def damaged(draw) -> bytes:
    """A real file with some bytes changed, cut out, put in or copied, or cut short."""
    data = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 6))):
        # the beginning of a file is its header, which matters most
        at = draw(st.one_of(st.integers(0, min(64, len(data))), st.integers(0, len(data))))
        length = draw(st.integers(0, 8))
        kind = draw(st.sampled_from(["change", "largest", "cut", "insert", "copy", "end"]))
        if kind == "change":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "largest":
            data[at : at + length] = draw(st.sampled_from([b"\xff", b"\x7f", b"\0"])) * length
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "copy":
            data[at:at] = data[at : at + 64] * draw(st.integers(1, 4))
        else:
            del data[max(at, 1) :]
    return bytes(data)


def check(data: bytes) -> None:
    start = time.monotonic()
    for opening in (lambda: [open_picture(data, name="file 1")], lambda: open_frames(data, 3, name="file 1")):
        try:
            images = opening()
        except ValueError as error:
            assert str(error).startswith("file 1")
            assert not isinstance(error.__cause__, (NameError, jaxtyping.TypeCheckError))  # of ours
        else:
            assert images and all(image.mode == "RGB" and image.width and image.height for image in images)
    assert time.monotonic() - start < 10


fuzzing = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@fuzzing
@given(damaged())
def test_a_damaged_file_gives_a_picture_or_a_value_error(data):
    check(data)


@fuzzing
@given(st.sampled_from([data[:n] for data in SAMPLES for n in (0, 4, 12, 30)]), st.binary(max_size=200))
def test_any_bytes_give_a_picture_or_a_value_error(head, tail):
    check(head + tail)


def test_the_samples_are_sound():
    for data in SAMPLES:
        assert open_picture(data, name="it").width


def test_pillows_limit_is_not_below_ours():
    """Pillow would warn of a picture that we decode."""
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    assert TiffImagePlugin.TILEWIDTH == 322 and TiffImagePlugin.TILELENGTH == 323


def test_a_path_that_others_wrote_leads_into_its_folder_or_nowhere(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").touch(), (tmp_path / "in2").mkdir(), (tmp_path / "in2" / "a.png").touch()
    (folder / "loop").symlink_to(folder / "loop")
    for path in ("a.png", "sub/../a.png", folder / "a.png"):
        assert file_in(folder, folder / path, name="it") == folder / path
    for path in ("../in2/a.png", "..", "/etc/passwd", tmp_path / "in2" / "a.png", "sub/../../in2/a.png"):
        with pytest.raises(ValueError, match="it: .* leads out of the folder"):
            file_in(folder, folder / path, name="it")
    for path in ("b.png", "sub", "loop", "a" * 5000, "a\0b", "\ud800"):
        with pytest.raises((FileNotFoundError, ValueError)) as error:
            file_in(folder, folder / path, name="it")
        assert len(str(error.value)) < 500

"""Files, bytes and arrays → RGB pictures: every kind that people have, and no harm from any.

Whatever is handed in gives a picture or one ValueError that begins with the name the caller gave it, and never shows
what a file holds. The content decides what a file is, never its name, and only formats of pixels are tried: nothing is
given to an interpreter, as EPS would be. What a picture will cost is read from its header and judged before a pixel is
decoded; whatever a file is, it takes seconds at most, and about 1 GiB of memory.

Both references leave some pictures wrong, and these are put right here: a photo is turned as its EXIF orientation says
(neither does that), what is transparent becomes white in every mode (in Meta's code, in RGBA alone), and 16-bit greys
are scaled to 8 bits (both cut them off at 255). All else is converted as both convert it, by Pillow, colour profiles
ignored.

Pillow's warnings stay warnings: Python's filters for them are global, and pictures are opened by many threads. None is
needed here, since MAX_PIXELS is where Pillow's own about large pictures begins.
"""

import functools
import io
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped
from PIL import ExifTags, Image, TiffImagePlugin

from llama4_jax.untrusted_json import shortened, shown

# Pillow's own limit, 256 MiB of RGB. The model sees 1.8 million at most.
MAX_PIXELS = 89_478_485
# Of all the frames of a clip, or the scans of a JPEG, together: a minute of 720p at 19 frames a second.
MAX_DECODED_PIXELS = 2**30
# Of one side, and what JPEG has. A narrow picture costs more than its pixels: each row has a pointer and a filter.
MAX_SIDE = 2**16
# MAX_PIXELS uncompressed.
MAX_FILE_BYTES = 2**28
MAX_TEXT_BYTES = 2**24  # of a PPM whose numbers are written out, which Pillow reads one by one
# Pillow walks through headers in Python, byte by byte or block by block: so often it may read before it knows what a
# picture will cost, and until it is decoded. Real headers take hundreds of reads.
_READS_TO_OPEN, _READS_TO_DECODE = 2**14, 2**20
_MOST_MARKERS = 2**14  # of a JPEG

# Not AVIF: its header may say 64×64 of a picture that takes 12000×12000 to decode.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ANIMATED = ("GIF", "WEBP", "PNG")  # not TIFF, whose pages, nor JPEG, whose views, are no frames
_LEAST_FRAME = 64 * 64  # pixels that take as long as going on by one frame

Source = epath.PathLike | bytes | Image.Image | np.ndarray


def file_in(folder: epath.PathLike, path: epath.PathLike, *, name: str, hint: str = "") -> epath.Path:
    """A picture's path, if it leads into a folder: for paths that others wrote, in files of requests or of documents.

    Neither `..` nor an absolute path nor a symbolic link may lead out of it. What is outside is not looked at, so an
    error does not even tell whether it exists.

    Raises ValueError for a path that leads out; FileNotFoundError if there is no such file.
    """
    bucket = "://" in os.fspath(folder)  # it has no links
    separator, real = ("/", posixpath.normpath) if bucket else (os.sep, os.path.realpath)
    try:
        inside = f"{real(os.fspath(folder)).rstrip(separator)}{separator}"
        if not real(os.fspath(path)).startswith(inside):
            raise ValueError(
                f"{name}: {shown(os.fspath(path))} leads out of the folder {shortened(os.fspath(folder))}, and "
                f"pictures are read from there alone: put it there{', ' if hint else ''}{hint}."
            )
        found = epath.Path(path)
        is_there = found.is_file()
    except (UnicodeError, OSError):  # no name of a file at all
        is_there = False
    if not is_there:
        raise FileNotFoundError(f"{name}: there is no picture {shown(os.fspath(path))}.")
    return found


class _Metered(io.BytesIO):
    """A file that may be read so often."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self.reads_left = _READS_TO_OPEN

    def read(self, size: int | None = -1) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise _TooManyReads("it consists of more pieces than any real picture has")
        return super().read(size)


class _TooManyReads(Exception):
    pass


def open_picture(source: Source, *, name: str) -> Image.Image:
    """The picture as mode RGB, upright; `name` is what errors call it, as in "message 3, image 2".

    `source` is a path, the bytes of a file, a PIL image (which stays as it is), or an array of uint8: H W of grey,
    H W 3 of RGB, H W 4 of RGBA. Of an animation this is the first frame. Pictures of 32-bit integers or of floats do
    not say what white is: their smallest value becomes black and their largest white.

    Raises FileNotFoundError if there is no such file; ValueError for everything else that is wrong: not a picture,
    damaged or truncated, of a kind that is not read, or above a limit of this module.
    """
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source, name), name)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    return _decode(_identify(_content(source, name), name), name, close=True)


def open_frames(source: epath.PathLike | bytes, count: int, *, name: str) -> list[Image.Image]:
    """Stills of a clip, in its order, each as `open_picture` gives it: at most `count`, spread evenly.

    The clip is an animated GIF, WebP or PNG, or a directory with one picture a frame: sorted by name with numbers as
    numbers (frame2 before frame10), hidden files ignored. Of n > count frames, numbers ⌊(2k + 1)·n / (2·count)⌋ for
    k = 0 … count - 1 are taken, the middles of `count` equal stretches; else all. Only those of a directory are opened.
    A picture that does not move is a clip of one frame.

    Raises as `open_picture`, and ValueError for an empty directory and for more than MAX_DECODED_PIXELS: in the frames
    of an animation up to the last that is taken, or in those taken of a directory.
    """
    if count < 1:
        raise ValueError(f"{name}: {count} frames were asked for, and should be at least 1")
    if not isinstance(source, bytes):
        path = _path(source, name)
        if path.is_dir():
            return _frames_of_directory(path, count, name)
    image = _identify(_content(source, name), name)
    first, frames = 0, 1
    if image.format in _ANIMATED:
        first = int(getattr(image, "default_image", False))  # what viewers show that know no animated PNG
        frames = _attempt(lambda: getattr(image, "n_frames", 1), image, name) - first
    wanted = _spread(frames, count)
    pixels, pictures = 0, []
    for index in range(wanted[-1] + 1):
        frame = f"{name}, frame {index}"
        # By one each time, and counted each time: a frame may be larger than those before it.
        _attempt(functools.partial(image.seek, first + index), image, frame)
        area = max(image.width * image.height, _LEAST_FRAME)
        _check_decoded(pixels + area * (wanted[-1] + 1 - index), name, f"{wanted[-1] + 1} of its {frames} frames")
        pixels += area
        if index == wanted[len(pictures)]:
            pictures.append(_decode(image, frame))
    return pictures


def _frames_of_directory(directory: epath.Path, count: int, name: str) -> list[Image.Image]:
    files = sorted((f for f in directory.iterdir() if not f.name.startswith(".")), key=lambda f: _natural(f.name))
    if not files:
        raise ValueError(f"{name}: the directory {directory} is empty, and should hold one picture a frame")
    pixels, pictures = 0, []
    for index in _spread(len(files), count):
        frame = f"{name}, {files[index].name}"
        image = _identify(_content(files[index], frame), frame)
        pixels += image.width * image.height
        _check_decoded(pixels, name, f"its first {len(pictures) + 1} frames")
        pictures.append(_decode(image, frame, close=True))
    return pictures


def _spread(n: int, count: int) -> Sequence[int]:
    return range(n) if n <= count else [(2 * k + 1) * n // (2 * count) for k in range(count)]


def _natural(file_name: str) -> tuple[list[str | int], str]:
    """A key by which frame2 comes before frame10: text and numbers in turns."""
    parts = re.split(r"(\d+)", file_name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file_name


def _path(source: epath.PathLike, name: str) -> epath.Path:
    path = epath.Path(source)
    if not path.exists():  # cut, since it may be a picture in base64, by mistake
        raise FileNotFoundError(f"{name}: there is no file {str(path)[:200]}")
    return path


def _content(source: epath.PathLike | bytes, name: str) -> bytes:
    """What the file holds, if it is a file of a reasonable size."""
    if isinstance(source, bytes):
        _check_bytes(len(source), name)
        return source
    path = _path(source, name)
    try:
        if path.is_dir():
            raise ValueError(f"{name}: {path} is a directory, and should be a picture file")
        _check_bytes(path.stat().length, name)
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)  # it may have grown, or never have had a size
        _check_bytes(len(content), name)
        return content
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read: {error}") from error


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{name} has {size:,} bytes, and files of at most {MAX_FILE_BYTES:,} are read: scale it down")
    if not size:  # nor are pipes and devices read, whose end may never come: they have 0 too
        raise ValueError(f"{name} is empty: it has 0 bytes, and should be a picture file")


def _identify(content: bytes, name: str) -> Image.Image:
    """The picture, of which only the header is read."""
    if content[:2] in (b"P1", b"P2", b"P3") and len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{name} is a PPM of text of more than {MAX_TEXT_BYTES:,} bytes: write it in its binary form")
    file = _Metered(content)
    try:
        image = Image.open(file, formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not a picture that can be read: {', '.join(_FORMATS)} can, whatever the file is called."
        ) from error
    except Exception as error:  # damaged headers raise nearly every type there is, and some errors quote the file
        why = _said(error) if isinstance(error, _TooManyReads) else type(error).__name__
        raise ValueError(f"{name} cannot be opened as a picture: {why}") from error
    file.reads_left = _READS_TO_DECODE
    _check_size(image, name)
    if image.format in ("JPEG", "MPO"):
        scans = _jpeg_scans(content, name)
        _check_decoded(image.width * image.height * scans, name, f"its {scans} scans")
    return image


def _decode(image: Image.Image, name: str, *, close: bool = False) -> Image.Image:
    """As RGB, and upright. `close`: the image is not needed afterwards, so that its pixels need not be kept."""
    _check_size(image, name)

    def decode() -> Image.Image:
        picture, turn = _to_rgb(image), _turn(image)
        if close:
            image.close()
        return picture if turn is None else picture.transpose(turn)

    return _attempt(decode, image, name)


def _attempt(what: Callable[[], Any], image: Image.Image, name: str) -> Any:
    """Whatever Pillow raises, and damaged files make it raise nearly every type there is, becomes one ValueError."""
    try:
        return what()
    except Exception as error:
        kind = f"{image.format} picture" if image.format else "picture"
        said = _said(error) if image.format != "PPM" else type(error).__name__  # whose errors quote the file
        raise ValueError(f"{name} is a {kind} of mode {image.mode} that cannot be decoded: {said}") from error


def _said(error: Exception) -> str:
    if isinstance(error, _TooManyReads):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _check_size(image: Image.Image, name: str) -> None:
    pixels = image.width * image.height
    if not pixels:
        raise ValueError(f"{name} has {image.width}×{image.height} pixels, so there is nothing to see")
    if max(image.size) > MAX_SIDE:
        raise ValueError(
            f"{name} has {image.width}×{image.height} pixels, and pictures of at most {MAX_SIDE:,} on a side are "
            f"decoded: scale it down or cut it"
        )
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"{name} has {image.width}×{image.height} pixels, and pictures of at most {MAX_PIXELS:,} are decoded, "
            f"so that no small file can fill the memory: scale it down"
        )
    # A TIFF's tiles may be far larger than its picture, and its pieces lie on each other again and again.
    tags = getattr(image, "tag_v2", {})
    known = [tag for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH) if tag in tags]
    sides = _attempt(lambda: [tags[tag] for tag in known], image, name)
    if any(not isinstance(side, int) for side in sides) or math.prod(sides) > MAX_PIXELS:
        raise ValueError(f"{name} consists of tiles of {sides} pixels, which are not decoded: they should be small")
    boxes = [piece[1] for piece in getattr(image, "tile", []) if piece[1]]
    _check_decoded(sum((right - left) * (below - above) for left, above, right, below in boxes), name, "its pieces")


def _check_decoded(pixels: int, name: str, what: str) -> None:
    if pixels > MAX_DECODED_PIXELS:
        raise ValueError(
            f"{name}: {what} have {pixels:,} pixels together, and at most {MAX_DECODED_PIXELS:,} are decoded: "
            f"scale it down or cut it"
        )


def _jpeg_scans(content: bytes, name: str = "it") -> int:
    """How often a JPEG goes over all its pixels: about 10 times if progressive, but a hostile one 1000 times."""
    scans, position, markers = 0, 2, 0
    while marker := _JPEG_MARKER.search(content, position):
        markers += 1
        if markers > _MOST_MARKERS:
            raise ValueError(f"{name} is a JPEG of more than {_MOST_MARKERS:,} pieces, and real ones have fewer")
        kind = content[marker.end() - 1]
        if kind == 0xD9:  # the end
            break
        scans += kind == 0xDA
        # Past the segment, whose bytes may look like markers; the pixels that follow a scan's header cannot.
        position = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
    return scans


_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of those before a segment, and the end


def _from_array(array: Shaped[np.ndarray, "..."], name: str) -> Image.Image:
    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
        raise ValueError(
            f"{name} is an array of {array.dtype} and shape {shape}, and should be of uint8, and H W (grey), "
            f"H W 3 (RGB) or H W 4 (RGBA)"
        )
    if not array.size:
        raise ValueError(f"{name} is an array of shape {shape}, so there is nothing to see")
    return Image.fromarray(array)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_grey(image, 0.0, 65535.0, image.info.get("transparency"))
    if image.mode in ("I", "F"):
        if not all(np.isfinite(strip).all() for _, strip in _strips(image)):
            raise ValueError("some of its values are infinite or no numbers")
        return _from_grey(image, *map(float, image.getextrema()))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Shaped[np.ndarray, "h W"]]]:
    """The picture's values some rows at a time, with the number of the first: a whole array takes far more room."""
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _from_grey(image: Image.Image, black: float, white: float, transparent: Any = None) -> Image.Image:
    """From `black` to `white` in 255 equal steps, to the nearest; white where the value is `transparent`."""
    grey = np.empty((image.height, image.width), np.uint8)
    for top, values in _strips(image):
        scaled = values.astype(np.float64)
        scaled -= black
        scaled *= 255 / ((white - black) or 1.0)
        strip = np.rint(scaled, out=scaled).astype(np.uint8)
        if isinstance(transparent, int):
            strip[values == transparent] = 255
        grey[top : top + len(strip)] = strip
    return Image.fromarray(grey).convert("RGB")


# What makes a picture upright, by its EXIF orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the picture made of an image is to be turned, as that one's EXIF says.

    Not by ImageOps.exif_transpose, which writes the EXIF data anew, and fails on those of some cameras.
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # data that cannot be read say nothing, and the pixels are well
        return None

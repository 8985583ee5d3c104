"""Pictures that a recording and a test make alike: by arithmetic, with no random generator and no file."""

import numpy as np
from PIL import Image

# A star: with transparency. Without one, LA and P are opaque; RGBA never is.
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")
TRANSPARENT = ("LA*", "P*")


def planes(width: int, height: int, count: int) -> np.ndarray:
    """uint8 of shape height, width, count: slopes with noise upon them, so that every pixel counts."""
    y, x = np.mgrid[:height, :width].astype(np.uint32)
    layers = []
    for c in range(count):
        noise = x * 2654435761 + y * 2246822519 + np.uint32(c * 3266489917 % 2**32)
        noise = (noise ^ (noise >> 15)) * np.uint32(2246822519)
        noise = (noise ^ (noise >> 13)) * np.uint32(3266489917)
        slope = (x * (191 + 16 * c) // max(width, 1) + y * (97 * c % 128) // max(height, 1)) % 192
        layers.append(slope + (noise >> 26))
    return np.stack(layers, -1).astype(np.uint8)


def picture(width: int, height: int, mode: str) -> Image.Image:
    layers = planes(width, height, 4)
    if mode.startswith("P"):
        image = Image.fromarray(layers[..., 0]).convert("L")
        image.putpalette([(37 * i + 11 * c) % 256 for i in range(256) for c in range(3)])
        if mode == "P*":
            image.info["transparency"] = bytes(range(256))  # the alpha of each colour
        return image
    if mode == "1":
        return Image.fromarray(np.where(layers[..., 0] > 110, 255, 0).astype(np.uint8)).convert("1")
    bands = [Image.fromarray(np.ascontiguousarray(layers[..., i])) for i in range(4)]
    if mode == "LA":
        bands[1] = Image.new("L", (width, height), 255)
    mode = mode.rstrip("*")
    return Image.merge(mode, bands[: len(Image.new(mode, (1, 1)).getbands())])

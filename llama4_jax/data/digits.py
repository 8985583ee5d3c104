"""A model that learns to read: handwritten digits on pages of print, and a question about them.

The digits are the 1797 scans of 8 × 8 pixels that come with scikit-learn (43 people's hands; E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI). Each is drawn at a random place and size onto a small page with lines
of print above and below it, so that it must be found, not just recognised. Every scan is drawn in many ways, all of
them on the same side of the held-out split, and so are the two scans of a pair.
"""

import functools

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont

from llama4_jax.data.documents import Conversation, Documents, hash64
from llama4_jax.inputs.messages import Message, Picture

PAGE = 48  # pixels a side
VARIATIONS = 64  # ways in which each scan is drawn
_GROUP = 12  # scans that are on the same side of the split
_MARGIN = 8  # pixels above and below, for the print
_DIGIT = (28, PAGE - 2 * _MARGIN + 1)  # pixels a side: from, below

_QUESTIONS = ("Which digit is this?", "What digit is on the page?", "Read the digit.")
_PAIR_QUESTIONS = ("Which is larger?", "Which of the two digits is larger?")
_WORDS = ("page", "note", "item", "list", "sheet", "form", "copy", "line", "mark", "sign", "date", "name", "code",
          "part", "unit", "box", "row", "see", "read", "here")  # fmt: skip


class DigitDocuments(Documents):
    """Conversations about a page, or, with `pairs`, about two pages with different digits.

    Raises ModuleNotFoundError without scikit-learn.
    """

    def __init__(self, *, pairs: bool):
        self._scans, self._labels = _scans()
        self._pairs = pairs
        groups = np.arange(len(self._labels) * VARIATIONS) % len(self._labels) // _GROUP
        hashes = np.array([hash64(f"digits {group}".encode()) for group in range(groups.max() + 1)], np.uint64)
        super().__init__(hashes[groups], sizes=[pairs])

    def __getitem__(self, index: int) -> Conversation:
        variation, scan = divmod(index, len(self._labels))
        rng = np.random.Generator(np.random.PCG64(hash64(f"{self._pairs} {index}".encode())))
        if not self._pairs:
            question = _QUESTIONS[rng.integers(len(_QUESTIONS))]
            asked = (Picture(draw_page(self._scans[scan], rng)), question)
            answer = str(self._labels[scan])
        else:
            scans = (scan, self._other(scan, rng))
            question = _PAIR_QUESTIONS[rng.integers(len(_PAIR_QUESTIONS))]
            asked = (*(Picture(draw_page(self._scans[i], rng)) for i in scans), question)
            first, second = (int(self._labels[i]) for i in scans)
            answer = f"{first} and {second}: the {'first' if first > second else 'second'}"
        messages = (Message("user", asked), Message("assistant", (answer,)))
        return Conversation(messages, (), f"digits, scan {scan}, variation {variation}")

    def _other(self, scan: int, rng: np.random.Generator) -> int:
        """Another scan of the same group with another digit."""
        first = scan // _GROUP * _GROUP
        group = np.arange(first, min(first + _GROUP, len(self._labels)))
        return int(rng.choice(group[self._labels[group] != self._labels[scan]]))


def draw_page(scan: Float[np.ndarray, "8 8"], rng: np.random.Generator) -> Image.Image:
    """A page with this digit somewhere on it, between two lines of print; RGB."""
    page = Image.new("L", (PAGE, PAGE), int(rng.integers(225, 256)))
    ink = int(rng.integers(0, 90))
    for y in (int(rng.integers(-3, -1)), PAGE - _MARGIN - int(rng.integers(0, 2))):
        x = int(rng.integers(-6, 3))
        for word in rng.integers(0, len(_WORDS), 3):
            ink_of_word = _print(int(word))
            page.paste(ink, (x, y), ink_of_word)
            x += ink_of_word.width + 3
    side = int(rng.integers(*_DIGIT))
    stroke = Image.fromarray((scan * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    x, y = (PAGE - side) // 2 + rng.integers(-5, 6), rng.integers(_MARGIN, PAGE - _MARGIN - side + 1)
    page.paste(ink, (int(x), int(y)), stroke)
    return page.convert("RGB")


@functools.cache  # to draw letters takes longer than all the rest
def _print(word: int) -> Image.Image:
    """A word as ink, from 0 to 255."""
    font = ImageFont.load_default(size=9)
    ink = Image.new("L", (round(font.getlength(_WORDS[word])), 13))
    ImageDraw.Draw(ink).text((0, 0), _WORDS[word], fill=255, font=font)
    return ink


@functools.cache
def _scans() -> tuple[Float[np.ndarray, "scans 8 8"], Int[np.ndarray, " scans"]]:
    """Ink from 0 to 1, and which digit it is."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / 16, digits.target

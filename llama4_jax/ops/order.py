"""What is known of the order of tokens before a program runs, which lets it skip what it need not look at."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """Of the keys of each row, and of the queries, which are those of the last of them, or of all.

    - contiguous: one document after another, the positions of each counting up by one. Padding, of a negative position,
      may stand anywhere.
    - aligned: and the row is one document without padding, which begins where a chunk does.
    - zigzag: all this was so before `to_zigzag` reordered the row.
    """

    contiguous: bool = False
    aligned: bool = False
    zigzag: bool = False


ANY_ORDER = Order()

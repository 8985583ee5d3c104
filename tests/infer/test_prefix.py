"""What of a slot can be used for another prompt, against a simulation of which keys a slot still holds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.infer.prefix import Held, keys_of, usable


def restorable(length: int, at: int, chunk: int | None) -> bool:
    """Whether a row that has come to `length` can go on from `at`: its chunked layers hold what a row of `at` tokens
    sees of its own chunk."""
    if chunk is None or at % chunk == 0:
        return True
    ring = {p % chunk: p for p in range(length)}  # the newest position in each slot
    return all(ring[p % chunk] == p for p in range(at // chunk * chunk, at))


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 60), st.integers(0, 30), st.integers(0, 70), st.sampled_from([None, 4, 6, 16]),
    st.sampled_from([1, 2, 4, 8]), st.integers(1, 80), st.booleans(),
)  # fmt: skip
def test_what_is_used_is_there_in_whole_pieces_and_as_long_as_can_be(
    prompt, reply, common, chunk, piece, length, aside
):
    held = Held(np.arange(prompt), exact=prompt, longest=prompt + reply, at_end="put aside" if aside else None)
    keys = np.concatenate([np.arange(min(common, length)), np.full(max(0, length - common), 10**6)])
    got = usable(held, keys, chunk, piece)
    most = min(length - 1, prompt, common)

    def able(n):
        return restorable(held.longest, n, chunk) or (aside and restorable(prompt, n, chunk))

    assert 0 <= got <= max(0, most) and got % piece == 0 and able(got)
    assert held.needs_its_end(got, chunk) == (not restorable(held.longest, got, chunk))
    # The whole pieces of the last chunk, or where both a chunk and a piece begin.
    assert got == max(n for n in range(0, max(0, most) + 1, piece) if able(n))


def test_the_same_words_with_another_picture_are_another_prompt():
    prompt, patch = np.array([1, 9, 9, 2, 9, 9, 3]), 9
    tiles = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    other = tiles.copy()
    other[1, 0, 0, 0] ^= 1
    a, b = keys_of(prompt, tiles, patch), keys_of(prompt, other, patch)
    assert (a[:4] == b[:4]).all() and (a[4:6] != b[4:6]).all() and a[6] == b[6]
    assert (a[[1, 2, 4, 5]] < 0).all() and a[1] != a[4]
    assert (keys_of(prompt, tiles[::-1], patch) != a).any()
    assert (keys_of(prompt[[0, 3, 6]], None, patch) == [1, 2, 3]).all()

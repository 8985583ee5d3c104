"""Which part of a prompt is in a slot of the cache already, exactly.

A slot holds all keys and values of global layers, but of chunked ones only the chunk that its row has come to. So a row
of L tokens can be cut back to any length within its last chunk, and to any multiple of the chunk below: there the
chunked layers begin anew. To another length it cannot be cut: their keys are gone. Where a reply may leave the chunk in
which its prompt ends, what the chunked layers hold there is therefore put aside.

Only what was read as a prompt is taken, in whole pieces: those keys are bit for bit the ones that reading the prompt
again would give, so that a request gets the same whether its prompt was found or not. A reply's keys differ from what
reading it gives by rounding, since its tokens came one at a time; the next turn of a conversation reads the reply again
and nothing else.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped


@dataclass(frozen=True)
class Held:
    """What a slot holds.

    - keys: of each token, see `keys_of`
    - exact: tokens that were read as a prompt
    - longest: the length that the row may have come to at most, reply included
    - at_end: what the chunked layers held when all of the prompt was read, if it was put aside since the reply may
      leave that chunk
    """

    keys: Int[np.ndarray, " T"]
    exact: int
    longest: int
    at_end: Any | None = None

    def first_in_chunk(self, chunk: int | None) -> int:
        """From this length on the row can go on anywhere, up to `exact`."""
        if chunk is None:
            return 0
        return ((self.longest if self.at_end is None else self.exact) - 1) // chunk * chunk

    def needs_its_end(self, length: int, chunk: int | None) -> bool:
        """Whether to go on at this length needs what was put aside."""
        if self.at_end is None or chunk is None or length % chunk == 0:
            return False
        return length < (self.longest - 1) // chunk * chunk


def keys_of(
    prompt: Int[np.ndarray, " T"], tiles: Shaped[np.ndarray, "_ S S c"] | None, patch_id: int | None
) -> Int[np.ndarray, " T"]:
    """Integers that are equal where prompts are: token ids, and for the `<|patch|>` of a tile a digest of its pixels,
    which is negative, as no token id is."""
    keys = np.asarray(prompt, np.int64).copy()
    if tiles is None or not len(tiles):
        return keys
    places = np.flatnonzero(keys == patch_id)
    each = len(places) // len(tiles)
    for i, tile in enumerate(tiles):
        # A cryptographic one: who sends a picture must not be answered about another's.
        digest = hashlib.blake2b(np.ascontiguousarray(tile).tobytes(), digest_size=8).digest()
        keys[places[i * each : (i + 1) * each]] = -1 - (int.from_bytes(digest, "little") >> 1)
    return keys


def usable(held: Held, keys: Int[np.ndarray, " T"], chunk: int | None, piece: int) -> int:
    """How many tokens of a prompt of these keys need not be read again. One is always left, for what follows it."""
    common = min(common_length(held.keys, keys), len(keys) - 1, held.exact)
    length = common // piece * piece
    if chunk is None or length >= held.first_in_chunk(chunk):
        return length
    both = math.lcm(chunk, piece)
    return common // both * both


def common_length(a: Int[np.ndarray, " T"], b: Int[np.ndarray, " S"]) -> int:
    """Keys that are the same from the beginning on."""
    most = min(len(a), len(b))
    same = a[:most] == b[:most]
    return int(np.argmin(same)) if not same.all() else most

"""What slots of the cache held, kept after others took their place: on the device, then in the host's memory.

A snapshot is the state of a row after so many tokens of a prompt, bit for bit: of global layers the keys and values of
all of them, in blocks, which snapshots with one beginning share; of chunked layers what their chunk held then. From it
a row can go on at every length within that last chunk, and at every multiple of the chunk below (`prefix.usable`).

The least recently used go first: from the device to the host, and from there altogether.
"""

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from llama4_jax.infer.prefix import Held, common_length, usable


class Block:
    """Arrays of a row's cache: on the device, or numpy's."""

    def __init__(self, arrays: Any):
        self.arrays = arrays
        self.nbytes = sum(x.nbytes for x in jax.tree.leaves(arrays))
        self.on_device = any(isinstance(x, jax.Array) for x in jax.tree.leaves(arrays))

    def to_host(self) -> None:
        self.arrays, self.on_device = jax.tree.map(np.asarray, self.arrays), False


@dataclass(eq=False)
class Snapshot:
    """- keys: of its tokens, see `prefix.keys_of`
    - blocks: of the global layers, of `block` slots each, in order; empty without global layers
    - chunk: what the chunked layers hold; None without chunked layers, or where a chunk begins
    """

    keys: Int[np.ndarray, " T"]
    blocks: list[Block]
    chunk: Block | None

    @property
    def held(self) -> Held:
        length = len(self.keys)
        return Held(self.keys, length, length if self.chunk is not None else length + 1)

    def parts(self) -> list[Block]:
        return [*self.blocks, *([] if self.chunk is None else [self.chunk])]


class Snapshots:
    """- device_bytes, host_bytes: that may be used at most
    - chunk: of the chunked layers, None without one; piece: in multiples of which prompts are found
    - block: slots of global layers in a block
    """

    def __init__(self, device_bytes: int, host_bytes: int, *, chunk: int | None, piece: int, block: int):
        self.device_bytes, self.host_bytes = device_bytes, host_bytes
        self.chunk, self.piece, self.block = chunk, piece, block
        self._kept: collections.OrderedDict[int, Snapshot] = collections.OrderedDict()  # the oldest use first

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, keys: Int[np.ndarray, " T"]) -> tuple[Snapshot | None, int]:
        """The snapshot of which most can be used for a prompt of these keys, and how many tokens that are."""
        best, most = None, 0
        for snapshot in self._kept.values():
            length = usable(snapshot.held, keys, self.chunk, self.piece)
            if length > most:
                best, most = snapshot, length
        return best, most

    def use(self, snapshot: Snapshot) -> None:
        """It was used now."""
        if id(snapshot) in self._kept:
            self._kept.move_to_end(id(snapshot))

    def covers(self, keys: Int[np.ndarray, " T"]) -> bool:
        """Whether one begins with these keys, and can be cut back to them."""
        after = np.concatenate([keys, [np.iinfo(np.int64).min]])  # `usable` always leaves a token
        whole = len(keys) // self.piece * self.piece
        return self.find(after)[1] >= whole

    def add(
        self,
        keys: Int[np.ndarray, " T"],
        take: Callable[[int], Block],
        chunk: Block | None,
    ) -> Snapshot:
        """A snapshot of these tokens. `take` gives the block of that number of the global layers, unless another
        snapshot has it already."""
        shared: Sequence[Block] = ()
        for other in self._kept.values():
            same = common_length(other.keys, keys) // self.block
            if same > len(shared):
                shared = other.blocks[:same]
        count = -(-len(keys) // self.block)
        blocks = [*shared, *(take(i) for i in range(len(shared), count))]
        made = Snapshot(keys, blocks, chunk)
        for other in [other for other in self._kept.values() if self._is_in(other, made)]:
            del self._kept[id(other)]
        self._kept[id(made)] = made
        return made

    def _is_in(self, old: Snapshot, new: Snapshot) -> bool:
        """Whether all that the old one is good for, the new one is too."""
        if common_length(old.keys, new.keys) < len(old.keys):
            return False
        return old.chunk is None or new.held.first_in_chunk(self.chunk) <= old.held.first_in_chunk(self.chunk)

    def settle(self) -> None:
        """Moves and drops what is beyond the limits. May wait for the device."""
        while True:
            kept = [*self._kept.values()]
            on_device = self._unique(kept, lambda block: block.on_device)
            if sum(block.nbytes for block in on_device) <= self.device_bytes:
                break
            oldest = next(one for one in kept if any(block.on_device for block in one.parts()))
            if self.host_bytes:
                for block in oldest.parts():
                    block.to_host()
            else:
                del self._kept[id(oldest)]
        while self._kept:
            kept = [*self._kept.values()]
            if sum(block.nbytes for block in self._unique(kept, lambda block: not block.on_device)) <= self.host_bytes:
                break
            oldest = next(one for one in kept if not all(block.on_device for block in one.parts()))
            del self._kept[id(oldest)]

    @property
    def nbytes(self) -> tuple[int, int]:
        """On the device, and in the host's memory."""
        kept = [*self._kept.values()]
        device = sum(block.nbytes for block in self._unique(kept, lambda block: block.on_device))
        return device, sum(block.nbytes for block in self._unique(kept, lambda block: not block.on_device))

    def clear(self) -> None:
        self._kept.clear()

    @staticmethod
    def _unique(kept: Sequence[Snapshot], which: Callable[[Block], bool]) -> list[Block]:
        return [*{id(block): block for one in kept for block in one.parts() if which(block)}.values()]

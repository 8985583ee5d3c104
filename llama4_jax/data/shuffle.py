"""The order of an epoch: a permutation of the documents, another one each epoch, that needs no state but its number.

Blocks come in random order, and the documents of a block in random order. A data set that is one block is shuffled as a
whole. One with blocks is read block by block, which is what makes a shuffled read of Parquet possible at all.

grain's own shuffle knows no blocks, and walks through 65 536 numbers to place one document of a small data set.
"""

import functools
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from llama4_jax.data.documents import Document, Documents, hash64

_KEPT = 4_000_000  # numbers of drawn orders to keep: rows of a batch are at different places, and in different epochs


class Shuffled(grain.MapDataset[Document]):
    """Document i of the endless sequence: epoch i // len, place i % len. Every epoch has every document once.

    Raises ValueError for an empty data set, in which no order can be drawn.
    """

    def __init__(self, documents: Documents, seed: tuple[int, ...]):
        if not len(documents):
            raise ValueError("there is nothing to shuffle in an empty data set.")
        super().__init__()
        self._documents = documents
        self._begins = documents.blocks[:-1]
        self._sizes = np.diff(documents.blocks)
        self._seed = seed
        self._blocks = functools.lru_cache(maxsize=4)(self._order_blocks)
        self._block = functools.lru_cache(maxsize=max(4, _KEPT // int(self._sizes.max())))(self._order_block)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: Any) -> Any:  # an int gives a document
        if isinstance(index, slice):  # as every MapDataset
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        order, ends = self._blocks(epoch)
        i = int(np.searchsorted(ends, place, side="right"))
        block = int(order[i])
        inside = self._block(epoch, block)[place - int(ends[i])]  # from the end of the block
        return self._documents[int(self._begins[block] + inside)]

    def _order_blocks(self, epoch: int) -> tuple[Int[np.ndarray, " blocks"], Int[np.ndarray, " blocks"]]:
        """Blocks in the order of the epoch, and the places at which they end."""
        order = _permutation(len(self._sizes), (*self._seed, epoch))
        return order, np.cumsum(self._sizes[order])

    def _order_block(self, epoch: int, block: int) -> Int[np.ndarray, " documents"]:
        return _permutation(int(self._sizes[block]), (*self._seed, epoch, block))


def _permutation(size: int, seed: tuple[int, ...]) -> Int[np.ndarray, " size"]:
    """From PCG64's own stream, which is the same in every version of numpy; `Generator.permutation` need not be."""
    return np.argsort(np.random.PCG64(hash64(repr(seed).encode())).random_raw(size), kind="stable")

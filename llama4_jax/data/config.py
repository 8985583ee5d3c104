"""What a run reads, and how it is cut into batches. Plain values only: the command line is made from this."""

import math
from dataclasses import dataclass
from typing import Literal

from llama4_jax.data.sources import parse_source

LossOn = Literal["all", "replies"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and what a batch is; data/sources.py explains the sources.

    Raises ValueError, naming the field, for values that cannot be.
    """

    # stdlib | docstrings | text:PATH | files:PATH | jsonl:PATH[#FIELD] | parquet:PATH[#COLUMN] | tokens:PATH
    # with pictures: chat:PATH[#FIELD] | pictures:PATH[#FIELD] | digits | digit-pairs
    sources: tuple[str, ...] = ("stdlib",)
    weights: tuple[float, ...] = ()  # how often to draw a document from each source; (): as often as it has documents
    heldout_sources: tuple[str, ...] = ()  # to measure on, whole; (): a share of the sources is held out
    tokenizer: str = "bytes"  # "bytes", or the path of a tokenizer.json, a tokenizer.model or a directory with one
    seq_len: int  # tokens in a row
    batch_size: int  # rows in a batch, of all processes together
    tiles_per_row: int = 0  # room for the tiles of pictures in each row; 0: no pictures
    max_tiles: int = 16  # that a picture is cut into; a smaller, global one comes on top
    loss_on: LossOn = "all"  # what is learnt of a conversation: all of it, or what the assistant says
    heldout_fraction: float = 0.05  # share of the documents that is never trained on, without heldout_sources
    shuffle_seed: int = 0  # the order of the documents, a new one each epoch
    open_documents: int = 16  # that each row reads in turn: the pieces of a long one are as many batches apart
    prefetch: int = 2  # batches made ahead, in a background thread; 0: each when it is asked for

    def __post_init__(self):
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one source, such as stdlib.")
        for spec in (*self.sources, *self.heldout_sources):
            parse_source(spec)
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.sources)} data.sources: give one for "
                f"each, or none."
            )
        for weight in self.weights:
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"data.weights must be positive numbers, got {weight}. Leave the source out instead.")
        for name, least in {
            "seq_len": 1,
            "batch_size": 1,
            "tiles_per_row": 0,
            "max_tiles": 1,
            "shuffle_seed": 0,
            "open_documents": 1,
            "prefetch": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"data.heldout_fraction must be in [0, 1), got {self.heldout_fraction}.")

    @property
    def holds_out(self) -> bool:
        """Whether there is anything to measure on."""
        return bool(self.heldout_sources or self.heldout_fraction)

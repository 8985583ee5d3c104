"""The tiny Llama 4s on which everything is compared, and their tokens.

The reference initialisation (std 0.02) makes parity tests blind: at these sizes a missing temperature changes nothing
that float32 can show. So weights are N(0, 0.08) and the norms are moved away from one. Every sequence reaches past two
attention chunks and several temperature buckets, where implementations differ.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Llama 3's frequency scaling. `original` is tiny so that some of the few frequencies are scaled."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model and one batch of token sequences. Sizes in elements, lengths in tokens."""

    name: str
    vocab: int = 97
    embed: int = 32
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    mlp: int = 48  # width of a dense feed-forward
    expert_mlp: int = 24  # width of a routed expert, and of the shared one
    experts: int = 4
    top_k: int = 1
    moe_interval: int = 1  # 0: no layer has experts
    nope_interval: int = 4
    moe_pattern: tuple[bool, ...] | None = None  # layer by layer instead of by interval
    rope_pattern: tuple[bool, ...] | None = None
    chunk: int | None = 8
    qk_norm: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: Rope | None = None
    temperature: bool = True
    temperature_floor: int = 4
    temperature_coef: float = 0.1
    norm_eps: float = 1e-5
    batch: int = 2
    length: int = 21
    seed: int = 0

    @property
    def moe(self) -> tuple[bool, ...]:
        """Which layers have experts."""
        if self.moe_pattern is not None:
            return self.moe_pattern
        return tuple(self.moe_interval > 0 and (i + 1) % self.moe_interval == 0 for i in range(self.layers))

    @property
    def rope(self) -> tuple[bool, ...]:
        """Which layers rotate queries and keys; the others are NoPE layers."""
        if self.rope_pattern is not None:
            return self.rope_pattern
        return tuple((i + 1) % self.nope_interval != 0 for i in range(self.layers))

    @property
    def meta(self) -> bool:
        """Whether Meta's code can express this model: it knows intervals only, and head_dim = embed / heads."""
        return (
            self.moe_pattern is None
            and self.rope_pattern is None
            and self.embed == self.heads * self.head_dim
            and (self.rope_scaling is None or self.rope_scaling.low == 1)
        )


SCOUT = Case(
    name="scout",
    embed=64,
    layers=8,
    heads=8,
    head_dim=8,
    length=29,
    rope_scaling=Rope(factor=16.0, low=1.0, high=1.0, original=16),
)

MAVERICK = Case(
    name="maverick",
    embed=64,
    layers=8,
    heads=4,
    head_dim=16,
    experts=8,
    moe_interval=2,
    qk_norm=False,
    length=29,
    seed=1,
)

CASES = (
    SCOUT,
    MAVERICK,
    # nine layers are not a multiple of the NoPE interval; every head has its own key and value; two experts a token
    Case(name="top2", embed=48, layers=9, heads=3, kv_heads=3, head_dim=16, experts=3, top_k=2, length=27, seed=2),
    # the pre-trained Scout's blended frequencies; one key/value head for all; an interval of three; nine layers
    Case(
        name="blended-rope",
        layers=9,
        heads=4,
        kv_heads=1,
        nope_interval=3,
        moe_interval=2,
        top_k=2,
        length=40,
        batch=1,
        rope_theta=100.0,
        rope_scaling=Rope(factor=8.0, low=1.0, high=4.0, original=32),
        seed=3,
    ),
    # patterns that no interval gives, heads wider than the embedding, the first layer NoPE
    Case(
        name="irregular",
        embed=40,
        layers=7,
        heads=6,
        kv_heads=3,
        head_dim=16,
        experts=5,
        rope_pattern=(False, True, True, False, True, True, True),
        moe_pattern=(True, False, False, True, True, False, True),
        rope_scaling=Rope(factor=4.0, low=2.0, high=8.0, original=64),
        length=25,
        seed=4,
    ),
    # no experts, no temperature: the plainest
    Case(name="dense", kv_heads=1, moe_interval=0, temperature=False, seed=5),
    # every layer sees the whole past; Hugging Face needs telling by layer types
    Case(name="global", layers=5, chunk=None, kv_heads=4, length=23, seed=6),
)

BY_NAME = {case.name: case for case in CASES}


def tokens(case: Case, *, batch: int | None = None, length: int | None = None, seed: int = 0) -> Int[np.ndarray, "B T"]:
    """Random token ids, int64; the same for the same arguments."""
    shape = (case.batch if batch is None else batch, case.length if length is None else length)
    return np.random.default_rng([case.seed, seed]).integers(0, case.vocab, shape)

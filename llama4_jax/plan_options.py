"""The flags of `llama4 plan`. Apart from `plan.py`, so that the command line shows them without importing jax."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

StepKind = Literal["train", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Say what a step costs on a pod that is not here: memory, work, network, estimated time. All flags of train.py
    change the config, as they do there."""

    name: tyro.conf.Positional[str]  # a config of configs/, a .py file, or a model such as scout, maverick
    topology: str  # v5p:4x4x8, v5e:4x4, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, h100:4x8
    step: StepKind = "train"
    batch: int | None = None  # rows of the whole batch; None: the config's
    context: int | None = None  # tokens of a row, or of the cache; None: the config's
    weights: Literal["int8", "int4", "fp8"] | None = None  # as `llama4 quantize` makes them; training: LoRA's base
    group: int | None = None  # inputs that share a scale; None: 128 for int4, all for others
    cache: Literal["int8"] | None = None  # of prefill and decode; None: bfloat16
    slots: int | None = None  # price a server of so many slots of --context tokens, with --step decode: by formulas
    held: tuple[int, ...] = ()  # with --slots: tokens that each row holds, to say how fast it can be; none: a range
    search: bool = False  # rank the meshes that fit, and compile the best few
    json: Path | None = None  # write the figures there, too

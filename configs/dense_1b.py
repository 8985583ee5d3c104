"""A dense student of 1.8 B parameters with Llama 4's attention, on 16 accelerators of 80 GB or more.

Needs a `tokenizer.model` and JSON Lines with a field "text", at the paths below or others:

    python train.py dense_1b --data.sources "jsonl:/data/*.jsonl"
"""

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import Precision
from llama4_jax.model.presets import preset
from llama4_jax.sharding import MeshConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config() -> RunConfig:
    return RunConfig(
        name="dense_1b",
        model=preset("dense_1b"),
        data=DataConfig(
            sources=("jsonl:data/*.jsonl",), tokenizer="tokenizer.model", seq_len=8192, batch_size=128,
            heldout_fraction=0.001,
        ),
        optimizer=OptimizerConfig(schedule="wsd", peak_lr=6e-4, warmup_steps=1000),
        precision=Precision(params="float32", compute="bfloat16"),
        mesh=MeshConfig(data=-1, fsdp=16),
        steps=100_000,
        grad_accumulation=2,  # so that what `remat` keeps, 25 GB of a device, leaves room
        remat="dots",
        eval_every=1000,
        checkpoint_every=1000,
    )  # fmt: skip

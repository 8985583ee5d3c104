"""Maverick's text model from scratch, on 128 chips of a TPU v5p or a multiple of them.

Needs a `tokenizer.model` and Parquet files with a column "text", at the paths below or others:

    python train.py maverick_pretrain --data.sources "parquet:/data/*.parquet"

Sizes of the model are Meta's. The rest is ours: Meta has published neither its schedule nor its batch.
"""

import dataclasses

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import Precision
from llama4_jax.model.presets import preset
from llama4_jax.sharding import MeshConfig
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config() -> RunConfig:
    return RunConfig(
        name="maverick_pretrain",
        # With 128 experts a loss alone balances slowly, so a bias does.
        model=dataclasses.replace(preset("maverick"), router_bias=True),
        data=DataConfig(
            sources=("parquet:data/*.parquet",), tokenizer="tokenizer.model", seq_len=8192, batch_size=512,
            heldout_fraction=0.001,
        ),
        optimizer=OptimizerConfig(schedule="wsd", peak_lr=2e-4, warmup_steps=2000),
        balance=BalanceConfig(bias_rate=1e-3, z=1e-3),
        precision=Precision(params="float32", compute="bfloat16"),
        mesh=MeshConfig(data=-1, fsdp=2, expert=64),
        steps=250_000,
        remat="full",
        eval_every=1000,
        checkpoint_every=1000,
        keep_checkpoints=3,
    )  # fmt: skip

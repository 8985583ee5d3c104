"""A small Scout, of 6.3 B parameters of which a token uses 1.7 B, on 16 chips of a TPU v6e or a multiple of them.

Needs a `tokenizer.model` and Parquet files with a column "text", at the paths below or others:

    python train.py scout_6b --data.sources "parquet:/data/*.parquet"

Scout's experts, chunks, RoPE and vocabulary at a width and depth of ours.
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
    scout = preset("scout")
    return RunConfig(
        name="scout_6b",
        model=dataclasses.replace(
            scout, embed_dim=2048, num_layers=24, num_heads=16, num_kv_heads=8, mlp_dim=8192, expert_mlp_dim=2048
        ),
        data=DataConfig(
            sources=("parquet:data/*.parquet",), tokenizer="tokenizer.model", seq_len=8192, batch_size=256,
            heldout_fraction=0.001,
        ),
        optimizer=OptimizerConfig(schedule="wsd", peak_lr=4e-4, warmup_steps=2000),
        balance=BalanceConfig(switch=1e-2, z=1e-3),
        precision=Precision(params="float32", compute="bfloat16"),
        mesh=MeshConfig(data=-1, expert=16),
        steps=100_000,
        grad_accumulation=8,
        remat="full",
        eval_every=1000,
        checkpoint_every=1000,
    )  # fmt: skip

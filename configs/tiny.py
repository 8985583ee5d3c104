"""A small, complete Llama 4 on the Python standard library: about five minutes on four cores of a CPU."""

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.presets import preset
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config() -> RunConfig:
    return RunConfig(
        name="tiny",
        model=preset("tiny"),
        data=DataConfig(sources=("stdlib",), tokenizer="bytes", seq_len=512, batch_size=4),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=50),
        balance=BalanceConfig(bias_rate=1e-3),
        steps=600,
        eval_every=200,
        eval_batches=64,
        checkpoint_every=200,
    )

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
        data=DataConfig(sources=("stdlib",), tokenizer="bytes", seq_len=384, batch_size=8),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=40),
        balance=BalanceConfig(switch=1e-2),  # and no bias, so that the model can be exported
        steps=400,
        eval_every=100,
        eval_batches=32,
        checkpoint_every=100,
    )

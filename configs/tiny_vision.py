"""A small Llama 4 that learns to read handwritten digits: minutes on four cores of a CPU."""

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.presets import preset
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config() -> RunConfig:
    return RunConfig(
        name="tiny_vision",
        model=preset("tiny_vision"),
        data=DataConfig(
            sources=("digits", "digit-pairs", "docstrings"),
            weights=(12.0, 12.0, 1.0),
            tokenizer="bytes",
            seq_len=384,
            batch_size=8,
            tiles_per_row=8,
            max_tiles=1,
            loss_on="replies",
            heldout_fraction=0.1,
            open_documents=1,
        ),
        optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=50),
        balance=BalanceConfig(bias_rate=1e-3),
        steps=800,
        eval_every=200,
        eval_batches=32,
        checkpoint_every=200,
        sample_prompt="Return ",
    )

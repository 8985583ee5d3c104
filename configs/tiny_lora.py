"""LoRA on the tiny model, on a CPU in about two minutes: what wrote Python's library learns to write docstrings.

python train.py tiny && python train.py tiny_lora
python infer.py generate runs/tiny_lora --prompt "Return "
llama4 merge runs/tiny_lora runs/tiny_merged
"""

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import LoraConfig
from llama4_jax.model.presets import preset
from llama4_jax.train.optimizer import OptimizerConfig


def config() -> RunConfig:
    return RunConfig(
        name="tiny_lora",
        model=preset("tiny"),
        init_from="runs/tiny",
        lora=LoraConfig(rank=8, alpha=16.0),
        data=DataConfig(sources=("docstrings",), tokenizer="bytes", seq_len=384, batch_size=8),
        optimizer=OptimizerConfig(peak_lr=4e-3, warmup_steps=10, weight_decay=0.0),
        steps=150,
        eval_every=50,
        checkpoint_every=50,
        sample_prompt="Return ",
    )

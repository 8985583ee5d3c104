"""Teach a language model to see, in the published two stages: first the vision encoder and the projector learn while
the language model stays as it is, then everything learns together. On 256 chips of a TPU v5p or more.

Begins from a directory with a Scout in it; an encoder that it lacks begins anew. Reads conversations about pictures and
illustrated text, at the paths below or others:

    python train.py scout_vision --init-from path/to/Llama-4-Scout --data.sources "chat:/data/*.jsonl"

That there are two stages is published; their lengths, rates and data are ours.
"""

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import Precision
from llama4_jax.model.presets import preset
from llama4_jax.sharding import MeshConfig
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.freeze import FreezeConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config() -> RunConfig:
    return RunConfig(
        name="scout_vision",
        model=preset("scout_vision"),
        init_from="Llama-4-Scout-17B-16E",
        freeze=(FreezeConfig(paths=("embed", "decoder", "final_norm", "lm_head"), until=5_000),),
        data=DataConfig(
            sources=("pictures:data/captions/*.parquet", "chat:data/chat/*.jsonl"), tokenizer="tokenizer.model",
            seq_len=8192, batch_size=256, tiles_per_row=34, loss_on="replies", heldout_fraction=0.001,
        ),
        optimizer=OptimizerConfig(schedule="wsd", peak_lr=5e-5, warmup_steps=500),
        balance=BalanceConfig(switch=1e-2, z=1e-3),
        precision=Precision(params="float32", compute="bfloat16"),
        mesh=MeshConfig(data=-1, fsdp=16, expert=16),
        steps=25_000,
        remat="full",
        eval_every=500,
        checkpoint_every=500,
        keep_checkpoints=3,
    )  # fmt: skip

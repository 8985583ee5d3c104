"""Adapt Scout with LoRA: low-rank factors beside every linear layer of the decoder, those of each routed expert among
them, learn; router, embedding and output head stay. On 8 chips of 80 GB, or a multiple, beside the base in bfloat16; or
on one, beside a base of four bits:

    python train.py scout_lora --init-from path/to/Llama-4-Scout --data.sources "chat:/data/*.jsonl"

    llama4 quantize path/to/Llama-4-Scout runs/scout-int4 --weights int4
    python train.py scout_lora --init-from runs/scout-int4 --grad-accumulation 8 --data.sources "chat:/data/*.jsonl"
    llama4 plan scout_lora --topology h100:1 --weights int4 --grad-accumulation 8

Rank, rate and batch are ours: the rate is about ten times that of training all parameters.
"""

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import LoraConfig, Precision
from llama4_jax.model.presets import preset
from llama4_jax.sharding import MeshConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config() -> RunConfig:
    return RunConfig(
        name="scout_lora",
        model=preset("scout"),
        init_from="Llama-4-Scout-17B-16E",
        lora=LoraConfig(rank=16, alpha=32.0),
        data=DataConfig(
            sources=("chat:data/chat/*.jsonl",), tokenizer="tokenizer.model", seq_len=4096, batch_size=8,
            loss_on="replies", heldout_fraction=0.01,
        ),
        optimizer=OptimizerConfig(peak_lr=2e-4, warmup_steps=20, weight_decay=0.0, b2=0.999),
        precision=Precision(params="bfloat16", compute="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=-1),
        remat="full",
        steps=1_000,
        eval_every=100,
        checkpoint_every=100,
    )  # fmt: skip

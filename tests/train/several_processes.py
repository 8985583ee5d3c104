"""Runs of `train.py` in several processes of this machine, as if each were a host of its own with two devices.

The model is the smallest that has all that a mesh can split: experts, heads that share keys, chunks of a sequence.
"""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from micro_run import ROOT, WORDS, environment

STEPS, EVERY = 12, 4

CONFIG = f"""
from pathlib import Path

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import ModelConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config():
    here = Path(__file__).parent
    return RunConfig(
        name="micro",
        run_dir=str(here),
        model=ModelConfig(
            vocab_size=320, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
            expert_mlp_dim=16, num_experts=2, nope_interval=2, moe_interval=2, attention_chunk=16,
            temperature_floor=16, context_length=64,
        ),
        data=DataConfig(sources=(f"text:{{here / 'text.txt'}}",), seq_len=32, batch_size=8, heldout_fraction=0.3),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=4),
        scan_layers=False,
        steps={STEPS},
        eval_every={STEPS},
        eval_batches=2,
        checkpoint_every={EVERY},
        keep_checkpoints=9,
        log_every=1,
        sample_tokens=2,
    )
"""


def new_place(folder: Path) -> Path:
    """A new directory with a config.py whose run is `micro` within it, and its data."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS.split(), k=12)) for _ in range(4000))
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "config.py").write_text(CONFIG)
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start_all(
    places: list[Path], *options: str, script: tuple[str, ...] = (str(ROOT / "train.py"),)
) -> list[subprocess.Popen]:
    """One process for each place, of one run."""
    port = free_port()
    processes = []
    for number, place in enumerate(places):
        hosts = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(len(places)),
            "JAX_PROCESS_ID": str(number),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *script, str(place / "config.py"), *options],
                cwd=ROOT, env={**environment(place), **hosts}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return processes

"""Runs of `train.py` in several processes of this machine, as if each were a host of its own.

The model is the smallest that has all that a mesh can split: experts, heads that share keys, a whole sequence.
Started as a script, this file copies a checkpoint in as many processes as it is told.
"""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from micro_run import ROOT, WORDS, end, environment

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
            vocab_size=320, embed_dim=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
            expert_mlp_dim=16, num_experts=2, nope_interval=1, moe_interval=1, temperature_floor=16,
            context_length=64,
        ),
        data=DataConfig(
            sources=(f"text:{{here.parent / 'text.txt'}}",), seq_len=32, batch_size=8, heldout_fraction=0.3
        ),
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
    """A new directory with a config.py whose run is `micro` within it; the data are beside it."""
    folder.mkdir()
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS.split(), k=12)) for _ in range(4000))
    (folder.parent / "text.txt").write_text("\n".join(lines))
    (folder / "config.py").write_text(CONFIG)
    return folder


def start_all(
    place: Path, options: list[list[str]], command: list[str] | None = None, *, where: list[Path] | None = None
) -> list[subprocess.Popen]:
    """A process of one run for each list of options: `train.py` with the config of the place, or another command. A
    single one is told of no others.

    - where: the working directory of each
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    command = command or [str(ROOT / "train.py"), str(place / "config.py")]
    processes = []
    for number, (own, directory) in enumerate(zip(options, where or [ROOT] * len(options), strict=True)):
        variables = environment()
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), variables.get("PYTHONPATH", "")])
        if len(options) > 1:
            variables |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(len(options)),
                "JAX_PROCESS_ID": str(number),
            }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, *command, *own], cwd=directory, env=variables, **pipes))
    return processes


def run_all(*args, **kwargs) -> list[subprocess.CompletedProcess]:
    """Ends all that `start_all` starts. None of the others is left behind if one does not end."""
    return end_all(start_all(*args, **kwargs))


def end_all(processes: list[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    try:
        return [end(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def copy_checkpoint(source: str, target: str, devices: str) -> None:
    """In each process: read the newest checkpoint of a run, split over all devices, and write it as another run's."""
    import jax

    from llama4_jax.train import hosts

    hosts.connect()
    jax.config.update("jax_num_cpu_devices", int(devices))
    from jax.sharding import NamedSharding, PartitionSpec

    from llama4_jax.weights.checkpoint import Checkpoints

    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    read, write = Checkpoints(source, read_only=True), Checkpoints(target)
    (step, saved) = read.steps()[-1], read._manager.item_metadata(read.steps()[-1])

    def places(item: str) -> dict[str, jax.ShapeDtypeStruct]:
        found = {}
        for name, x in saved[item].items():
            axis = next((i for i, size in enumerate(x.shape) if size % mesh.size == 0), None)
            split = PartitionSpec(*[None] * axis, "all") if axis is not None else PartitionSpec()
            found[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))
        return found

    got = read.newest(abstract=lambda: (places("model"), places("training")))
    write.save(step, got.model, got.training, got.progress)
    write.wait()
    write.close()


if __name__ == "__main__":
    copy_checkpoint(*sys.argv[1:])

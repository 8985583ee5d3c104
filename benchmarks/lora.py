"""A step of LoRA against one of training all parameters: time and memory, interleaved, each in a process of its own.

    python benchmarks/lora.py                       # the model of configs/tiny.py, its batch, rank 8
    python benchmarks/lora.py --rounds 5 --steps 6 --quantized int4

Prints for each contender the median seconds of a step over the rounds, with the least and the greatest, and memory:
parameters, moments and gradients, which LoRA makes small; and all that the compiled step takes, as XLA says, with the
activations, which it does not. Ratios are to training all parameters, of the medians. Where a machine does other work
beside it, look at the range.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, and bytes, of one contender."""
    import time

    import jax
    import numpy as np

    from llama4_jax.configs import load_config
    from llama4_jax.data.batch import Batch
    from llama4_jax.model.config import LoraConfig
    from llama4_jax.model.quantized import is_of_decoder
    from llama4_jax.ops.quantization import Scheme, scale_of
    from llama4_jax.sharding import MeshConfig, make_mesh
    from llama4_jax.train.next_token import next_token
    from llama4_jax.train.step import make_trainer
    from llama4_jax.weights.load import QuantizedMatrices

    config, base = dataclasses.replace(load_config("tiny"), remat=options.remat), None
    if name != "full":
        config = dataclasses.replace(config, lora=LoraConfig(rank=options.rank))
    if name == "lora on few bits":
        scheme = Scheme(options.quantized, 32 if options.quantized == "int4" else None)
        of_scale = scale_of(np.ones(1, np.float32), scheme).dtype
        base = QuantizedMatrices(lambda n: scheme if is_of_decoder(n) else None, lambda n: of_scale)
    trainer = make_trainer(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), next_token, base)
    shape, draw = (config.data.batch_size, config.data.seq_len), np.random.default_rng(0)
    tokens = draw.integers(0, 256, shape, dtype=np.int32)
    ones, places = np.ones_like(tokens), np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(tokens, np.roll(tokens, -1, 1), places, ones, ones.astype(np.float32), ones)
    with jax.set_mesh(trainer.mesh):
        state = trainer.init()
        of_state = sum(x.nbytes for x in jax.tree.leaves(state))
        gradients = sum(4 * x.size for x in jax.tree.leaves(state.params))
        compiled = trainer.step.lower(trainer.abstract, batch, None).compile().memory_analysis()
        times = []
        for _ in range(options.steps + 1):
            start = time.perf_counter()
            state, metrics = trainer.step(state, batch, None)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
    whole = of_state + compiled.temp_size_in_bytes  # gradients are among what is temporary
    return {"seconds": statistics.median(times[1:]), "state": of_state + gradients, "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="in each round, after one that is not counted")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--quantized", choices=["int4", "int8", "fp8"], help="also LoRA beside a base of few bits")
    parser.add_argument("--remat", default="none", help="of the backward pass, as in a run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    names = ["full", "lora", *(["lora on few bits"] if options.quantized else [])]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    more = ["--rank", str(options.rank), "--remat", options.remat]
    more += ["--quantized", options.quantized] if options.quantized else []
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--steps", str(options.steps)]
            run = subprocess.run([*command, *more], capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{'':<18}{'s a step':>9}  {'range':<15}{'x faster':>9}{'state MiB':>14}{'whole MiB':>14}")
    full = found["full"]
    for name, rounds in found.items():
        seconds = sorted(one["seconds"] for one in rounds)
        median = statistics.median(seconds)
        faster = statistics.median(one["seconds"] for one in full) / median
        memory = [
            f"{rounds[0][kind] / 2**20:.1f} {rounds[0][kind] / full[0][kind]:>4.0%}" for kind in ("state", "whole")
        ]
        spread = f"{seconds[0]:.3f}-{seconds[-1]:.3f}"
        print(f"{name:<18}{median:>9.3f}  {spread:<15}{faster:>9.2f}{memory[0]:>14}{memory[1]:>14}")


if __name__ == "__main__":
    main()

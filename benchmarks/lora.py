"""A step of LoRA against one of training all parameters: time and memory, interleaved, each in a process of its own.

    python benchmarks/lora.py                       # the model of configs/tiny.py, its batch, rank 8
    python benchmarks/lora.py --rounds 5 --steps 6 --quantized int4

Prints for each contender the median seconds of a step over the rounds, with the least and the greatest, and two measures
of memory: what the state takes (parameters, moments), and what the compiled step needs beside it, as XLA says. Ratios
are of the medians. Machines that do other work beside it are noisy: look at the range.
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


def measure(name: str, steps: int, rank: int, weights: str | None) -> dict[str, float]:
    """Seconds of each step, and bytes, of one contender."""
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

    config, base = load_config("tiny"), None
    if name != "full":
        config = dataclasses.replace(config, lora=LoraConfig(rank=rank))
    if name == "lora on few bits":
        scheme = Scheme(weights, 32 if weights == "int4" else None)
        of_scale = scale_of(np.ones(1, np.float32), scheme).dtype
        base = QuantizedMatrices(lambda n: scheme if is_of_decoder(n) else None, lambda n: of_scale)
    trainer = make_trainer(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), next_token, base)
    shape, draw = (config.data.batch_size, config.data.seq_len), np.random.default_rng(0)
    tokens = draw.integers(0, 256, shape, dtype=np.int32)
    ones, places = np.ones_like(tokens), np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(tokens, np.roll(tokens, -1, 1), places, ones, ones.astype(np.float32), ones)
    with jax.set_mesh(trainer.mesh):
        state = trainer.init()
        of_state = sum(x.nbytes if x.dtype.itemsize else 0 for x in jax.tree.leaves(state))
        compiled = trainer.step.lower(trainer.abstract, batch, None).compile().memory_analysis()
        times = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            state, metrics = trainer.step(state, batch, None)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[1:]), "state": of_state, "beside": compiled.temp_size_in_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="in each round, after one that is not counted")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--quantized", choices=["int4", "int8", "fp8"], help="also LoRA beside a base of few bits")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.steps, options.rank, options.quantized)))
        return
    names = ["full", "lora", *(["lora on few bits"] if options.quantized else [])]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    more = ["--quantized", options.quantized] if options.quantized else []
    for _ in range(options.rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--steps", str(options.steps)]
            run = subprocess.run([*command, "--rank", str(options.rank), *more], capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(run.stderr)
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
    full = found["full"][0], statistics.median(one["seconds"] for one in found["full"])
    print(f"{'':<18}{'s a step':>9}  {'range':<15}{'x faster':>9}{'state MiB':>11}{'beside MiB':>12}{'of full':>9}")
    for name, rounds in found.items():
        seconds = sorted(one["seconds"] for one in rounds)
        median, memory = statistics.median(seconds), rounds[0]["state"] + rounds[0]["beside"]
        share = memory / (full[0]["state"] + full[0]["beside"])
        print(
            f"{name:<18}{median:>9.3f}  {f'{seconds[0]:.3f}-{seconds[-1]:.3f}':<15}{full[1] / median:>9.2f}"
            f"{rounds[0]['state'] / 2**20:>11.1f}{rounds[0]['beside'] / 2**20:>12.1f}{share:>9.0%}"
        )


if __name__ == "__main__":
    main()

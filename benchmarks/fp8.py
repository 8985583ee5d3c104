"""Does training in 8-bit floats keep quality? The tiny model on real text, by each recipe, beside bfloat16's noise.

    python benchmarks/fp8.py docs/fp8.png                # trains what is not trained yet, then draws; --jobs 2

Every run sees the same data in the same order. The recipes begin with the parameters of seed 0; bfloat16 with three
seeds, whose gaps to seed 0 are the noise that a gap has to be held against. Two controls are meant to do worse:
the router in 8 bits, and products of e5m2. The gap is that of the training loss, relative, smoothed (exponentially, 0.9
a ten steps); the number in the table is its mean over the last fifth of the run.

The model is small and the runs are short: this can show that a recipe is wrong, not that it is right at scale.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
LOG_EVERY = 10

RUNS: dict[str, list[str]] = {
    "bf16, seed 0": ["--precision.matmul", "bf16"],
    "bf16, seed 1": ["--precision.matmul", "bf16", "--seed", "1"],
    "bf16, seed 2": ["--precision.matmul", "bf16", "--seed", "2"],
    "fp8": ["--precision.matmul", "fp8"],
    "fp8_row": ["--precision.matmul", "fp8_row"],
    "fp8_block": ["--precision.matmul", "fp8_block"],
    "fp8, router too": ["--precision.matmul", "fp8", "--precision.rules", "*.moe.router=fp8"],
    "fp8_e5m2": ["--precision.matmul", "fp8_e5m2"],
}
SEEDS = [name for name in RUNS if name.startswith("bf16")]
CONTROLS = ("fp8, router too", "fp8_e5m2")


def train(name: str, flags: list[str], options: argparse.Namespace) -> None:
    """Goes on where an earlier call was interrupted; does nothing for a run that is done."""
    directory = name.replace(", ", "_").replace(" ", "_")
    command = [
        sys.executable, ROOT / "train.py", "tiny", "--name", directory, "--run-dir", options.runs, *flags,
        "--steps", options.steps, "--data.batch-size", 4, "--data.seq-len", 256, "--log-every", LOG_EVERY,
        "--eval-every", options.steps, "--checkpoint-every", 500, "--keep-checkpoints", 1,
    ]  # fmt: skip
    log = options.runs / f"{directory}.log"
    with log.open("a") as out:
        subprocess.run([str(part) for part in command], stdout=out, stderr=out, check=True, cwd=ROOT)
    print(f"{name}: done", file=sys.stderr)


def losses(name: str, options: argparse.Namespace) -> np.ndarray:
    """The training loss, every LOG_EVERY steps, smoothed."""
    directory = options.runs / name.replace(", ", "_").replace(" ", "_")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row["loss"] for row in rows if "loss" in row}
    values = np.array([by_step[step] for step in range(LOG_EVERY, options.steps + 1, LOG_EVERY)])
    smooth, average = np.empty_like(values), values[0]
    for i, value in enumerate(values):
        average = 0.9 * average + 0.1 * value
        smooth[i] = average
    return smooth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    options.runs = options.runs.absolute()
    options.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: train(*run, options), RUNS.items()))

    curves = {name: losses(name, options) for name in RUNS}
    base = curves[SEEDS[0]]
    gaps = {name: 100 * (curve - base) / base for name, curve in curves.items()}
    band = np.max([np.abs(gaps[name]) for name in SEEDS], axis=0)
    last = len(base) // 5
    print(f"| {options.steps} steps | smoothed loss at the end | gap to bf16, last fifth |\n|---|---|---|")
    for name, gap in gaps.items():
        kind = " (control)" if name in CONTROLS else ""
        shown = "—" if name == SEEDS[0] else f"{gap[-last:].mean():+.2f} %"
        print(f"| {name}{kind} | {curves[name][-1]:.4f} | {shown} |")
    print(f"\nNoise of bf16's seeds, last fifth: ±{band[-last:].mean():.2f} %")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    steps = LOG_EVERY * np.arange(1, len(base) + 1)
    axes.fill_between(steps, -band, band, color="0.85", label="bf16, three seeds")
    for name, gap in gaps.items():
        if name not in SEEDS:
            axes.plot(steps, gap, "--" if name in CONTROLS else "-", label=name, linewidth=1.3)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss against bf16, %")
    seen = np.concatenate([gap[len(base) // 10 :] for gap in gaps.values()])
    axes.set_ylim(seen.min() - 0.5, seen.max() + 0.5)
    axes.legend(fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()

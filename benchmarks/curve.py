"""The picture of a training run: bits per byte of train and held-out text, over steps.

pip install -e ".[test]" && python benchmarks/curve.py runs/tiny docs/tiny.png
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="directory of a run")
    parser.add_argument("picture", type=pathlib.Path, help="the .png to write")
    options = parser.parse_args()
    lines = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    figure, (loss, load) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, label, style in (
        ("bits_per_byte", "train", "-"),
        ("heldout_bits_per_byte", "held-out", "o-"),
    ):
        loss.plot(*series(lines, name), style, label=label)
    loss.set(xlabel="step", ylabel="bits per byte")
    load.plot(*series(lines, "max_violation"), label="MaxVio: busiest expert over the mean, less one")
    load.plot(*series(lines, "load_entropy"), label="entropy of the load, of its maximum")
    load.set(xlabel="step", ylim=(0, None))
    for axes in (loss, load):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=110)


def series(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


if __name__ == "__main__":
    main()

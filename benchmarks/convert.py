"""Converting a checkpoint both ways: peak memory, and speed beside a plain copy of the same bytes.

    python benchmarks/convert.py                      # about 6.1 GB of bfloat16, three rounds; needs 20 GB of disk
    python benchmarks/convert.py --layers 4 --rounds 1 --directory /some/disk

A synthetic Hugging Face checkpoint of a Scout-like model (16 experts, in several shards; random bits, all finite) is
copied, converted to Orbax, exported to Hugging Face's format and to Meta's (8 ranks), in turn, each in a process of its
own; the copy is synced to disk, and so is what is converted. Peak memory is the process's high-water mark (VmHWM), the
pages of mapped files included. Figures are medians, with the lowest and the highest.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SIZES = {
    "vocab_size": 202_048,
    "embed_dim": 1024,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 64,
    "mlp_dim": 4096,
    "expert_mlp_dim": 2048,
    "num_experts": 16,
}


def make_checkpoint(path: pathlib.Path, layers: int, shards: int) -> int:
    """Returns its bytes."""
    import ml_dtypes

    from llama4_jax.model.config import ModelConfig
    from llama4_jax.weights import table
    from llama4_jax.weights.hf_config import to_hf_config
    from llama4_jax.weights.safetensors import INDEX, create_safetensors

    config = ModelConfig(num_layers=layers, **SIZES)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(to_hf_config(config)))
    dtype = np.dtype(ml_dtypes.bfloat16)
    shapes = {n: row.file_shape(row.hf[0]) for row in table.rows(config) for n in row.hf[0].names}
    names = list(shapes)
    rng, total, weight_map = np.random.default_rng(0), 0, {}
    for i in range(shards):
        own = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        tensors = create_safetensors(path / file, {name: (dtype, shapes[name]) for name in own})
        for name, tensor in tensors.items():
            flat = tensor.map("r+").reshape(-1).view(np.uint16)
            for start in range(0, flat.size, 2**24):
                part = flat[start : start + 2**24]
                part[:] = rng.integers(0, 0x7F80, part.size, np.uint16)  # every finite number that is not negative
            total += flat.nbytes
            weight_map[name] = file
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return total


def peak_mib() -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def sync(directory: pathlib.Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def work(task: str, source: str, destination: str) -> None:
    """One task in this process, which prints its seconds and its peak memory."""
    start = time.perf_counter()
    if task == "copy":
        shutil.copytree(source, destination)
    else:
        from absl import logging

        from llama4_jax.weights.convert import convert, export

        logging.set_verbosity(logging.ERROR)

        if task == "convert":
            convert(source, destination)
        else:
            export(source, destination, format=task.removeprefix("export_"), shards=8)
    sync(pathlib.Path(destination))
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak_mib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="on the disk to measure; the system's temporary directory by default")
    parser.add_argument("--json", type=pathlib.Path, help="write every figure here")
    args = parser.parse_args()

    root = pathlib.Path(tempfile.mkdtemp(prefix="llama4_convert_", dir=args.directory))
    try:
        size = make_checkpoint(root / "hf", args.layers, args.shards)
        sync(root)
        print(f"{size / 1e9:.2f} GB in {args.shards} shards")
        figures: dict[str, list[dict]] = {"copy": [], "convert": [], "export_hf": [], "export_meta": []}
        for _ in range(args.rounds):
            for task, answers in figures.items():
                source, out = root / ("run" if task.startswith("export") else "hf"), root / "out"
                command = [sys.executable, __file__, "--work", task, str(source), str(out)]
                answers.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
                shutil.rmtree(root / "run", ignore_errors=True) if task == "convert" else None
                out.rename(root / "run") if task == "convert" else shutil.rmtree(out)
        copy = statistics.median(answer["seconds"] for answer in figures["copy"])
        print("| task | MB/s | of the copy's speed | peak memory |\n|---|---|---|---|")
        for task, answers in figures.items():
            seconds = sorted(answer["seconds"] for answer in answers)
            median = statistics.median(seconds)
            peak = max(answer["peak_mib"] for answer in answers)
            spread = f"{size / 1e6 / seconds[-1]:,.0f}–{size / 1e6 / seconds[0]:,.0f}"
            print(f"| {task} | {size / 1e6 / median:,.0f} ({spread}) | {copy / median:.2f} | {peak:,.0f} MiB |")
        if args.json:
            args.json.write_text(json.dumps({"bytes": size, **figures}, indent=1))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main()

"""The README's table of plans: what the large models cost on named pods, one line each, compiled here and run nowhere.

    python benchmarks/plans.py                       # all lines, a few minutes each
    python benchmarks/plans.py --only scout decode   # those of this model and this step

Needs `pip install libtpu`, and no TPU.
"""

import argparse
import sys
import time

from llama4_jax.plan import plan_step, work_of
from llama4_jax.plan_options import PlanOptions
from sharding import MeshConfig
from sharding.chips import topology

# model or config, step, topology, rows, context, mesh, flags
LINES = [
    ("scout_pretrain", "train", "v5p:4x4x8", 1024, 8192, MeshConfig(data=1, fsdp=8, expert=16), []),
    ("maverick_pretrain", "train", "v5p:4x4x8", 512, 8192, MeshConfig(data=1, fsdp=2, expert=64), []),
    (
        "behemoth_like",
        "train",
        "v5p:8x8x16",
        1024,
        8192,
        MeshConfig(data=1, fsdp=64, expert=16),
        ["--remat", "offload"],
    ),
    ("scout", "decode", "v5e:4x4", 16, 8192, MeshConfig(data=1, expert=2, tensor=8), []),
    ("maverick", "decode", "v6e:8x8", 64, 8192, MeshConfig(data=1, expert=8, tensor=8), []),
    ("behemoth_like", "decode", "v5p:4x4x8", 128, 8192, MeshConfig(data=1, expert=16, tensor=8), []),
]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="a model, a step, or both")
    only = set(parser.parse_args(arguments).only)
    print("| model | step | rows x tokens | chips | mesh | GiB a chip | executed / model FLOPs | read / needed | binds "
          "| est. step | est. MFU, all to no overlap |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, step, where, rows, context, mesh, flags in LINES:
        if {name, step, name.removesuffix("_pretrain")} >= only:
            print(line(name, step, where, rows, context, mesh, flags), flush=True)
    return 0


def line(name: str, step: str, where: str, rows: int, context: int, mesh: MeshConfig, flags: list[str]) -> str:
    work = work_of(PlanOptions(name=name, topology=where, step=step, batch=rows, context=context), flags)
    started = time.perf_counter()
    plan = plan_step(work, mesh, topology(where))
    print(f"{name} {step} on {where}: {time.perf_counter() - started:.0f} s to plan", file=sys.stderr)
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    worst = plan.model_flops / plan.peak / plan.seconds_without_overlap
    read = f"{plan.traffic / plan.model_traffic:.2f}" if plan.model_traffic else "–"
    utilization = "–" if step == "decode" else f"{plan.utilization:.0%} to {worst:.0%}"
    return (f"| {name.removesuffix('_pretrain')} | {step} | {rows} x {context} | {where} | {axes} "
            f"| {plan.bytes / 2**30:.1f} of {plan.memory / 2**30:.0f}{'' if plan.fits else ' (does not fit)'} "
            f"| {plan.flops / plan.model_flops:.2f} | {read} | {plan.binds} | {_time(plan.seconds)} "
            f"| {utilization} |")  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

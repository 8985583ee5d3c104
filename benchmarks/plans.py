"""The README's table of plans: what the large models cost on named pods, one line each, compiled here and run nowhere.

    python benchmarks/plans.py                       # all lines, a few minutes each
    python benchmarks/plans.py --only scout decode   # those of this model and this step
    python benchmarks/plans.py --only int4           # those with these weights

Needs `pip install libtpu`, and no TPU. GPUs have no compiler without a GPU: their lines are formulas.
"""

import argparse
import sys
import time
from typing import NamedTuple

from llama4_jax.plan import plan_step, work_of
from llama4_jax.plan_options import PlanOptions
from llama4_jax.sharding import MeshConfig
from llama4_jax.sharding.chips import topology


class Line(NamedTuple):
    model: str  # or config
    step: str
    topology: str
    rows: int
    context: int
    mesh: MeshConfig
    weights: str | None = None
    cache: str | None = None
    flags: tuple[str, ...] = ()


LINES = [
    Line("scout_pretrain", "train", "v5p:4x4x8", 1024, 8192, MeshConfig(data=1, fsdp=8, expert=16)),
    Line("maverick_pretrain", "train", "v5p:4x4x8", 512, 8192, MeshConfig(data=1, fsdp=2, expert=64)),
    Line("behemoth_like", "train", "v5p:8x8x16", 1024, 8192, MeshConfig(data=1, fsdp=64, expert=16),
         flags=("--remat", "offload")),
    Line("scout", "decode", "v5e:4x4", 16, 8192, MeshConfig(data=1, expert=2, tensor=8)),
    Line("maverick", "decode", "v6e:8x8", 64, 8192, MeshConfig(data=1, expert=8, tensor=8)),
    Line("behemoth_like", "decode", "v5p:4x4x8", 128, 8192, MeshConfig(data=1, expert=16, tensor=8)),
    Line("scout", "decode", "v5e:2x4", 8, 8192, MeshConfig(data=1, tensor=8), "int4", "int8"),
    Line("scout", "decode", "h100:1", 1, 131072, MeshConfig(data=1), "int4"),
    Line("scout", "decode", "h100:1", 1, 262144, MeshConfig(data=1), "int4", "int8"),
    Line("maverick", "decode", "h100:8", 8, 131072, MeshConfig(data=1, expert=8), "fp8"),
]  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="a model, a step, a topology, int4 …, or several")
    only = set(parser.parse_args(arguments).only)
    print("| model | step | rows x tokens | chips | mesh | GiB a chip | executed / model FLOPs | read / needed | binds "
          "| sent / by hand | est. step | est. MFU, all to no overlap |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for line in LINES:
        name = line.model.removesuffix("_pretrain")
        if {line.model, name, line.step, line.topology, line.weights, line.cache} >= only:
            print(row(line, name), flush=True)
    return 0


def row(line: Line, name: str) -> str:
    where = topology(line.topology)
    options = PlanOptions(name=line.model, topology=line.topology, step=line.step, batch=line.rows,
                          context=line.context, weights=line.weights, cache=line.cache)  # fmt: skip
    started = time.perf_counter()
    plan = plan_step(work_of(options, list(line.flags)), line.mesh, where)
    print(f"{line.model} {line.step} on {where.name}: {time.perf_counter() - started:.0f} s to plan", file=sys.stderr)
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "–"
    worst = plan.model_flops / plan.peak / plan.seconds_without_overlap
    read = f"{plan.traffic / plan.model_traffic:.2f}" if plan.model_traffic else "–"
    executed = f"{plan.flops / plan.model_flops:.2f}"
    by_hand = sum(sent.by_hand or 0.0 for sent in plan.sent)
    sent = f"{sum(sent.bytes for sent in plan.sent) / by_hand:.3f}" if by_hand else "–"
    if not where.chip.torus:
        executed, read = "formulas", "formulas"
    utilization = "–" if line.step == "decode" else f"{plan.utilization:.0%} to {worst:.0%}"
    bits = f", {line.weights}" if line.weights else ""
    bits += f", cache {line.cache}" if line.cache else ""
    return (f"| {name}{bits} | {line.step} | {line.rows} x {line.context} | {line.topology} | {axes} "
            f"| {plan.bytes / 2**30:.1f} of {plan.memory / 2**30:.0f}{'' if plan.fits else ' (does not fit)'} "
            f"| {executed} | {read} | {plan.binds} | {sent} | {_time(plan.seconds)} | {utilization} |")  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

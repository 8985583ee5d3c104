"""What a GPU shows of this project in eight minutes: whether it computes right, and how fast.

    PYTHONPATH=. python benchmarks/gpu.py                                    # one H100 or H200, eight minutes
    PYTHONPATH=. python benchmarks/gpu.py --only right,train --minutes 4 --json out.json
    PYTHONPATH=. JAX_PLATFORMS=cpu python benchmarks/gpu.py --tiny           # the same code on a CPU: two minutes

Parts, from the most to the least valuable: ceilings (what the card copies and multiplies), right (every op against
float64, the tiny model against a CPU's numbers), train and decode (slices of Scout and Maverick of real width), peers
(transformers on the same weights). Each is a process of its own with a time limit; the time that one leaves is shared
by those that follow. A part that fails or hangs keeps what it has measured, and the next one runs. The table is printed
and the JSON written after every part.

It needs jax with its CUDA plugin, flax, optax, einops, jaxtyping, etils, msgspec and numpy; the peers also torch,
transformers, safetensors and xxhash. It needs no network, nor grain, tyro or tensorboardX. Nothing need be installed:
it runs from the repository.
"""

import argparse
import contextlib
import faulthandler
import importlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
SHARES = {"ceilings": 0.4, "right": 1.6, "train": 2.4, "decode": 2.0, "peers": 1.6}  # of eight minutes
# What a part imports beside what jax, flax and numpy bring along.
NEEDS = {part: ("msgspec",) for part in ("right", "train", "decode")}
NEEDS["peers"] = ("torch", "transformers", "safetensors", "msgspec", "xxhash")
# Memory is taken as it is needed, since some parts hold torch beside JAX; and a second run finds its programs compiled.
DEFAULTS = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "llama4_jax_gpu_programs"),
}
EVERY_PART_NEEDS = ("jax", "flax", "optax", "einops", "jaxtyping", "etils", "numpy", "ml_dtypes")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.part:
        return work(options)
    missing = {name for part in options.only for name in (*EVERY_PART_NEEDS, *NEEDS.get(part, ())) if not there(name)}
    if missing:
        print(f"gpu.py: not installed: {', '.join(sorted(missing))}. Bring wheels: pip download --no-deps "
              f"{' '.join(sorted(missing))}", file=sys.stderr)  # fmt: skip
        if missing & set(EVERY_PART_NEEDS):
            return 2
    started = time.monotonic()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M"), "tiny": options.tiny, "minutes": options.minutes,
                              "parts": []}  # fmt: skip
    for index, part in enumerate(options.only):
        left = 60 * options.minutes - (time.monotonic() - started)
        limit = left * SHARES[part] / sum(SHARES[name] for name in options.only[index:])
        command = [sys.executable, str(HERE / "gpu.py"), "--part", part, "--cases", options.cases,
                   *(["--tiny"] if options.tiny else [])]  # fmt: skip
        print(f"gpu.py: {part}, {limit:.0f} s at most …", file=sys.stderr, flush=True)
        result["parts"].append(run_part(part, command, limit, result["parts"]))
        print(table(result["parts"][-1:]), flush=True)
        if options.json is not None:
            write(options.json, json.dumps(result, indent=1))
    print(summary(result["parts"]), flush=True)
    return 0 if all(not wrong(part) for part in result["parts"]) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SHARES), help=f"parts, of {', '.join(SHARES)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there, after every part")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only those in whose name this is found")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on whatever platform: does it run at all?")
    parser.add_argument("--record", action="store_true", help="write the numbers that `right` compares with: on a CPU")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)  # a part's own process
    parser.add_argument("--limit", type=float, default=600.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        re.compile(options.cases)
    except re.error as error:
        parser.error(f"--cases {options.cases!r} is no regular expression: {error}.")
    asked = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in SHARES]:
        parser.error(f"--only has {', '.join(unknown)}: expected some of {', '.join(SHARES)}.")
    if not asked:
        parser.error(f"--only is empty: expected some of {', '.join(SHARES)}.")
    if not 0 < options.minutes <= 1000:
        parser.error(f"--minutes must be above 0 and at most 1000, got {options.minutes}.")
    options.only = [name for name in SHARES if name in asked]
    if options.record:
        options.part, options.only = "right", ["right"]
    return options


def there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ---------------------------------------------------------------------------------------------------------------------
# The parent: it never imports jax, so that the card is the part's alone.


def run_part(part: str, command: Sequence[str], limit: float, before: Sequence[dict] = ()) -> dict:
    """Runs a part's process, which writes a record a line; ends it, with all that it started, once it has had `limit`
    seconds and a few more to end by itself.

    Returns part, status ("done", "failed: …" or "stopped: …"), seconds and records.
    """
    start = time.monotonic()
    given = {p["part"]: {r["case"]: r["figures"] for r in p["records"] if r.get("figures")} for p in before}
    environment = {**DEFAULTS, **os.environ, "GPU_PARTS_GIVEN": json.dumps(given)}
    found: dict[str, Any] = {"part": part, "status": "", "seconds": 0.0, "records": []}
    process = subprocess.Popen([*command, "--limit", f"{limit:.1f}"], stdout=subprocess.PIPE, text=True,
                               env=environment, start_new_session=True)  # fmt: skip

    def read():
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # a line that was cut
                found["records"].append(json.loads(line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(limit + min(10.0, 1 + limit / 10))
        found["status"] = "done" if code == 0 else f"failed: exit code {code}"
    except subprocess.TimeoutExpired:
        found["status"] = f"stopped: it ran past its {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it began a session of its own: these are its processes
        process.wait()
        reader.join(5)
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


def wrong(part: dict) -> list[str]:
    """What is not as it should be: a part that did not end, cases that failed or gave wrong numbers."""
    cases = [r["case"] for r in part["records"] if r.get("error") or (r.get("figures") or {}).get("ok") is False]
    return ([part["status"]] if part["status"] != "done" else []) + cases


def table(parts: Sequence[dict]) -> str:
    lines = []
    for part in parts:
        lines += ["", f"## {part['part']}: {part['status']}, {part['seconds']:.0f} s", ""]
        for record in part["records"]:
            if record.get("error"):
                shown = f"FAILED {record['error']}"
            elif record.get("skipped"):
                shown = f"skipped: {record['skipped']}"
            else:
                figures = dict(record.get("figures") or {})
                ok = {True: "ok     ", False: "WRONG  ", None: ""}[figures.pop("ok", None)]
                shown = ok + "  ".join(f"{name} {number(value)}" for name, value in figures.items())
            compiled = f"  [compiled in {record['compile_seconds']} s]" if "compile_seconds" in record else ""
            lines.append(f"{record['case']:<44} {shown}{compiled}")
    return "\n".join(lines)


def number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def summary(parts: Sequence[dict]) -> str:
    lines = ["", "## what is wrong"]
    lines += [f"{part['part']}: {what}" for part in parts for what in wrong(part)] or ["nothing"]
    skipped = sum(1 for part in parts for record in part["records"] if record.get("skipped"))
    return "\n".join([*lines, f"{skipped} cases had no time left: --minutes gives more"])


def write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    os.replace(new, path)


# ---------------------------------------------------------------------------------------------------------------------
# A part's process.


def work(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.limit
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    faulthandler.dump_traceback_later(options.limit + 0.5)  # where it hangs, if it does
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    from gpu_parts.report import Out

    def send(record: dict) -> None:
        print(json.dumps(record, default=float), file=answers, flush=True)

    module = importlib.import_module(f"gpu_parts.{options.part}")
    if options.record:
        module.record()
        return 0
    out = Out(send, deadline, json.loads(os.environ.get("GPU_PARTS_GIVEN", "{}")), options.cases)
    run_inside(module.run, out, options.tiny)
    return 0


def run_inside(run: Callable, out: Any, tiny: bool) -> None:
    """A part, in this process. Without a GPU only a tiny one."""
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu" and not tiny:
        raise SystemExit(f"gpu.py: JAX sees no GPU here but {device.device_kind!r}. --tiny runs anywhere.")
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "numpy")
    out.case("machine", lambda: {"device": device.device_kind, **{name: version(name) for name in names}})
    run(out, tiny)


if __name__ == "__main__":
    sys.exit(main())

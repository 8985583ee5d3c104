"""Train and use a model; look at weights on disk, convert them, and hold them against the reference; plan a run.

    llama4 train    tiny                                        # as train.py: a config, and its fields as flags
    llama4 generate runs/tiny  --prompt "def "                  # as infer.py; so are chat, batch and score
    llama4 serve    runs/tiny  --port 8000                      # OpenAI's API, and a page to talk with
    llama4 inspect  path                                        # format, config, every tensor; --verify: damage
    llama4 convert  path/to/hf_or_meta_dir  runs/scout          # → Orbax; --dtype bfloat16, --verify
    llama4 export   runs/scout  path/to/out  --format hf        # or meta; --shards 8; adapters alone: peft
    llama4 merge    runs/my-lora  runs/merged                   # LoRA's adapters into the weights of their base
    llama4 quantize runs/scout  runs/scout-int4  --weights int4 # or int8, fp8; --group 32
    llama4 parity   path/to/hf_dir                              # against transformers, layer by layer
    llama4 diff     runs/scout  path/to/hf_dir                  # the weights alone: which tensors differ, and how
    llama4 plan     scout_pretrain  --topology v5p:4x4x8        # what a step costs on a pod that is not here; --search

Results go to stdout, progress to stderr. Exit codes: 0, 1 (parity, diff: they differ; plan: it does not
fit), 2 (the arguments or files do not serve; one line says why).
"""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Literal

import tyro

from llama4_jax.plan_options import PlanOptions
from llama4_jax.serve_options import ServeOptions
from llama4_jax.weights.parity import ParityOptions

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a directory of weights holds."""

    path: tyro.conf.Positional[Path]  # of Hugging Face, Meta, or ours
    tensors: bool = False  # list every tensor, not those of equal shape together
    verify: bool = False  # read every value instead, and say which arrays are damaged: exit code 2 if any is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Make a directory of ours, with an Orbax checkpoint, of a Hugging Face or Meta one, or of PEFT's adapters."""

    source: tyro.conf.Positional[Path]
    destination: tyro.conf.Positional[Path]
    dtype: Dtype | None = None  # of all tensors; None: as they are
    keep_quantized: bool = False  # values of 8 or 4 bits stay as they are, with their scales; else they become bfloat16
    base: Path | None = None  # of PEFT's adapters: what they belong on, in any format; None: what they name
    verify: bool = False  # read everything back and compare it bit for bit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Make a directory of ours of one with LoRA's adapters: its base, with the adapters in its weights."""

    run: tyro.conf.Positional[Path]
    destination: tyro.conf.Positional[Path]
    dtype: Dtype | None = None  # of all tensors; None: as the base has them, and of quantized ones bfloat16
    verify: bool = False  # read everything back and compare it bit for bit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a directory of ours as a Hugging Face or Meta directory, with adapters merged; or its adapters for PEFT."""

    run: tyro.conf.Positional[Path]
    destination: tyro.conf.Positional[Path]
    format: Literal["hf", "meta", "peft"]
    shards: int | None = None  # files (Meta: one a model-parallel rank); None: of 5 GB (Meta: one)
    dtype: Dtype | None = None  # of all tensors; None: as they are
    verify: bool = False  # read everything back and compare it bit for bit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Make a directory of ours whose decoder has matrices of few bits, and say of every tensor what it became. Kept as
    they are: router, embedding, output head, norms, biases, and the vision encoder."""

    source: tyro.conf.Positional[Path]  # of ours, Hugging Face, or Meta
    destination: tyro.conf.Positional[Path]
    weights: Literal["int8", "int4", "fp8"]  # int4 with a scale for each group of inputs, others for each output
    group: int | None = None  # inputs that share a scale; None: 128 for int4, all for others
    dtype: Dtype | None = None  # of what is kept; None: as it is
    verify: bool = False  # read everything back and compare it bit for bit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diff:
    """Say which tensors of two directories differ, by how much and how, without running them. Exit code 0: none, 1:
    some, 2: they cannot be compared."""

    ours: tyro.conf.Positional[Path]  # of Hugging Face, Meta, or ours
    reference: tyro.conf.Positional[Path]  # the same; what is right
    tolerance: float = 0.0  # up to which a number may differ, as a fraction of the largest of its tensor
    json: Path | None = None  # write every difference to this file


def main(arguments: list[str] | None = None) -> int:
    commands = {"inspect": Inspect, "convert": Convert, "export": Export, "merge": Merge, "quantize": Quantize,
                "parity": ParityOptions, "diff": Diff, "plan": PlanOptions, "serve": ServeOptions}  # fmt: skip
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:
        from llama4_jax.train_cli import main as train

        return train(arguments[1:], prog="llama4 train")
    if arguments[:1] and arguments[0] in ("generate", "chat", "batch", "score"):
        from llama4_jax.infer_cli import main as infer

        return infer(arguments, prog="llama4")
    if arguments[:1] == ["--version"]:
        print("llama4-jax", importlib.metadata.version("llama4-jax"))
        return 0
    try:
        if arguments[:1] == ["plan"] and "--help" not in arguments and "-h" not in arguments:
            from llama4_jax.plan import main as plan  # its further flags are those of a config

            return plan(arguments[1:])
        return _run(tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="llama4", description=__doc__))
    except (ValueError, OSError) as error:
        print(f"llama4: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("llama4: interrupted; the same command goes on.", file=sys.stderr)
        return 130


def _run(command: Inspect | Convert | Merge | Export | Quantize | ParityOptions | Diff | ServeOptions) -> int:
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is meant: no jax arrays, nothing to merge
    match command:
        case Inspect():
            from llama4_jax.weights.inspect import describe, verify

            if command.verify:
                damaged = verify(command.path, say=print)
                if damaged:
                    raise ValueError(f"{len(damaged)} damaged:\n  " + "\n  ".join(damaged))
                return 0
            print(describe(command.path, every_tensor=command.tensors))
        case Convert():
            from llama4_jax.weights.convert import convert

            with _Progress(f"{command.source} → {command.destination}") as progress:
                done = convert(
                    command.source,
                    command.destination,
                    dtype=command.dtype,
                    keep_quantized=command.keep_quantized,
                    base=command.base,
                    verify=command.verify,
                    report=progress.report,
                    say=_to_stderr,
                )
            progress.say(done, command.destination)
        case Merge():
            from llama4_jax.weights.convert import merge

            with _Progress(f"{command.run} → {command.destination}") as progress:
                how = {"dtype": command.dtype, "verify": command.verify}
                done = merge(command.run, command.destination, **how, report=progress.report)
            progress.say(done, command.destination)
        case Export():
            from llama4_jax.weights.convert import export

            with _Progress(f"{command.run} → {command.destination}") as progress:
                done = export(
                    command.run,
                    command.destination,
                    format=command.format,
                    shards=command.shards,
                    dtype=command.dtype,
                    verify=command.verify,
                    report=progress.report,
                )
            progress.say(done, command.destination)
        case Quantize():
            from llama4_jax.ops.quantization import Scheme
            from llama4_jax.weights.quantize import quantize

            group = 128 if command.group is None and command.weights == "int4" else command.group
            with _Progress(f"{command.source} → {command.destination}") as progress:
                made = quantize(
                    command.source,
                    command.destination,
                    Scheme(command.weights, group),
                    dtype=command.dtype,
                    verify=command.verify,
                    report=progress.report,
                    say=_to_stderr,
                )
            print(made.table)
            progress.say(made.done, command.destination)
        case ParityOptions():
            from llama4_jax.weights.parity import run

            report = run(command, say=_to_stderr)
            print(report.text())
            return 0 if report.passed else 1
        case Diff():
            from llama4_jax.weights.parity import diff
            from llama4_jax.weights.source import open_weights

            ours, reference = (open_weights(path) for path in (command.ours, command.reference))
            found = diff(ours, reference, tolerance=command.tolerance, say=_to_stderr)
            if command.json is not None:
                command.json.parent.mkdir(parents=True, exist_ok=True)
                command.json.write_text(json.dumps(found.as_json(), indent=1, allow_nan=False), encoding="utf-8")
            print(found.text())
            return 0 if found.equal else 1
        case ServeOptions():
            _serve(command)
    return 0


def _serve(options: ServeOptions) -> None:
    try:
        from llama4_jax.serve.command import serve
    except ModuleNotFoundError as error:
        if (error.name or "llama4_jax").startswith("llama4_jax"):
            raise
        raise ValueError(
            f'llama4 serve needs the package {error.name}, which an extra installs: pip install -e ".[serve]"'
        ) from None
    from llama4_jax.infer_cli import Model, load, make_devices, read_processor
    from llama4_jax.sharding import MeshConfig

    model = Model(
        model=options.model,
        dtype=options.dtype,
        mesh=MeshConfig(data=1, fsdp=options.fsdp, expert=options.expert, tensor=options.tensor),
        keep_quantized=options.keep_quantized,
        activations=options.activations,
        template=options.template,
    )
    make_devices(model.mesh)
    serve(options, read_processor=lambda: read_processor(model), load=lambda: load(model)[0])


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class _Progress:
    """A bar on stderr, once there is something to do: bytes, rate, time left."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def report(self, done: int, total: int) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=done, total=total)

    def say(self, done, destination: Path) -> None:
        seconds = self._bar.tasks[0].elapsed or 0.0
        earlier = f", {done.resumed} of them from before it was interrupted" if done.resumed else ""
        print(f"{destination}: {done.tensors} tensors{earlier}, {done.bytes / 2**30:,.2f} GiB, in {seconds:,.1f} s")


if __name__ == "__main__":
    sys.exit(main())

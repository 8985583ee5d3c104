"""Where a run's figures go: the console, metrics.jsonl and TensorBoard. And how fast the machine could be, for MFU."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llama4_jax.atomic import in_bucket, write_atomically
from llama4_jax.sharding.chips import of_kind
from llama4_jax.train import hosts
from llama4_jax.train.step import StepMetrics
from llama4_jax.untrusted_json import parse_json


def peak_flops(num_devices: int) -> float | None:
    """Operations a second that the devices could do at best; None where that is not known.

    Of a CPU it is measured, in float32: its virtual devices share one machine. Of several hosts' CPUs it is not known.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_flops() if hosts.count() == 1 else None
    chip = of_kind(device.device_kind)
    return None if chip is None else chip.bf16 * num_devices


def _measured_cpu_flops(size: int = 1024, rounds: int = 5) -> float:
    seconds = []
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices("cpu")[:1])):  # whatever mesh is in use
        x = jnp.ones((size, size), jnp.float32)
        product = jax.jit(lambda x: x @ x)
        jax.block_until_ready(product(x))
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(product(x))
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def figures(metrics: StepMetrics) -> dict[str, float]:
    """The metrics of one step as numbers, under the names they have in metrics.jsonl."""
    got = jax.device_get(metrics)
    loss, target_bytes = float(got.loss), float(got.target_bytes)
    values = {
        "loss": loss,
        "bits_per_byte": loss * float(got.tokens) / math.log(2) / max(target_bytes, 1),
        "grad_norm": float(got.grad_norm),
        "learning_rate": float(got.learning_rate),
        "tokens": int(got.tokens),
        "skipped": int(got.skipped),
    }
    if got.balance is not None:
        values |= {name: float(value) for name, value in got.balance._asdict().items()}
    return values


class Log:
    """Appends to metrics.jsonl and TensorBoard, and shows a bar on a terminal or plain lines elsewhere.

    Of several processes the first one does; in the others it is silent.
    """

    def __init__(self, run: epath.PathLike, *, first_step: int, steps: int):
        run, leads = epath.Path(run), hosts.index() == 0
        self._file = None
        if leads:
            path = run / "metrics.jsonl"
            _forget_after(path, first_step)
            self._file = _LinesInBucket(path) if in_bucket(path) else path.open("a")
        self._board = None
        self._board_directory = run / "tensorboard"
        self.console = Console(highlight=False, soft_wrap=True, quiet=not leads)
        self._progress = None
        if leads and self.console.is_terminal:
            self._progress = Progress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._task = self._progress.add_task("", total=steps, completed=first_step, text="starting …")
            self._progress.start()
        self._steps = steps

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard. Raises OSError if the disk does not take them."""
        if self._file is None:
            return
        with self._said_where():
            self._write(step, values)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **{k: _json_number(v) for k, v in values.items()}}) + "\n")
        if not isinstance(self._file, _LinesInBucket):
            self._file.flush()
        if self._board is None:
            self._board = _Board(self._board_directory)
        self._board.write(step, {name: value for name, value in values.items() if isinstance(value, int | float)})

    def show(self, step: int, text: str) -> None:
        """The state of the run, in one line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        else:
            self.say(f"step {step}/{self._steps}  {text}")

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def flush(self) -> None:
        """What was written before is kept, whatever happens next."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        with self._said_where():
            if self._file is not None:
                self._file.close()
            if self._board is not None:
                self._board.close()

    @contextlib.contextmanager
    def _said_where(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"the figures of the run could not be written beside {self._board_directory}: "
                f"{error.strerror or error}. Make room, then run the same command to go on from the last checkpoint."
            ) from error


class _Board:
    """The files that TensorBoard reads. They are written in the thread of the caller: tensorboardX's own writer has
    another, which a full disk ends, and then waits for it for ever."""

    def __init__(self, directory: epath.Path):
        from tensorboardX.event_file_writer import EventsWriter  # heavy, and not needed before the first figure

        directory.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(directory / "events"))
        self._flushed = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        if time.monotonic() - self._flushed > 60:  # which may be an upload
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def _json_number(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class _LinesInBucket:
    """A file of lines in a bucket, where nothing can be appended: it is written anew, not oftener than every minute."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._lines = [path.read_text()] if path.exists() else []
        self._written = time.monotonic()

    def write(self, line: str) -> None:
        self._lines.append(line)
        if time.monotonic() - self._written > 60:
            self.flush()

    def flush(self) -> None:
        write_atomically(self._path, "".join(self._lines))
        self._written = time.monotonic()

    close = flush


class _Line(msgspec.Struct):
    step: int


def _forget_after(path: epath.Path, step: int) -> None:
    """Drops lines of steps after `step`, which a resumed run takes again, and a last line that was cut in writing."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if parse_json(line, where=str(path), of=_Line).step <= step:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept))

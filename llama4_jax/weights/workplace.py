"""Writing a model's tensors part by part, several at a time, so that it goes on where it was interrupted.

Everything is written beside the destination and renamed when it is complete: a destination that exists is whole. A list
of finished tensors is kept there.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from llama4_jax.atomic import write_atomically
from llama4_jax.weights import table
from llama4_jax.weights.table import Index, Shape, bits

# Of a part. Small enough that a few in flight are little, large enough that a file a part is no burden.
PART_BYTES = 16 * 2**20
_THREADS = 4
_SEAL_BYTES = 128 * 2**20  # of finished tensors, before they are forced to the disk together

# What belongs to a model beside its weights and config, in either format.
COMPANIONS = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "byte_tokenizer.json",
    "generation_config.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md",
)  # fmt: skip
SOURCE_CONFIG = "source_config.json"  # of what was converted, as it was

Report = Callable[[int, int], None]  # bytes done, bytes in all


@dataclasses.dataclass(frozen=True)
class Done:
    """What a conversion did."""

    tensors: int
    bytes: int  # written, in all
    resumed: int  # tensors that were there from an earlier, interrupted call


@dataclasses.dataclass(frozen=True)
class Job:
    """One of our tensors, to be written."""

    name: str
    shape: Shape
    dtype: np.dtype
    per_byte: int = 1  # numbers that share a byte
    beside: int = 0  # bytes of what is written along with it: its scales

    @property
    def bytes(self) -> int:
        return self.bytes_of(self.shape) + self.beside

    def bytes_of(self, shape: Shape) -> int:
        """Of a part of it."""
        return math.prod(shape) * self.dtype.itemsize // self.per_byte


@dataclasses.dataclass(frozen=True)
class Write:
    """How one tensor is written: in parts of this shape, by this function; and the files that then hold it."""

    part: Shape
    write: Callable[[Index], None]
    files: Callable[[], Iterable[Path]]


class Workplace:
    """The directory beside a destination where it is made, and the list of what is finished in it."""

    def __init__(self, destination: Path, identity: Mapping[str, Any], jobs: Sequence[Job]):
        self.destination, self.jobs = destination, jobs
        self.path = destination.with_name(destination.name + ".unfinished")
        self._journal = self.path / "finished.jsonl"
        self._identity = json.dumps(identity, sort_keys=True)
        self.done = Done(len(jobs), sum(job.bytes for job in jobs), 0)

    def __enter__(self) -> "Workplace":
        if self.destination.exists():
            raise FileExistsError(f"{self.destination} exists already: choose another destination, or remove it.")
        finished: list[str] = []
        if self._journal.exists():
            first, *finished = self._journal.read_text().splitlines()
            if first != self._identity:
                raise ValueError(
                    f"{self.path} is of another conversion that was interrupted: go on with that one, or remove it."
                )
        self._finished = set(finished) & {job.name for job in self.jobs}
        taken = sum(file.stat().st_blocks * 512 for file in self.path.rglob("*") if file.is_file())
        left = self.done.bytes - taken
        parent = next(p for p in self.path.parents if p.exists())
        free = shutil.disk_usage(parent).free
        if left > free:
            raise OSError(
                f"no room for {self.destination}: {left / 2**30:,.2f} GiB are to be written, and {free / 2**30:,.2f} "
                f"GiB are free there. Make room, or choose another destination."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        # anew, as its last line may be cut short
        names = [job.name for job in self.jobs if job.name in self._finished]
        write_atomically(self._journal, "".join(line + "\n" for line in [self._identity, *names]))
        self.done = dataclasses.replace(self.done, resumed=len(self._finished))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception):
            error.add_note(f"What is finished is kept in {self.path}: the same command goes on with it.")

    def run(self, prepare: Callable[[Job], Write], report: Report) -> None:
        """Writes every tensor that is not finished, several parts at a time."""
        done = sum(job.bytes for job in self.jobs if job.name in self._finished)
        report(done, self.done.bytes)
        left: dict[str, int] = {}  # parts of each tensor that is begun
        running: dict[Future[None], tuple[Job, Write, int]] = {}
        whole: list[tuple[Job, Write]] = []  # finished, but perhaps not on the disk yet
        sealing: list[Future[None]] = []
        # The disk writes what is finished while the rest is computed; what the journal names is on the disk.
        with self._journal.open("a") as journal, ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(_THREADS) as pool:

            def seal(batch: Sequence[tuple[Job, Write]]) -> None:
                for file in {file for _, write in batch for file in write.files()}:
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
                journal.write("".join(job.name + "\n" for job, _ in batch))
                journal.flush()

            def collect(until: int) -> None:
                nonlocal done
                while len(running) > until:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job, write, size = running.pop(future)
                        future.result()
                        done += size
                        left[job.name] -= 1
                        if not left[job.name]:
                            done += job.beside
                            whole.append((job, write))
                        report(done, self.done.bytes)
                if sum(job.bytes for job, _ in whole) > _SEAL_BYTES:
                    sealing.append(disk.submit(seal, whole.copy()))
                    whole.clear()

            try:
                for job in self.jobs:
                    if job.name in self._finished:
                        continue
                    write = prepare(job)
                    parts = list(parts_of(job.shape, write.part))
                    left[job.name] = len(parts)
                    for part in parts:
                        size = job.bytes_of(tuple(s.stop - s.start for s in part))
                        running[pool.submit(write.write, part)] = (job, write, size)
                        collect(_THREADS)  # so that a part waits for each thread, and no more are held
                collect(0)
            finally:
                pool.shutdown(cancel_futures=True)
                sealing.append(disk.submit(seal, whole.copy()))
            for future in sealing:
                future.result()

    def array(self, name: str) -> Path:
        """Where one of our tensors is until a checkpoint is made of all of them."""
        return self.path / "arrays" / _stored_name(name)

    def finish(self, made: Path) -> None:
        """Puts what was made at the destination."""
        made.rename(self.destination)
        shutil.rmtree(self.path)


def parts_of(shape: Shape, part: Shape) -> Iterator[Index]:
    steps = [range(0, size, step) for size, step in zip(shape, part, strict=True)]
    for starts in itertools.product(*steps):
        yield tuple(slice(a, min(a + n, size)) for a, n, size in zip(starts, part, shape, strict=True))


def identity_of(directory: Path) -> dict[str, str]:
    """Of what is converted: where it is, and that it did not change since."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    stamps = [f"{path.relative_to(directory)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return {"path": str(directory.resolve()), "files": hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]}


# The bits that are all ones in what is not finite: the exponent, or, without infinities, all but the sign.
_NOT_FINITE = {
    "float32": np.uint32(0x7F800000),
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float8_e4m3fn": np.uint8(0x7F),
}
_BLOCK = 2**17  # numbers that stay in a core's cache while they are looked at


def finite(values: np.ndarray, name: str) -> np.ndarray:
    """The values, row-major in memory. Raises ValueError if one is not finite."""
    values = table.row_major(values)
    flat, mask = bits(values).reshape(-1), _NOT_FINITE.get(values.dtype.name)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        finite = np.isfinite(block.view(values.dtype)).all() if mask is None else (block & mask).max() != mask
        if not finite:
            raise ValueError(
                f"{name} holds a value that is not finite (NaN or infinity): "
                f"the file is damaged, or the model diverged."
            )
    return values


def same(name: str, written: np.ndarray, read: np.ndarray) -> None:
    if not np.array_equal(bits(written), bits(read)):
        raise OSError(f"{name} reads back otherwise than it was written: the disk is at fault.")


def copy_companions(source: Path, made: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            write_atomically(made / name, (source / name).read_bytes())


def make_run(work: Workplace, names: Iterable[str], config_json: str, source: Path) -> Path:
    """Puts the arrays of these names (`Workplace.array`) together: a directory of ours with a checkpoint, this config,
    and what belongs to the model in `source`. Returns where it is until `Workplace.finish`."""
    # Here, since Orbax takes a second to import.
    from llama4_jax.weights.orbax_arrays import make_checkpoint

    made = work.path / "made"
    _bring_back(made, work.path / "arrays")
    make_checkpoint(made, {_stored_name(name): work.array(name) for name in names})
    write_atomically(made / "config.json", config_json)
    copy_companions(source, made)
    return made


def _stored_name(name: str) -> str:
    """Of one of our tensors in a checkpoint: as of a model whose layers are one by one."""
    for ours, stored in (("layers.", "decoder.rest."), ("vision.layers.", "vision.rest.")):
        if name.startswith(ours):
            return f"params.{stored}{name.removeprefix(ours)}"
    return f"params.{name}"


def _bring_back(made: Path, arrays: Path) -> None:
    """Undoes what an interrupted call had begun to put together."""
    for metadata in list((made / "checkpoints").glob("**/zarr.json")):
        metadata.parent.rename(arrays / metadata.parent.name)
    shutil.rmtree(made, ignore_errors=True)

"""Orbax checkpoints of a run: written in the background, whole or not at all, and read back piece by piece.

    runs/tiny/checkpoints/200/{model, training, progress}

`model` holds parameters and balance biases under names joined by dots, so that inference reads them alone; `training`
what else the optimizer needs; `progress` is JSON: the step, and where each process stands in its data. Orbax
writes into a directory with a temporary name and renames it when it is complete, so a killed run leaves no half
checkpoint that could be taken for a whole one. Each process writes what its devices hold, and reads what they will,
whichever processes wrote it; all of them must see the same directory. Every stored piece of an array has a checksum
(`checked_arrays`), and so has `progress`: what is damaged is noticed when it is read.
"""

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from llama4_jax.atomic import AnyPath, in_bucket
from llama4_jax.weights.checked_arrays import reason_of, say_errors_once, tree_handler

MODEL, TRAINING, PROGRESS = "model", "training", "progress"
LOOKS = 10  # for a checkpoint, while another process replaces them
_CHECKSUM = "crc32"  # in progress: of the rest of it

# So that a part of an array that stacks layers can be read, and exported, without the rest.
_SAVE_ARGS = ocp.SaveArgs(chunk_byte_size=32 * 2**20)


class OtherArrays(ValueError):
    """A sound checkpoint, but of another model or optimizer than the one asked for."""


class Saved(NamedTuple):
    step: int
    model: dict[str, jax.Array]
    training: dict[str, jax.Array] | None
    progress: dict[str, Any]


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths, joined by dots."""

    def name(path) -> str:
        return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")

    return {name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """A pytree like `tree` with these leaves instead, by the names of `named_leaves`."""
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)])


class Checkpoints:
    """The checkpoints of one run directory.

    `say` is called with a line when a damaged checkpoint is passed over.
    """

    def __init__(
        self, run: epath.PathLike, *, keep: int = 2, say: Callable[[str], None] = print, read_only: bool = False
    ):
        run = epath.Path(run)
        self.directory = (run if in_bucket(run) else run.resolve()) / "checkpoints"
        self._say, self._read_only = say, read_only
        if not read_only:
            say_errors_once()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, create=not read_only, read_only=read_only
        )
        writers = {MODEL: tree_handler(), TRAINING: tree_handler(), PROGRESS: ocp.JsonCheckpointHandler()}
        self._handlers = {  # to read, also what was written without checksums
            MODEL: ocp.StandardCheckpointHandler(),
            TRAINING: ocp.StandardCheckpointHandler(),
            PROGRESS: ocp.JsonCheckpointHandler(),
        }
        self._open: Callable[[], ocp.CheckpointManager] = lambda: ocp.CheckpointManager(
            self.directory, options=options, item_handlers=writers
        )
        self._manager = self._open()

    def steps(self) -> list[int]:
        """Of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, model: dict, training: dict, progress: dict) -> None:
        """Starts to write a checkpoint and returns once the arrays are copied. Raises OSError if this one or the one
        before could not be written; earlier checkpoints stay as they are."""
        self._guard(
            step,
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        MODEL: ocp.args.PyTreeSave(model, dict.fromkeys(model, _SAVE_ARGS)),
                        TRAINING: ocp.args.PyTreeSave(training),
                        PROGRESS: ocp.args.JsonSave(with_checksum(progress)),
                    }
                ),
            ),
        )

    def wait(self) -> None:
        """Returns once everything is written. Raises OSError if it could not be."""
        self._guard(None, self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits as `wait` does, and raises as it does."""
        self._guard(None, self._manager.close)

    def _guard(self, step: int | None, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            kept = ", ".join(str(s) for s in self.steps() if s != step) or "none"
            room = ""
            if not in_bucket(self.directory):
                room = f" ({shutil.disk_usage(self.directory).free / 2**20:,.0f} MiB are free there)"
            raise OSError(
                f"a checkpoint could not be written to {self.directory}{room}: {reason_of(error)}\n"
                f"The earlier checkpoints are intact: {kept}. Make room, then run the same command to go on."
            ) from error

    def newest(self, *, abstract: Callable[[], tuple[dict, dict | None]] | None = None) -> Saved | None:
        """The newest checkpoint that can be read; None if there is none at all.

        - abstract: gives the shapes, dtypes and shardings of the model and of the training state (None: not read);
          by default the model is read as it was saved, and the training state is not

        A damaged checkpoint is said aloud, and the one before it is tried; once one is read, the damaged ones after it
        are renamed to `<step>.damaged`. One is damaged if any process cannot read what it needs of it, be it that a
        checksum does not fit. Raises ValueError if all are damaged, which changes nothing; and if a sound one holds
        other arrays than those asked for.
        """
        for _ in range(LOOKS):
            found, damaged, replaced = self._newest_of(self.steps()[::-1], abstract)
            if not replaced:
                break
            self._manager.reload()
        else:
            raise OSError(replaced_too_often(self.directory))
        if found is None and damaged:
            reason = next(iter(damaged.values()))
            raise ValueError(all_damaged(self.directory, sorted(damaged), reason))
        if found is not None:
            self._set_aside(list(damaged))
        return found

    def _newest_of(self, steps: list[int], abstract) -> tuple[Saved | None, dict[int, str], bool]:
        """The first of these that can be read; the damaged ones before it, and why; and whether another process, which
        trains the run that is only read here, has meanwhile replaced one that could not be."""
        damaged: dict[int, str] = {}
        for step in steps:
            found, reason = None, None
            try:
                progress = read_progress(self.directory / str(step))
                model, training = abstract() if abstract else (None, None)
                wanted = {MODEL: ocp.args.StandardRestore(model)}
                if training is not None:
                    wanted[TRAINING] = ocp.args.StandardRestore(training)
                self._check_fits(step, {MODEL: model, TRAINING: training})
                items = self._restore(step, wanted)
                found = Saved(step, items[MODEL], items.get(TRAINING), progress)
            except OtherArrays:
                raise
            except Exception as error:  # a damaged file may show as anything
                reason = reason_of(error)
                if self._read_only and jax.process_count() == 1 and was_replaced(self.directory, step, steps):
                    return None, {}, True
            if _in_every_process(found is not None):
                return found, damaged, False
            damaged[step] = reason or "another process cannot read its part"
            self._say(f"checkpoint {self.directory / str(step)} is damaged ({damaged[step]}); trying the one before.")
        return None, damaged, False

    def _check_fits(self, step: int, wanted: dict[str, dict | None]) -> None:
        """Raises OtherArrays if the checkpoint is sound but holds other names or shapes than these."""
        for item, arrays in wanted.items():
            if arrays is None:
                continue
            metadata = self._handlers[item].metadata(self.directory / str(step) / item)
            saved = {name: tuple(x.shape) for name, x in metadata.items()}
            shapes = {name: tuple(x.shape) for name, x in arrays.items()}
            differing = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
            if differing:
                name = differing[0]
                raise OtherArrays(
                    f"checkpoint {self.directory / str(step)} does not hold the arrays of this run: {name} has the "
                    f"shape {saved.get(name, 'none')} there and {shapes.get(name, 'none')} here, and {len(differing)} "
                    f"arrays differ in all. It was written by another version of the code, or its config.json was "
                    f"changed since."
                )

    def _restore(self, step: int, wanted: dict) -> dict[str, Any]:
        """By Orbax's handlers, since its manager makes all processes wait for one that fails."""
        directory = self.directory / str(step)
        return {item: self._handlers[item].restore(directory / item, args=args) for item, args in wanted.items()}

    def _set_aside(self, damaged: list[int]) -> None:
        """Renames these checkpoints, so that they are not counted among those to keep, nor written over."""
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                aside = self.directory / f"{step}.damaged"
                aside.rmtree(missing_ok=True)
                (self.directory / str(step)).rename(aside)
                self._say(f"the damaged checkpoint {step} is now {aside}.")
        multihost_utils.sync_global_devices("damaged checkpoints are renamed")
        self._manager.close()
        self._manager = self._open()


def with_checksum(progress: Mapping[str, Any]) -> dict[str, Any]:
    return {**progress, _CHECKSUM: _checksum(progress)}


def read_progress(checkpoint: epath.PathLike) -> dict[str, Any]:
    """The progress of a checkpoint (`checkpoints/STEP`). Raises ValueError if its bytes do not fit their checksum."""
    handler = ocp.JsonCheckpointHandler()
    progress = dict(handler.restore(epath.Path(checkpoint) / PROGRESS, args=ocp.args.JsonRestore()))
    expected = progress.get(_CHECKSUM)  # of old checkpoints there is none
    if expected is not None and expected != _checksum(progress):
        raise ValueError("progress: its bytes do not fit their checksum")
    return progress


def was_replaced(checkpoints: AnyPath, step: int, known: Iterable[int]) -> bool:
    """Whether a checkpoint that could not be read is gone, or going, since a newer one than the known ones is there."""
    time.sleep(0.1)  # a directory goes file by file
    there = checkpoint_steps(checkpoints)
    return step not in there or max(there) > max(known)


def checkpoint_steps(checkpoints: AnyPath) -> list[int]:
    """Of the complete checkpoints in a directory, oldest first."""
    for last in (False,) * 9 + (True,):
        try:
            return sorted(ocp.utils.checkpoint_steps(checkpoints))
        except FileNotFoundError:  # one was just renamed or removed
            if last:
                raise
            time.sleep(0.05)
    raise AssertionError


def all_damaged(checkpoints: AnyPath, steps: list[int], reason: str) -> str:
    return (
        f"none of the checkpoints {steps} in {checkpoints} can be read: all are damaged. The newest: {reason}. Copy "
        f"them from where they are sound, or make them anew; llama4 inspect --verify names every damaged array."
    )


def replaced_too_often(checkpoints: AnyPath) -> str:
    return (
        f"the checkpoints in {checkpoints} were replaced {LOOKS} times while they were read: the run is being trained "
        f"and keeps too few of them for this. Give it a larger keep_checkpoints, or read a copy."
    )


def _checksum(progress: Mapping[str, Any]) -> int:
    content = {key: value for key, value in progress.items() if key != _CHECKSUM}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _in_every_process(read: bool) -> bool:
    return read if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(read))))

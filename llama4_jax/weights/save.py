"""A model that is in memory → a directory of weights, of any of the three formats."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from llama4_jax.config import converted_to_json
from llama4_jax.inputs.tokenizer import holds_tokenizer
from llama4_jax.model.llama4 import Llama4
from llama4_jax.weights import hf_config, meta_config
from llama4_jax.weights.convert import export
from llama4_jax.weights.load import named_variables
from llama4_jax.weights.table import SCALE, Index, Shape
from llama4_jax.weights.workplace import PART_BYTES, Job, Workplace, Write, finite, make_run

_MARK = "saved"  # in the journal of a directory that `save` was writing


def save(
    model: Llama4,
    destination: str | os.PathLike,
    *,
    tokenizer: Any = None,
    format: Literal["orbax", "hf", "meta"] = "orbax",
    shards: int | None = None,
) -> Path:
    """Writes a model, its layers scanned or not, as a directory, which is returned; one that is there is whole.

    - tokenizer: saved beside the weights: a tokenizer, a `Processor`, or a directory that holds one, from which what
      else belongs to a model (chat template, generation config …) is copied too. None: none, and `infer.py` then
      needs one put there
    - format: "orbax", as `llama4 convert` makes it, which `from_pretrained`, infer.py, `--init-from` and `llama4
      export` read; "hf", for transformers too; "meta", which needs torch
    - shards: files of "hf" and "meta", as for `llama4 export`

    Tensors keep their dtypes, and are brought to the host one at a time. "hf" and "meta" are written by way of the
    first format, which takes as much room on the disk again until it is done.

    Raises FileExistsError if the destination exists; FileNotFoundError for a tokenizer that is not there; ValueError
    for a value that is not finite, a model that the format cannot express, a quantized model, and one whose arrays are
    spread over several processes; OSError if there is no room.
    """
    if format not in ("orbax", "hf", "meta"):
        raise ValueError(f"format must be orbax, hf or meta, got {format!r}.")
    if shards is not None and format == "orbax":
        raise ValueError(f"shards is of the formats hf and meta, got {shards} for orbax.")
    destination = Path(destination)
    if destination.exists():
        raise FileExistsError(f"{destination} exists already: choose another destination, or remove it.")
    _clear(destination)
    if _unfinished(destination).exists():
        raise FileExistsError(f"{_unfinished(destination)} is of a conversion that was interrupted: remove it first.")
    if format != "orbax":
        (hf_config.to_hf_config if format == "hf" else meta_config.to_params)(model.config)  # raises if it has not all
    arrays = {name: variable.get_value() for name, variable in named_variables(model.unscanned()).items()}
    for name, array in arrays.items():
        if name.endswith(SCALE):
            raise ValueError(f"the model is quantized ({name.removesuffix(SCALE)} …): copy what it was loaded from.")
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ValueError(f"{name} is spread over several processes: gather the model in one of them first.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        companions = _companions(tokenizer, Path(scratch) / "tokenizer")
        run = destination if format == "orbax" else Path(scratch) / "run"
        try:
            _write(model, arrays, run, companions)
            if format != "orbax":
                export(run, destination, format=format, shards=shards)
        except Exception as error:
            # The workplace keeps what is finished for the same command to go on with: here there is none.
            shutil.rmtree(_unfinished(destination), ignore_errors=True)
            error.__notes__ = []
            raise
    return destination


def _write(model: Llama4, arrays: dict[str, jax.Array], destination: Path, companions: Path) -> None:
    # Here, since Orbax takes a second to import.
    from llama4_jax.weights.orbax_arrays import create_array

    jobs = [Job(name, array.shape, np.dtype(array.dtype)) for name, array in arrays.items()]
    with Workplace(destination, {_MARK: uuid.uuid4().hex}, jobs) as work:

        def prepare(job: Job) -> Write:
            values = finite(np.asarray(arrays[job.name]), job.name)
            chunk = _chunk(job)
            array = create_array(work.array(job.name), job.shape, job.dtype, chunk)

            def write(part: Index) -> None:
                array.write(part, np.ascontiguousarray(values[part]))

            def files() -> Iterable[Path]:
                return filter(Path.is_file, work.array(job.name).rglob("*"))

            return Write(chunk, write, files)

        work.run(prepare, lambda done, total: None)
        provenance = dict.fromkeys(vars(model.config), "the model that was saved")
        work.finish(make_run(work, list(arrays), converted_to_json(model.config, provenance), companions))


def _clear(destination: Path) -> None:
    """Removes what a save to this destination left that was killed: its model is gone, so nothing goes on with it."""
    journal = _unfinished(destination) / "finished.jsonl"
    try:
        ours = _MARK in json.loads(journal.read_text().splitlines()[0])
    except (OSError, IndexError, ValueError):
        return
    if ours:
        shutil.rmtree(_unfinished(destination))


def _unfinished(destination: Path) -> Path:
    return destination.with_name(destination.name + ".unfinished")


def _chunk(job: Job) -> Shape:
    """Parts of a tensor of about `PART_BYTES`, divided along its first axes."""
    shape = list(job.shape)
    for axis in range(len(shape)):
        size = job.bytes_of(tuple(shape))
        if size > PART_BYTES:
            shape[axis] = max(1, shape[axis] * PART_BYTES // size)
    return tuple(shape)


def _companions(tokenizer, directory: Path) -> Path:
    """A directory with what belongs to the model beside its weights."""
    if isinstance(tokenizer, str | os.PathLike):
        if not holds_tokenizer(tokenizer):
            raise FileNotFoundError(f"tokenizer: {tokenizer} is no directory with a tokenizer in it.")
        return Path(tokenizer)
    directory.mkdir()
    if tokenizer is not None:
        own = getattr(tokenizer, "tokenizer", tokenizer)
        if not hasattr(own, "save"):
            raise ValueError(f"tokenizer must be a tokenizer, a Processor or a directory, got {tokenizer!r}.")
        own.save(directory)
    return directory

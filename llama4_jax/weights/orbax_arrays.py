"""Single arrays of an Orbax checkpoint: read in parts, and written in parts before the checkpoint exists.

Orbax writes and restores whole trees. A conversion goes array by array, in parts, and must be able to go on after it
was killed: so each array is written, as zarr, where it waits until all are there, and Orbax then makes the checkpoint
of them by moving them into it.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from llama4_jax.atomic import AnyPath, in_bucket
from llama4_jax.untrusted_json import read_json
from llama4_jax.weights import checked_arrays
from llama4_jax.weights.checked_arrays import reason_of, tree_handler
from llama4_jax.weights.checkpoint import MODEL, PROGRESS, with_checksum
from llama4_jax.weights.table import Index, Shape
from llama4_jax.weights.workplace import parts_of

_CACHE_BYTES = 64 * 2**20  # of decoded chunks: those of a training run may be larger than the parts that are read

_THREADS = 4  # that verify


class StoredArray:
    """An array of a checkpoint, or a step of the first axis of one that stacks a layer's over repetitions."""

    def __init__(self, store: ts.TensorStore, step: int | None = None):
        self._store = store if step is None else store[step]
        self.shape: Shape = tuple(self._store.shape)
        self.dtype: np.dtype = self._store.dtype.numpy_dtype

    def read(self, part: Index) -> np.ndarray:
        """Raises ValueError, naming the array, if a chunk that the part meets is lost or does not fit its checksum."""
        try:
            return self._store[part].read().result()
        except (ValueError, OSError) as error:
            raise ValueError(reason_of(error)) from error

    def write(self, part: Index, values: np.ndarray) -> None:
        self._store[part].write(values, can_reference_source_data_indefinitely=True).result()

    @property
    def chunk(self) -> Shape:
        """What is stored in one piece."""
        return tuple(self._store.chunk_layout.read_chunk.shape or self.shape)


def stored_arrays(checkpoint: AnyPath, item: str = MODEL) -> dict[str, ts.TensorStore]:
    """The arrays of the model, or of another item, in a checkpoint (`checkpoints/STEP`), by name. Nothing is read
    yet."""
    directory = checkpoint / item
    url = str(directory) if in_bucket(directory) else f"file://{directory.absolute()}"
    metadata = read_json(directory / "_METADATA", of=dict)
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def spec(name: str) -> dict:
        if metadata.get("use_ocdbt", True):
            store: dict | str = {"driver": "ocdbt", "base": url, "path": f"{name}/"}
        else:
            store = f"{url}/{name}/"
        # a chunk that is lost must not become zeros
        return {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}

    names = [entry["key_metadata"][0]["key"] for entry in metadata["tree_metadata"].values()]
    opening = {name: ts.open(spec(name), open=True, read=True, context=context) for name in names}
    return {name: store.result() for name, store in opening.items()}


def damaged_arrays(checkpoint: AnyPath, item: str) -> list[str]:
    """Reads all of an item of a checkpoint: what is wrong with each of its arrays that is damaged, beginning with its
    name. Raises as `stored_arrays` does."""

    def damage(named: tuple[str, ts.TensorStore]) -> str | None:
        name, store = named
        array = StoredArray(store)
        try:
            for part in parts_of(array.shape, array.chunk):
                array.read(part)
        except ValueError as error:
            return f"{name}: {reason_of(error).removeprefix(name + ': ')}"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for found in pool.map(damage, stored_arrays(checkpoint, item).items()) if found]


def create_array(path: Path, shape: Shape, dtype: np.dtype, chunk: Shape) -> StoredArray:
    """An array on disk, uncompressed (weights do not compress), in chunks with checksums; what was there is deleted."""
    store = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path.absolute()}/"},
            "metadata": {
                "shape": list(shape),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
                "data_type": dtype.name,
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *checked_arrays.CODECS],
            },
            "store_data_equal_to_fill_value": True,
        },
        create=True,
        delete_existing=True,
        context=ts.Context({"file_io_sync": False}),
    )
    return StoredArray(store.result())


def open_array(path: Path) -> ts.TensorStore:
    """One that `create_array` made, to be read."""
    kvstore = {"driver": "file", "path": f"{path.absolute()}/"}
    return ts.open({"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}, read=True).result()


class _Waiting:
    """An array that `create_array` wrote, as a leaf of the tree that Orbax saves."""

    def __init__(self, path: Path):
        self.path = path


class _Move(type_handlers.NumpyHandler):
    """Saves an array by moving it to where Orbax wants it. Orbax restores it as any other."""

    async def serialize(
        self,
        values: Sequence[_Waiting],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ):
        async def move() -> None:
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                await asyncio.to_thread(os.rename, value.path, info.parent_dir / info.name)

        return [ocp.future.CommitFutureAwaitingContractedSignals(move(), name="move")]


def make_checkpoint(run: Path, arrays: Mapping[str, Path], step: int = 0) -> None:
    """Makes the checkpoint `run/checkpoints/STEP` of arrays that `create_array` wrote, by their names in it."""
    registry = type_handlers.create_type_handler_registry((_Waiting, _Move()))
    handlers = {
        MODEL: tree_handler(use_ocdbt=False, type_handler_registry=registry),
        PROGRESS: ocp.JsonCheckpointHandler(),
    }
    with ocp.CheckpointManager((run / "checkpoints").absolute(), item_handlers=handlers) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    MODEL: ocp.args.PyTreeSave({name: _Waiting(path) for name, path in arrays.items()}),
                    PROGRESS: ocp.args.JsonSave(with_checksum({"step": step})),
                }
            ),
        )
        manager.wait_until_finished()

"""What checksums cost: saving and loading a checkpoint as training does, writing and reading a converted array, and
reading an exported file, with them and without, in turn.

    python benchmarks/checksums.py                            # 0.8 GB of float32, five rounds
    python benchmarks/checksums.py --arrays 6 --rounds 9 --directory /some/disk

Files are read from the page cache, where a checksum costs most: no disk is waited for. Figures are medians, with the
lowest and the highest.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llama4_jax.weights import checked_arrays, orbax_arrays
from llama4_jax.weights.digests import Digests, write_digests
from llama4_jax.weights.safetensors import SafetensorsFile, create_safetensors
from llama4_jax.weights.workplace import parts_of

SHAPE, CHUNK = (32, 512, 1024), (8, 512, 1024)  # 64 MiB in chunks of 16


def timed(call: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def tasks(root: Path, tree: dict[str, jax.Array], checked: bool) -> dict[str, Callable]:
    """What is timed, in the order in which it must be done."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    args = dict.fromkeys(tree, ocp.SaveArgs(chunk_byte_size=32 * 2**20))
    own = root / ("checked" if checked else "unchecked")
    arrays = {name: np.asarray(x) for name, x in tree.items()}

    def save() -> None:
        shutil.rmtree(own / "run", ignore_errors=True)
        with ocp.Checkpointer(checked_arrays.tree_handler()) as writer:
            writer.save(own / "run", args=ocp.args.PyTreeSave(tree, args))

    def load():
        return ocp.StandardCheckpointHandler().restore(own / "run", args=ocp.args.StandardRestore(abstract))

    def convert() -> None:
        for name, array in arrays.items():
            store = orbax_arrays.create_array(own / name, array.shape, array.dtype, CHUNK)
            for part in parts_of(array.shape, CHUNK):
                store.write(part, array[part])

    def read_converted() -> None:
        for name, array in arrays.items():
            store = orbax_arrays.StoredArray(orbax_arrays.open_array(own / name))
            for part in parts_of(array.shape, CHUNK):
                store.read(part)

    def export() -> None:
        path = own / "model.safetensors"
        tensors = create_safetensors(path, {name: (array.dtype, array.shape) for name, array in arrays.items()})
        for name, array in arrays.items():
            tensors[name].map("r+")[...] = array
        if checked:
            write_digests(own, {path: tensors})

    def read_exported() -> None:
        digests = Digests.of(own)
        for name, tensor in SafetensorsFile(own / "model.safetensors").tensors.items():
            for part in parts_of(arrays[name].shape, CHUNK):
                view = tensor.map()[part]
                if digests is not None:
                    digests.check(view)
                np.array(view)

    every = [save, load, convert, read_converted, export, read_exported]
    return {call.__name__: call for call in every}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrays", type=int, default=12, help="of 64 MiB each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="on the disk to measure; the system's temporary directory by default")
    args = parser.parse_args()

    tree = {f"params.x{i}": jax.random.normal(jax.random.key(i), SHAPE, jnp.float32) for i in range(args.arrays)}
    root = Path(tempfile.mkdtemp(prefix="llama4_checksums_", dir=args.directory))
    codecs = list(checked_arrays.CODECS)
    seconds: dict[tuple[str, bool], list[float]] = {}
    try:
        ways = {checked: tasks(root, tree, checked) for checked in (False, True)}
        for _ in range(args.rounds + 1):
            for name in ways[True]:
                for checked in (False, True):
                    checked_arrays.CODECS[:] = codecs if checked else []
                    seconds.setdefault((name, checked), []).append(timed(ways[checked][name]))
    finally:
        shutil.rmtree(root)
    print(f"{sum(x.nbytes for x in tree.values()) / 1e9:.2f} GB, {args.rounds} rounds")
    print("| task | without | with checksums | |\n|---|---|---|---|")
    for name in ways[True]:
        cells, medians = [], []
        for checked in (False, True):
            own = seconds[name, checked][1:]  # the first round warms up
            medians.append(statistics.median(own))
            cells.append(f"{medians[-1]:.2f} s ({min(own):.2f}–{max(own):.2f})")
        print(f"| {name.replace('_', ' ')} | {cells[0]} | {cells[1]} | {medians[1] / medians[0] - 1:+.1%} |")


if __name__ == "__main__":
    main()

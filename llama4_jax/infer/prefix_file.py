"""A prompt that was read, as a file: another process, or the same one tomorrow, goes on where it ends.

A safetensors file: the keys of its tokens, the blocks of the global layers, and what the chunked layers hold. Its
metadata name the model by a digest of its configuration and weights, since keys and values of another one would give
other replies without a word; and hold a digest of the arrays.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx
from jax import lax
from jaxtyping import Array, Num, UInt32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llama4_jax.atomic import write_atomically
from llama4_jax.infer.snapshots import Block, Snapshot
from llama4_jax.model.config import ModelConfig

_FORMAT = "llama4_jax prefix 1"
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # safetensors knows few of the dtypes that there are


def write_prefix(path: Path, snapshot: Snapshot, model: str) -> None:
    """Raises OSError if it cannot be written."""
    arrays = {"keys": np.asarray(snapshot.keys, np.int64)}
    for part, block in _parts(snapshot.blocks, snapshot.chunk).items():
        for name, array in _named(block.arrays):
            host = np.ascontiguousarray(array)
            arrays[f"{part}{name}"] = host.view(_BITS[host.dtype.itemsize])
    metadata = {"format": _FORMAT, "model": model, "digest": _digest(arrays)}
    write_atomically(path, save(arrays, metadata))


def read_prefix(
    path: Path, model: str, *, block: Any, chunk: Any, block_size: int, chunk_size: int | None
) -> tuple[np.ndarray, list[Block], Block | None]:
    """The keys of its tokens, and what the layers hold.

    - block, chunk: shapes and dtypes of the arrays of a block of `block_size` tokens, and of the chunked layers

    Raises FileNotFoundError; ValueError for a file of something else, of another model or cache, and a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no prefix {path}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is no prefix that `save_prefix` wrote.")
            if metadata.get("model") != model:
                raise ValueError(
                    f"{path} is of another model, other weights or another kind of cache: save it with this engine."
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no prefix, or a damaged one: {error}") from None
    keys = arrays.get("keys")
    if _digest(arrays) != metadata.get("digest") or keys is None or keys.dtype != np.int64 or keys.ndim != 1:
        raise ValueError(f"{path} is damaged: its numbers are not those that were written. Save it anew.")
    blocks = [block] * -(-len(keys) // block_size)
    has_chunk = chunk_size is not None and len(keys) % chunk_size != 0
    expected = _parts(blocks, chunk if has_chunk else None)
    names = {f"{part}{name}" for part, tree in expected.items() for name, _ in _named(tree)}
    if names != arrays.keys() - {"keys"}:
        raise ValueError(f"{path} was saved by an engine of another context or piece: save it anew with this one.")

    def read(part: str, tree: Any) -> Block:
        def array(name: str, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
            bits = arrays[f"{part}{name}"]
            if bits.shape != wanted.shape or bits.dtype != _BITS[wanted.dtype.itemsize]:
                raise ValueError(
                    f"{path}: {part}{name} is {bits.dtype} {list(bits.shape)}, and this engine's cache has "
                    f"{wanted.dtype} {list(wanted.shape)}: save it anew with this engine."
                )
            return bits.view(wanted.dtype)

        return Block(jax.tree_util.tree_map_with_path(lambda at, x: array(jax.tree_util.keystr(at), x), tree))

    made = {part: read(part, tree) for part, tree in expected.items()}
    return keys, [made[f"block{i}"] for i in range(len(blocks))], made.get("chunk")


def _parts(blocks: list, chunk: Any | None) -> dict[str, Any]:
    return {**{f"block{i}": one for i, one in enumerate(blocks)}, **({} if chunk is None else {"chunk": chunk})}


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(at), leaf) for at, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    total = xxhash.xxh3_128()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape};".encode())
        total.update(np.ascontiguousarray(arrays[name]).view(np.uint8))
    return total.hexdigest()


def model_digest(config: ModelConfig, state: nnx.State, cache_dtype: str) -> str:
    """A digest of a configuration, all weights and a kind of cache. Reads each weight once, where it lies."""
    sums = {
        jax.tree_util.keystr(at): int(_sum(leaf))
        for at, leaf in jax.tree_util.tree_leaves_with_path(state)
        if isinstance(leaf, jax.Array)
    }
    said = json.dumps([repr(config), cache_dtype, sums], sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


@functools.partial(jax.jit)
def _sum(x: Num[Array, "..."]) -> UInt32[Array, ""]:
    """A hash of the numbers, each with its place."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)  # exact for all dtypes that weights have
    place = jnp.zeros((), jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(0x01000193) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)

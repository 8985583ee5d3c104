"""The collectives of a training step, counted by hand: what the model must send if nothing is sent in vain.

Formulas in the sizes of the model and of the mesh, which know nothing of a compiler but what its rules make of a
sum. A plan shows them beside what was compiled, so that whatever XLA adds is seen before it is paid for.

- each kernel is gathered before it is used, in the forward pass and again where that is recomputed, in the dtype of
  the product; its gradient is summed once, in float32, and scattered to where the kernel lives (`sharding.rules`)
- rows travel to their experts and back in both passes, and to them once more where they are recomputed (`ops.exchange`)
- of the embedding table only what was looked up travels (`ops.embedding`); the output head does once (`cross_entropy`)
- `tensor` sums what comes out of attention and of the feed-forward, and the gradients of what went into them
- `context` passes keys and values around a ring, and in the backward pass their gradients, too

Left out are numbers of a few kilobytes: of rows for each expert, of the loss, of the gradients' norm.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from llama4_jax.config import RunConfig
from llama4_jax.model.config import ModelConfig
from llama4_jax.model.flops import count_parameters
from llama4_jax.ops.cross_entropy import added_columns
from llama4_jax.ops.exchange import ROOM
from llama4_jax.sharding import MeshConfig

BYTES = {"float32": 4, "bfloat16": 2}
IN_8_BITS = ("fp8", "fp8_row", "fp8_e5m2")  # of `dot_general.DOT_GENERALS`: kernels are rounded before they travel
_LEAST_ROWS = 8  # XLA for TPUs scatters whole tiles: of fewer rows a device it sums all on all devices


class Counted(NamedTuple):
    """Collectives of one kind, of one device. `bytes`: of the whole array, as `sharding.hlo.Collective` says it."""

    kind: str
    axes: tuple[str, ...]
    times: float
    bytes: float


def count(config: RunConfig, rows: int, context: int, mesh: MeshConfig, *, on_tpu: bool) -> Iterator[Counted]:
    """Those of a step on `rows` of `context` tokens, those over an axis of size 1 among them. The mesh is resolved."""
    tokens = rows * context / config.grad_accumulation / (mesh.data * mesh.fsdp * mesh.expert * mesh.context)
    passes = 1 if config.remat == "none" else 2
    # What came of products is kept by "dots", and rows at their experts: kernels and keys travel again, tokens do not.
    of_tokens = 1 if config.remat == "dots" else passes
    for counted in (
        *_of_parameters(config, mesh, passes, on_tpu),
        *_of_tokens(config, mesh, of_tokens, tokens, on_tpu),
        *_of_keys(config, mesh, passes, tokens, context),
    ):
        yield counted._replace(times=counted.times * config.grad_accumulation)


def _of_parameters(config: RunConfig, mesh: MeshConfig, passes: int, on_tpu: bool) -> Iterator[Counted]:
    model, compute = config.model, BYTES[config.precision.compute]
    read = 1 if config.precision.matmul in IN_8_BITS else compute
    for moe, layers in Counter(spec.moe for spec in model.layers).items():
        for kernel in _kernels(model, moe, mesh, on_tpu):
            for counted in _moved(kernel, mesh, passes, read):
                yield counted._replace(times=counted.times * layers)
    yield from _moved(_head(model, mesh, on_tpu), mesh, 1, compute)
    if mesh.data > 1:
        held = count_parameters(model).total / (mesh.tensor * mesh.fsdp * mesh.expert * mesh.context)
        yield Counted("all-reduce", ("data",), 1, held * 4)
    norms = 2 * model.num_layers + 1
    yield Counted("all-reduce", _split(("data", "fsdp", "expert", "context"), mesh), norms, model.embed_dim * compute)


def _of_tokens(config: RunConfig, mesh: MeshConfig, passes: int, tokens: float, on_tpu: bool) -> Iterator[Counted]:
    """Of a device's `tokens`, apart from their keys and values."""
    model, moe = config.model, sum(spec.moe for spec in config.model.layers)
    hidden = tokens * model.embed_dim * BYTES[config.precision.compute]
    shared = _split(("fsdp", "expert", "context"), mesh)
    for axes, ids in _in_groups(shared, mesh, tokens * math.prod(getattr(mesh, axis) for axis in shared)):
        yield Counted("all-gather", axes, 1, ids * 4)
    yield Counted("all-to-all", shared, 2, hidden)
    rows = model.top_k * hidden
    if on_tpu:
        yield Counted("ragged-all-to-all", ("expert",), (passes + 1) * moe, rows)
        yield Counted("ragged-all-to-all", ("expert",), 2 * moe, ROOM * rows)
    else:
        yield Counted("all-gather", ("expert",), (passes + 1) * moe, rows * mesh.expert)
        yield Counted("reduce-scatter", ("expert",), 2 * moe, rows * mesh.expert)
    yield Counted("all-reduce", ("tensor",), (2 * passes + 2) * model.num_layers, hidden)


def _of_keys(config: RunConfig, mesh: MeshConfig, passes: int, tokens: float, context: int) -> Iterator[Counted]:
    model = config.model
    around = sum(spec.chunk is None or spec.chunk > context / mesh.context for spec in model.layers)
    pair = 2 * tokens * model.num_kv_heads * model.head_dim / mesh.tensor
    sent = pair * BYTES[config.precision.compute]
    yield Counted("collective-permute", ("context",), around * (mesh.context - 1) * (passes + 1), sent)
    yield Counted("collective-permute", ("context",), around * mesh.context, pair * 4)


class _Kernel(NamedTuple):
    """`size`: elements that one device gathers, of those which `axes` split."""

    size: float
    axes: tuple[str, ...]
    scatters: bool = True  # its gradient can be scattered over `expert`
    in_float32: bool = False


def _kernels(model: ModelConfig, moe: bool, mesh: MeshConfig, on_tpu: bool) -> Iterator[_Kernel]:
    """Of a layer."""
    dim, heads, kv_heads = model.embed_dim, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    into, out_of = ("fsdp", "expert", "context"), ("expert", "fsdp", "context")
    by_head = model.head_dim % mesh.expert == 0
    # XLA for TPUs sums everywhere what replicas add up and two dimensions split.
    one_by_one = mesh.data == 1 or not on_tpu
    yield _Kernel(dim * (heads + 2 * kv_heads) / mesh.tensor, into)
    narrow = on_tpu and not (by_head and model.head_dim // mesh.expert >= _LEAST_ROWS)
    yield _Kernel(heads * dim / mesh.tensor, out_of if by_head else into, scatters=one_by_one and not narrow)
    width = model.expert_mlp_dim if moe else model.mlp_dim
    yield _Kernel(dim * 2 * width / mesh.tensor, into)
    yield _Kernel(width * dim / mesh.tensor, out_of, scatters=one_by_one)
    if moe:
        yield _Kernel(dim * model.num_experts, into, in_float32=True)
        yield _Kernel(model.num_experts / mesh.expert * 3 * dim * width / mesh.tensor, ("fsdp", "context"))


def _head(model: ModelConfig, mesh: MeshConfig, on_tpu: bool) -> _Kernel:
    words = model.vocab_size // mesh.tensor
    words += added_columns(words, "tpu") if on_tpu else 0
    return _Kernel(model.embed_dim * words, ("fsdp", "expert", "context"))


def _moved(kernel: _Kernel, mesh: MeshConfig, gathers: int, read: int) -> Iterator[Counted]:
    """`read`: bytes of an element that is gathered."""
    for axes, size in _in_groups(kernel.axes, mesh, float(kernel.size)):
        yield Counted("all-gather", axes, gathers, size * (4 if kernel.in_float32 else read))
        scattered = kernel.scatters or "expert" not in axes
        yield Counted("reduce-scatter" if scattered else "all-reduce", axes, 1, size * 4)


def _in_groups(axes: tuple[str, ...], mesh: MeshConfig, size: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """The axes that `size` elements are gathered over at once, and how many they are then (`sharding.in_groups`)."""
    if mesh.data > 1:
        yield _split(axes, mesh), size
        return
    for axis in _split(axes, mesh):
        yield (axis,), size
        size /= getattr(mesh, axis)


def _split(axes: tuple[str, ...], mesh: MeshConfig) -> tuple[str, ...]:
    """Those that split anything."""
    return tuple(axis for axis in axes if getattr(mesh, axis) > 1)

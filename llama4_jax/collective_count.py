"""The collectives of a training step, counted by hand: what the model must send if nothing is sent in vain.

Formulas in the sizes of the model and of the mesh, which know nothing of a compiler but what its rules make of a
sum. A plan shows them beside what was compiled, so that whatever XLA adds is seen before it is paid for.

- each kernel is gathered before it is used, in the forward pass and again where that is recomputed, in the dtype of
  computation; its gradient is summed once, in float32, and scattered to where the kernel lives (`sharding.rules`)
- rows travel to their experts and back in both passes, and to them once more where they are recomputed (`ops.exchange`)
- of the embedding table only what was looked up travels (`ops.embedding`); the output head does once (`cross_entropy`)
- `tensor` sums what comes out of attention and of the feed-forward, and the gradients of what went into them
- `context` passes keys and values around a ring, and in the backward pass their gradients, too

Left out are numbers of a few kilobytes: of rows for each expert, of the loss, of the gradients' norm.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from llama4_jax.config import RunConfig
from llama4_jax.model.config import ModelConfig
from llama4_jax.model.flops import count_parameters
from llama4_jax.ops.cross_entropy import added_columns
from llama4_jax.ops.exchange import ROOM
from sharding import MeshConfig

BYTES = {"float32": 4, "bfloat16": 2}
_LEAST_ROWS = 8  # XLA for TPUs scatters whole tiles: of fewer rows a device it sums all on all devices


class Counted(NamedTuple):
    """Collectives of one kind, of one device. `bytes`: of the whole array, as `sharding.hlo.Collective` says it."""

    kind: str
    axes: tuple[str, ...]
    times: float
    bytes: float


def count(config: RunConfig, rows: int, context: int, mesh: MeshConfig, *, on_tpu: bool) -> Iterator[Counted]:
    """Those of a step on `rows` of `context` tokens, those over an axis of size 1 among them. The mesh is resolved."""
    model, compute, steps = config.model, BYTES[config.precision.compute], config.grad_accumulation
    tokens = rows * context / steps / (mesh.data * mesh.fsdp * mesh.expert * mesh.context)
    passes = 2 if config.remat in ("full", "offload") else 1
    hidden = tokens * model.embed_dim * compute
    layers, moe = model.num_layers, sum(spec.moe for spec in model.layers)

    for kernel in _kernels(model, mesh, on_tpu):
        yield from _moved(kernel, mesh, passes * steps, steps, compute)
    yield from _moved(_head(model, mesh, on_tpu), mesh, steps, steps, compute)
    if mesh.data > 1:
        held = count_parameters(model).total / (mesh.tensor * mesh.fsdp * mesh.expert * mesh.context)
        yield Counted("all-reduce", ("data",), steps, held * 4)
    everyone = tuple(axis for axis in ("data", "fsdp", "expert", "context") if getattr(mesh, axis) > 1)
    yield Counted("all-reduce", everyone, (2 * layers + 1) * steps, model.embed_dim * compute)  # scales of the norms

    shared = ("fsdp", "expert", "context")
    for axes, size in _in_groups(shared, mesh, tokens * 4 * math.prod(getattr(mesh, axis) for axis in shared)):
        yield Counted("all-gather", axes, steps, size)  # ids of tokens
    yield Counted("all-to-all", tuple(axis for axis in shared if getattr(mesh, axis) > 1), 2 * steps, hidden)

    sent = model.top_k * hidden
    if on_tpu:
        yield Counted("ragged-all-to-all", ("expert",), (passes + 1) * moe * steps, sent)
        yield Counted("ragged-all-to-all", ("expert",), 2 * moe * steps, ROOM * sent)
    else:
        yield Counted("all-gather", ("expert",), (passes + 1) * moe * steps, sent * mesh.expert)
        yield Counted("reduce-scatter", ("expert",), 2 * moe * steps, sent * mesh.expert)

    yield Counted("all-reduce", ("tensor",), (2 * passes + 2) * layers * steps, hidden)
    around = sum(spec.chunk is None or spec.chunk > context / mesh.context for spec in model.layers) * steps
    pair = 2 * tokens * model.num_kv_heads * model.head_dim / mesh.tensor
    turns = mesh.context - 1
    yield Counted("collective-permute", ("context",), around * turns * (passes + 1), pair * compute)
    yield Counted("collective-permute", ("context",), around * mesh.context, pair * 4)


class _Kernel(NamedTuple):
    """`size`: elements that one device gathers, of those which `axes` split; in `of_compute` or else in float32."""

    size: float
    axes: tuple[str, ...]
    scatters: bool = True  # its gradient can be scattered over `expert`
    of_compute: bool = True


def _kernels(model: ModelConfig, mesh: MeshConfig, on_tpu: bool) -> Iterator[_Kernel]:
    """Of the layers."""
    dim, heads, kv_heads = model.embed_dim, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    into, out_of = ("fsdp", "expert", "context"), ("expert", "fsdp", "context")
    by_head = model.head_dim % mesh.expert == 0
    # XLA for TPUs sums everywhere what replicas add up and two dimensions split.
    one_by_one = mesh.data == 1 or not on_tpu
    for spec in model.layers:
        yield _Kernel(dim * (heads + 2 * kv_heads) / mesh.tensor, into)
        narrow = on_tpu and not (by_head and model.head_dim // mesh.expert >= _LEAST_ROWS)
        yield _Kernel(heads * dim / mesh.tensor, out_of if by_head else into, scatters=one_by_one and not narrow)
        width = model.expert_mlp_dim if spec.moe else model.mlp_dim
        yield _Kernel(dim * 2 * width / mesh.tensor, into)
        yield _Kernel(width * dim / mesh.tensor, out_of, scatters=one_by_one)
        if spec.moe:
            yield _Kernel(dim * model.num_experts, into, of_compute=False)
            yield _Kernel(model.num_experts / mesh.expert * 3 * dim * width / mesh.tensor, ("fsdp", "context"))


def _head(model: ModelConfig, mesh: MeshConfig, on_tpu: bool) -> _Kernel:
    words = model.vocab_size // mesh.tensor
    words += added_columns(words, "tpu") if on_tpu else 0
    return _Kernel(model.embed_dim * words, ("fsdp", "expert", "context"))


def _moved(kernel: _Kernel, mesh: MeshConfig, gathers: int, sums: int, compute: int) -> Iterator[Counted]:
    for axes, size in _in_groups(kernel.axes, mesh, float(kernel.size)):
        yield Counted("all-gather", axes, gathers, size * (compute if kernel.of_compute else 4))
        scattered = kernel.scatters or "expert" not in axes
        yield Counted("reduce-scatter" if scattered else "all-reduce", axes, sums, size * 4)


def _in_groups(axes: tuple[str, ...], mesh: MeshConfig, size: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """The axes that `size` elements are gathered over at once, and how many they are then (`sharding.in_groups`)."""
    axes = tuple(axis for axis in axes if getattr(mesh, axis) > 1)
    if mesh.data > 1:
        yield axes, size
        return
    for axis in axes:
        yield (axis,), size
        size /= getattr(mesh, axis)

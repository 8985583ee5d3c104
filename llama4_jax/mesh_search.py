"""Which meshes a step fits, and about what it costs on each: closed formulas, for when compiling every mesh would take
hours or there is no compiler.

What is left out is small or unknown beforehand: norms, biases, copies, padding, and what the compiler adds. So the
estimates rank meshes; a plan of the compiled step says what one costs.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llama4_jax.collective_count import BYTES, IN_8_BITS, Counted, count
from llama4_jax.config import RunConfig
from llama4_jax.model.config import LayerSpec, ModelConfig
from llama4_jax.model.flops import (
    count_parameters,
    decode_bytes,
    forward_flops,
    mean_visible_keys,
    train_flops_per_token,
)
from llama4_jax.model.lora import count_factors
from llama4_jax.ops.cross_entropy import PIECE_TOKENS_ELSEWHERE
from llama4_jax.ops.exchange import ROOM
from llama4_jax.ops.quantization import Scheme, num_groups
from llama4_jax.sharding import MeshConfig
from llama4_jax.sharding.chips import Chip, Topology
from llama4_jax.sharding.plan import Plan, Sent

PIECE = 512  # tokens of a prompt that are read at once, as `infer.generate` does
SCALE_BYTES, SCALE_BYTES_OF_A_GROUP = 4, 2  # float32, bfloat16: see `ops.quantization`


@dataclass(frozen=True)
class Work:
    """A step to be planned: of training all `rows` x `context` tokens; of serving, with a cache of `context` tokens a
    row, the last PIECE of them or the last one."""

    config: RunConfig
    step: Literal["train", "prefill", "decode"]
    rows: int
    context: int
    weights: Scheme | None = None  # of the decoder's matrices, in serving or of LoRA's base; None: all are alike
    cache: Literal["int8"] | None = None  # None: of the dtype of computation

    @property
    def tokens(self) -> int:
        """Of a row, that the step computes."""
        return {"train": self.context, "prefill": min(PIECE, self.context), "decode": 1}[self.step]

    @property
    def model_flops(self) -> float:
        """Of all devices together."""
        model = self.config.model
        if self.step == "train":
            learn = not self.config.lora.rank
            return self.rows * self.context * train_flops_per_token(model, self.context, weights_learn=learn)
        return self.rows * forward_flops(model, first=self.context - self.tokens, last=self.context, logits=1)

    @property
    def model_traffic(self) -> float:
        """Bytes that all devices together must read: of decoding, which is little else than reading; 0 otherwise."""
        return self._decode_bytes(self.cache_bytes) if self.step == "decode" else 0.0

    @property
    def weight_traffic(self) -> float:
        """The weights' part of that."""
        return self._decode_bytes(0.0)

    def _decode_bytes(self, cache_bytes: float) -> float:
        matrix = None if self.weights is None else matrix_bytes(self)
        how = {"weight_bytes": BYTES[self.config.precision.params], "matrix_bytes": matrix, "cache_bytes": cache_bytes}
        return decode_bytes(self.config.model, rows=self.rows, context=self.context, **how)

    @property
    def cache_bytes(self) -> float:
        """Of a number in the cache, with its part of a scale."""
        if self.cache is None:
            return float(BYTES[self.config.precision.compute])
        return 1 + SCALE_BYTES / self.config.model.head_dim


def matrix_bytes(work: Work) -> float:
    """Of a number in a served model's matrices, with its part of a scale that a group has."""
    if work.weights is None:
        return float(BYTES[work.config.precision.params])
    return bits(work.weights) / 8 + (SCALE_BYTES_OF_A_GROUP / work.weights.group if work.weights.group else 0.0)


def bits(scheme: Scheme) -> int:
    """Of a value."""
    return 4 if scheme.weights == "int4" else 8


def flags(mesh: MeshConfig) -> str:
    """As one would write it on the command line."""
    sizes = dataclasses.asdict(mesh)
    return " ".join(f"--mesh.{name} {size}" for name, size in sizes.items() if size != 1 or name == "data")


def misfits(work: Work, mesh: MeshConfig) -> list[str]:
    """What is wrong with a mesh for this step, in words; nothing if it divides all that it splits."""
    model, wrong = work.config.model, []
    split: list[tuple[str, int, tuple[str, ...]]] = [
        ("model.num_heads", model.num_heads, ("tensor",)),
        ("model.num_kv_heads", model.num_kv_heads, ("tensor",)),
        ("model.vocab_size", model.vocab_size, ("tensor",)),
        ("model.embed_dim", model.embed_dim, ("fsdp",)),
    ]
    if any(not spec.moe for spec in model.layers):
        split += [("model.mlp_dim", model.mlp_dim, ("tensor",))]
    if any(spec.moe for spec in model.layers):
        split += [("model.expert_mlp_dim", model.expert_mlp_dim, ("tensor",))]
        split += [("model.num_experts", model.num_experts, ("expert",))]
    elif mesh.expert > 1:
        wrong.append(f"the model has no experts, which mesh.expert = {mesh.expert} could split")
    if work.step == "train":
        rows = work.rows // work.config.grad_accumulation
        split += [("data.batch_size / grad_accumulation", rows, ("data", "fsdp", "expert"))]
        split += [("data.seq_len", work.context, ("context",))]
    for what, size, axes in split:
        ways = math.prod(getattr(mesh, axis) for axis in axes)
        if size % ways:
            names = " x ".join(f"mesh.{axis}" for axis in axes)
            wrong.append(f"{what} is {size}, which {names} = {ways} does not divide")
    return wrong


def meshes(num_devices: int) -> Iterator[MeshConfig]:
    """All meshes of that many devices."""
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(axes) - 1):
        if num_devices % (named := math.prod(sizes)) == 0:
            yield MeshConfig(**dict(zip(axes, (num_devices // named, *sizes), strict=True)))


def nearest(work: Work, wanted: MeshConfig, num_devices: int) -> list[MeshConfig]:
    """The meshes that this step fits, those first whose axes are most like the wanted ones."""
    free = math.prod(size for size in wanted.shape if size != -1)
    sizes = [max(1, num_devices // free) if size == -1 else size for size in wanted.shape]

    def distance(mesh: MeshConfig) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(mesh.shape, sizes, strict=True))

    return sorted((mesh for mesh in meshes(num_devices) if not misfits(work, mesh)), key=distance)


def ranked(work: Work, topology: Topology) -> list[tuple[MeshConfig, Plan]]:
    """All meshes that this step fits with their estimates: first those that the chips' memory holds, fastest first."""
    found = [(m, estimate(work, m, topology)) for m in meshes(topology.num_devices) if not misfits(work, m)]
    return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].seconds_without_overlap))


def estimate(work: Work, mesh: MeshConfig, topology: Topology) -> Plan:
    """A plan from formulas alone: nothing is compiled."""
    arguments, temporaries = _memory(work, mesh)
    chip, devices = topology.chip, topology.num_devices
    sent = tuple(
        Sent(
            c.kind,
            c.axes,
            ways,
            float(c.times),
            float(c.bytes * c.times),
            seconds=_seconds(c, mesh, topology) * c.times,
            where="a formula",
        )
        for c in _sent(work, mesh, topology)
        if (ways := math.prod(getattr(mesh, axis) for axis in c.axes)) > 1
    )
    again = _executed(work)
    flops = work.model_flops * again / devices
    traffic = _traffic(work, mesh, arguments)
    used = sum(arguments.values()) + temporaries
    return Plan(
        topology=topology.name, devices=devices, mesh=dataclasses.asdict(mesh), memory=float(chip.memory),
        arguments=arguments, results=0.0, temporaries=temporaries, fits=used <= chip.memory, flops=flops,
        model_flops=work.model_flops / devices, traffic=traffic, model_traffic=work.model_traffic / devices, sent=sent,
        compute_seconds=_compute_seconds(work, chip) * again / devices, memory_seconds=traffic / chip.bandwidth,
        network_seconds=float(sum(s.seconds for s in sent)), peak=chip.bf16,
        assumptions=(
            "NOT COMPILED: all figures are closed formulas, without what a compiler adds or saves",
            *precision_notes(work, chip),
        ),
        tokens=float(work.rows * work.tokens),
    )  # fmt: skip


def _executed(work: Work) -> float:
    """Operations that a step executes, as a multiple of the model's: in training some are computed again."""
    if work.step != "train" or work.config.remat == "none":
        return 1.0
    if work.config.remat != "dots":
        return 3 / 2 if work.config.lora.rank else 4 / 3
    model = work.config.model
    keys = sum(mean_visible_keys(spec, work.context) for spec in model.layers)
    scores = 4 * model.num_heads * model.head_dim * keys * work.rows * work.context
    return 1 + scores / work.model_flops


def _kept(config: RunConfig, mesh: MeshConfig) -> float:
    """Numbers that a token leaves behind for the backward pass in all layers together, on one device."""
    model = config.model
    if config.remat != "dots":
        return {"offload": 0.0, "full": 1.0, "none": 12.0}[config.remat] * model.embed_dim * model.num_layers
    kept = 0.0
    for spec in model.layers:  # the layer's input; q, k, v; what is added by attention; gate and up
        kept += 2 * model.embed_dim + (model.num_heads + 2 * model.num_kv_heads) * model.head_dim / mesh.tensor
        kept += 2 * (model.expert_mlp_dim if spec.moe else model.mlp_dim) / mesh.tensor
        if spec.moe:
            kept += model.top_k * ROOM * (model.embed_dim + 2 * model.expert_mlp_dim / mesh.tensor)
    return kept


def _compute_seconds(work: Work, chip: Chip) -> float:
    """Of one device that did everything once. Scores, the router and the head's logits are never of 8 bits."""
    if not in_fp8(work):
        return work.model_flops / chip.bf16
    used = (_layer_parameters(work.config.model, spec) for spec in work.config.model.layers)
    experts, top_k = max(1, work.config.model.num_experts), work.config.model.top_k
    linear = sum(attention + always + routed * top_k / experts for attention, always, routed in used)
    flops = 3 * 2 * linear * work.rows * work.context
    return flops / chip.fp8 + (work.model_flops - flops) / chip.bf16


def in_fp8(work: Work) -> bool:
    """Whether linear layers multiply numbers of 8 bits ("fp8_block" only imitates them)."""
    return work.step == "train" and work.config.precision.matmul in IN_8_BITS


def precision_notes(work: Work, chip: Chip) -> tuple[str, ...]:
    """What is to be said of the number formats on this chip."""
    if work.config.lora.rank:
        factors = count_factors(work.config.model, work.config.lora)
        of_base = f"in {work.weights.weights}" if work.weights else f"in {work.config.precision.params}"
        return (
            f"{factors / 1e6:,.1f} M of adapters learn, beside a base {of_base} that has neither gradients nor moments",
            "what a LoRA step sends is counted as if all parameters learned",
        )
    if work.weights is not None:
        whole = sum(_weights(work, MeshConfig(data=1)).values()) / 1e9
        inputs = "all" if work.weights.group is None else work.weights.group
        return (
            f"weights of {whole:,.1f} GB in all: matrices of the decoder in {work.weights.weights} with a scale for "
            f"{inputs} inputs of an output; embedding, output head, router and norms in bfloat16, and all products",
        )
    if not in_fp8(work):
        return ()
    if chip.fp8 <= chip.bf16:
        return (f"a {chip.name} has no units for fp8: precision.matmul fp8 saves memory there, not time",)
    return (f"linear layers at the {chip.name}'s peak for fp8, all else at that for bfloat16",)


def _layer_parameters(model: ModelConfig, spec: LayerSpec) -> tuple[int, int, int]:
    """Of attention, of the feed-forward that every token uses, and of the routed experts."""
    attention = model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    expert = 3 * model.embed_dim * model.expert_mlp_dim
    if spec.moe:
        return attention, expert, model.num_experts * expert
    return attention, 3 * model.embed_dim * model.mlp_dim, 0


def _memory(work: Work, mesh: MeshConfig) -> tuple[dict[str, float], float]:
    """Bytes on a device, by category, and of temporaries."""
    model, config = work.config.model, work.config
    counted = count_parameters(model)
    size, compute = BYTES[config.precision.params], BYTES[config.precision.compute]
    if work.step != "train":
        cache = sum(cache_parts(work, mesh))
        width = 2 * model.expert_mlp_dim + 4 * model.embed_dim
        temporaries = work.rows * work.tokens / mesh.data * width * compute
        temporaries += work.rows / mesh.data * model.vocab_size / mesh.tensor * 4  # logits
        if work.weights is not None:  # a matrix at a time may stand in full
            temporaries += 2 * model.embed_dim * max(model.mlp_dim, model.expert_mlp_dim) / mesh.tensor * compute
        return {**_weights(work, mesh), "cache": cache}, temporaries
    split = mesh.fsdp * mesh.expert * mesh.tensor * mesh.context
    held = counted.total / split
    tokens = work.rows * work.context / config.grad_accumulation
    tokens /= mesh.data * mesh.fsdp * mesh.expert * mesh.context
    parts = max((_layer_parameters(model, spec) for spec in model.layers), key=sum)
    gathered = (parts[0] + parts[1]) / mesh.tensor + parts[2] / (mesh.expert * mesh.tensor)
    ends = model.vocab_size * model.embed_dim / mesh.tensor
    width = 4 * (1 + model.top_k) * model.expert_mlp_dim / mesh.tensor + 8 * model.embed_dim
    if config.lora.rank:
        factors = count_factors(model, config.lora) / split
        widths = [model.expert_mlp_dim if spec.moe else model.mlp_dim for spec in model.layers]
        whole = 2 * model.embed_dim * max(widths) / mesh.tensor
        temporaries = factors * 4 + tokens * (_kept(config, mesh) + width) * compute
        # A matrix at a time is dequantized, or a layer is gathered; of the head a piece's logits, and no gradient.
        temporaries += (whole if split == 1 else gathered) * compute
        temporaries += min(tokens, PIECE_TOKENS_ELSEWHERE) * model.vocab_size / mesh.tensor * (4 + 4 + compute)
        base = sum(_weights(work, MeshConfig(data=1)).values()) / split
        of_base = f"base, {'mostly ' + work.weights.weights if work.weights else config.precision.params}"
        return {of_base: base, "adapters": factors * 4, "optimizer": factors * 8, "batch": tokens * 24}, temporaries
    temporaries = held * size  # gradients
    temporaries += tokens * (_kept(config, mesh) + width) * compute
    temporaries += max(3 * gathered * compute, ends * (compute + 4))
    return {"parameters": held * size, "optimizer": held * 8, "batch": tokens * 24}, temporaries


def cache_parts(work: Work, mesh: MeshConfig) -> tuple[float, float]:
    """Bytes of a cache on a device: of global layers, whose slots are split, and of chunked ones, that hold a chunk."""
    whole = sum(work.context for spec in work.config.model.layers if spec.chunk is None) / mesh.context
    chunks = sum(min(spec.chunk, work.context) for spec in work.config.model.layers if spec.chunk is not None)
    rows, model = _rows_of_a_device(work.rows, mesh), work.config.model
    each = rows * 2 * model.num_kv_heads * model.head_dim / mesh.tensor * work.cache_bytes
    return whole * each, chunks * each


def _rows_of_a_device(rows: int, mesh: MeshConfig) -> int:
    """Of a cache. A mesh axis that does not divide what is left of them splits no rows."""
    for ways in (mesh.data, mesh.fsdp, mesh.expert):
        rows = rows // ways if rows % ways == 0 else rows
    return rows


def _weights(work: Work, mesh: MeshConfig) -> dict[str, float]:
    """Bytes of a served model's weights on a device. Quantized, by what they are."""
    total, size = count_parameters(work.config.model).total, BYTES[work.config.precision.params]
    matrices = list(_matrices(work.config.model))
    shared = mesh.tensor * mesh.fsdp  # devices that a matrix of attention is split over; all else is over `expert`, too
    if work.weights is None:
        attention = sum(m.inputs * m.outputs for m in matrices if m.of_attention)
        return {"parameters": (attention / shared + (total - attention) / (shared * mesh.expert)) * size}
    values = scales = 0.0
    for matrix in matrices:
        ways = shared * (1 if matrix.of_attention else mesh.expert)
        groups = num_groups((matrix.inputs,), work.weights, what=matrix.name)
        values += matrix.inputs * matrix.outputs * bits(work.weights) / 8 / ways
        each = SCALE_BYTES if work.weights.group is None else SCALE_BYTES_OF_A_GROUP
        scales += groups * matrix.outputs * each / ways
    kept = (total - sum(m.inputs * m.outputs for m in matrices)) * size / (shared * mesh.expert)
    return quantized_parts(work.weights, values, scales, kept)


def quantized_parts(scheme: Scheme, values, scales, kept) -> dict:
    """What the parts of a quantized model are called."""
    return {f"values, {scheme.weights}": values, "scales": scales, "kept in bfloat16": kept}


class _Matrix(NamedTuple):
    """A matrix of the decoder that can be quantized, or as many as there are experts."""

    name: str
    inputs: int
    outputs: int
    of_attention: bool = False


def _matrices(model: ModelConfig) -> Iterator[_Matrix]:
    dim, heads, kv_heads = model.embed_dim, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for number, spec in enumerate(model.layers):
        for name, inputs, outputs in (("q", dim, heads), ("k", dim, kv_heads), ("v", dim, kv_heads), ("o", heads, dim)):
            yield _Matrix(f"layers.{number}.attention.{name}.kernel", inputs, outputs, of_attention=True)
        parts = [("moe", model.num_experts), ("moe.shared", 1)] if spec.moe else [("mlp", 1)]
        width = model.expert_mlp_dim if spec.moe else model.mlp_dim
        for part, copies in parts:
            yield _Matrix(f"layers.{number}.{part}.gate_up", dim, copies * 2 * width)
            yield _Matrix(f"layers.{number}.{part}.down", width, copies * dim)


def _traffic(work: Work, mesh: MeshConfig, arguments: dict[str, float]) -> float:
    """Bytes to and from a device's memory."""
    config = work.config
    if work.step == "decode":
        # Attention is on every device of `expert` and `context`, and what one reads does not spare the others.
        attention = sum(m.inputs * m.outputs for m in _matrices(config.model) if m.of_attention) * matrix_bytes(work)
        others = (work.weight_traffic - attention) / (mesh.tensor * mesh.fsdp * mesh.expert)
        return arguments["cache"] + attention / (mesh.tensor * mesh.fsdp) + others
    tokens = work.rows * work.tokens / (mesh.data * mesh.fsdp * mesh.expert * mesh.context)
    passes = 4 if work.step == "train" else 1  # forward, again, and two backward
    activations = tokens * config.model.num_layers * 20 * config.model.embed_dim * 2
    return passes * activations + (3 if work.step == "train" else 1) * sum(arguments.values())


def _sent(work: Work, mesh: MeshConfig, topology: Topology) -> Iterator[Counted]:
    """Collectives of a step."""
    config, model = work.config, work.config.model
    if work.step == "train":
        yield from count(config, work.rows, work.context, mesh, on_tpu=topology.chip.torus > 0)
        return
    layers, rows = model.num_layers, work.rows * work.tokens / (mesh.data * mesh.fsdp * mesh.expert)
    hidden = rows * model.embed_dim * BYTES[config.precision.compute]
    yield Counted("all-reduce", ("tensor",), 2 * layers, hidden)
    yield Counted("all-gather", ("expert",), layers, hidden * mesh.expert)
    yield Counted("reduce-scatter", ("expert",), layers, hidden * mesh.expert)
    # Weights are gathered for every token.
    every = sum(_weights(work, dataclasses.replace(mesh, fsdp=1)).values())
    yield Counted("all-gather", ("fsdp",), layers, every / layers)


def _seconds(counted: Counted, mesh: MeshConfig, topology: Topology) -> float:
    """About how long one of them takes."""
    ways = math.prod(getattr(mesh, axis) for axis in counted.axes)
    bandwidth = _bandwidth(topology, mesh, counted.axes)
    if counted.kind == "collective-permute":
        return counted.bytes / bandwidth
    if "all-to-all" in counted.kind and topology.chip.torus:  # in a ring of n an n-th goes half around, and so on
        dimensions = _dimensions(topology, ways)
        return counted.bytes * ways ** (1 / dimensions) / 4 / (bandwidth / dimensions)
    return counted.bytes * (ways - 1) / ways * (2 if counted.kind == "all-reduce" else 1) / bandwidth


def _dimensions(topology: Topology, ways: int) -> int:
    """About how many dimensions of a torus so many devices lie along."""
    return max(1, round(topology.chip.torus * math.log(ways) / math.log(topology.num_devices)))


def _bandwidth(topology: Topology, mesh: MeshConfig, axes: tuple[str, ...]) -> float:
    """About what a device can send along these axes, a second."""
    chip = topology.chip
    if not chip.torus:
        names = [field.name for field in dataclasses.fields(MeshConfig)]
        span = math.prod(mesh.shape[min(names.index(axis) for axis in axes if getattr(mesh, axis) > 1) :])
        return chip.link if span <= chip.per_host else chip.host_link
    ways = math.prod(getattr(mesh, axis) for axis in axes)
    dimensions = _dimensions(topology, ways)
    rings = 2 if max(topology.sizes) >= chip.wraps_at and topology.num_devices > 1 else 1
    return dimensions * rings * chip.link / chip.per_chip

"""Every tensor of the model, once: its name and layout here, at Hugging Face, and at Meta.

A row says what our array's axes are, and how each format writes the same axes down, in einops' words:

    ours  layers.0.attention.q.kernel                  D N H
    hf    model.layers.0.self_attn.q_proj.weight       (N H) D
    meta  layers.0.attention.wqkv.weight, its first N H rows   (N H) D

So each tensor of a file, on each model-parallel rank, is one box of ours with its axes in another order: `Row.boxes`
gives these boxes as views of the file's tensor. Reading any part of ours copies from the boxes it meets, and writing
copies into them, through the same views. Every operation is a permutation of elements: the round trip is bit-exact, and
gradients map as weights do. Where a format keeps apart what we keep together (gate and up; one expert and the next),
its tensors are the steps of the leading axis.

A quantized tensor is its values, which lie as the tensor does, and its scales. These have a row that follows from the
tensor's own: the axes that a product sums over become one, G, of the groups of inputs that share a scale.

    ours  layers.1.moe.gate_up                         E P D F      layers.1.moe.gate_up_scale             E P G F
    hf    …feed_forward.experts.gate_up_proj           E D (P F)    …experts.gate_up_proj_scale            E G (P F)

Where a model-parallel rank has a part of the inputs, it has scales of its own for them, which are thus groups too.

The table is total. A tensor that no row claims, one that is missing, has another shape or is there twice, is an error
that names it, before anything is read.

Sources: `modeling_llama4.py` of transformers 5.23; the load hooks of llama-models 0.3.0 (`model.py`, `ffn.py`,
`moe.py`), whose published key comes first below and the keys of its own modules after it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import jax
import numpy as np
from einops import rearrange

from llama4_jax.model.config import ModelConfig, VisionConfig
from llama4_jax.untrusted_json import shortened
from llama4_jax.weights.mapped import write_through

Format = Literal["hf", "meta"]
Shape = tuple[int, ...]
Ours = Mapping[str, np.ndarray | jax.Array]  # by our names, one entry a layer

# A checkpoint with pictures can be read as a text model: these are then passed over.
VISION = {
    "hf": re.compile(r"(vision_model|multi_modal_projector)\."),
    "meta": re.compile(r"(vision_embeddings|vision_projection)\."),
}
# What Meta's checkpoints hold beside weights: rotary tables, statistics and serialised states of their training.
_META_IS_NO_WEIGHT = re.compile(
    r"rope\.freqs|freq_cis|.*\._extra_state|.*\.(global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)"
)
# What quantizers measure of activations, and of keys and values, beside a linear layer's weight. compressed-tensors:
# input_scale, output_scale and zero points of a layer, q_scale, k_scale and v_scale of its attention; modelopt too, but
# k_proj.k_scale and v_proj.v_scale; both have …_proj_input_scale for fused experts. fbgemm: input_scale_ub.
_OF_ACTIVATIONS = re.compile(
    r"(?P<owner>.+)\.((input|output)_(scale|zero_point)|input_scale_ub|[qkv]_(scale|zero_point)"
    r"|(gate_up|down)_proj_input_scale(_ub)?)"
)
SCALE = "_scale"  # after the name of a quantized tensor, ours or a file's: the name of its scales
LANGUAGE_MODEL = "language_model."  # Llama4ForConditionalGeneration puts it before the names of Llama4ForCausalLM


@runtime_checkable
class Tensors(Protocol):
    """Where named tensors come from: a checkpoint's files, or a dictionary (`InMemory`)."""

    def shapes(self) -> Mapping[str, Shape]: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class InMemory:
    """Tensors that are already arrays."""

    arrays: Mapping[str, np.ndarray]

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(array.shape) for name, array in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.arrays[name])


@dataclass(frozen=True)
class Layout:
    """How one format stores one of our tensors."""

    names: tuple[str, ...]  # of its tensors; several are the steps of the leading axis of `axes`
    axes: str  # of the tensor, or the stack: "(N H) D"
    split: str | None = None  # the axis that Meta's model-parallel ranks divide among them; None: each has all
    rows: tuple[int, int] | None = None  # (first, of): shares the leading axis of one tensor with other rows
    scale_axes: str | None = None  # of its scales, where they are not `axes` with G for what is contracted

    def scale(self, contracted: str) -> "Layout":
        """Of its scales: beside it, a tensor for each of its own."""
        axes = self.scale_axes or _grouped(self.axes, contracted)
        split = "G" if self.split in contracted.split() else self.split
        return Layout(tuple(name + SCALE for name in self.names), axes, split, self.rows)


@dataclass(frozen=True)
class Box:
    """A part of one of our tensors, and where a file has it."""

    start: Shape  # of the part, along each of our axes
    view: np.ndarray  # the file's tensor, its axes in our order


@dataclass(frozen=True)
class Row:
    """One tensor of ours. `hf` and `meta` list the layouts it may be found in; the first is the one written.

    - contracted: those of its axes, side by side, that a product with it sums over; "" for what is no matrix
    - per_byte: numbers that share a byte, neighbours along the last contracted axis. `sizes` are of what is stored
    """

    ours: str
    axes: str
    sizes: Mapping[str, int]  # of each axis
    hf: tuple[Layout, ...]
    meta: tuple[Layout, ...]
    contracted: str = ""
    per_byte: int = 1

    @property
    def shape(self) -> Shape:
        return tuple(self.sizes[axis] for axis in self.axes.split())

    @property
    def num_inputs(self) -> int:
        """Over how many numbers a product with it sums."""
        return math.prod(self.sizes[axis] for axis in self.contracted.split()) * self.per_byte

    @property
    def whole(self) -> "Index":
        return tuple(slice(0, size) for size in self.shape)

    def layouts(self, fmt: Format) -> tuple[Layout, ...]:
        return self.hf if fmt == "hf" else self.meta

    def scale(self, groups: int) -> "Row":
        """The row of the scales, if each of `groups` equal runs of inputs has one for each output: [D, N, H] has scales
        [G, N, H], [N, H, D] has [G, D]."""
        axes = _grouped(self.axes, self.contracted)
        sizes = {axis: groups if axis == "G" else self.sizes[axis] for axis in axes.split()}
        hf, meta = (tuple(layout.scale(self.contracted) for layout in found) for found in (self.hf, self.meta))
        return Row(self.ours + SCALE, axes, sizes, hf, meta)

    def packed(self) -> "Row":
        """The row with two numbers a byte."""
        return self._stored(2)

    def unpacked(self) -> "Row":
        return self._stored(1)

    def _stored(self, per_byte: int) -> "Row":
        last = self.contracted.split()[-1] if self.per_byte != per_byte else None
        sizes = {a: size * self.per_byte // per_byte if a == last else size for a, size in self.sizes.items()}
        return dataclasses.replace(self, sizes=sizes, per_byte=per_byte)

    def file_shape(self, layout: Layout, ranks: int = 1) -> Shape:
        """Of each of the layout's tensors, as one of `ranks` model-parallel ranks holds it.

        Raises ValueError if the ranks do not divide it.
        """
        sizes = self._rank_sizes(layout, ranks)
        shape = [math.prod(sizes[axis] for axis in group) for group in groups(layout.axes)]
        if len(layout.names) > 1:
            shape = shape[1:]
        if layout.rows is not None:
            shape[0] = layout.rows[1] // (ranks if layout.split else 1)
        return tuple(shape)

    def boxes(
        self, layout: Layout, ranks: Sequence[Sequence[np.ndarray]], *, first: int = 0, of: int | None = None
    ) -> list[Box]:
        """Our tensor as boxes of the layout's tensors: one sequence of them for each rank that holds a part.

        - first, of: these are the ranks from `first` on of `of`; all of them if not given
        """
        sizes = self._rank_sizes(layout, of or len(ranks))
        stacked = groups(layout.axes)[0] if len(layout.names) > 1 else ()
        steps = tuple(sizes[axis] for axis in stacked)
        boxes = []
        for rank, tensors in enumerate(ranks, first):
            for step, tensor in enumerate(tensors):
                start = dict.fromkeys(self.axes.split(), 0)
                if layout.split is not None:
                    start[layout.split] = rank * sizes[layout.split]
                if stacked:
                    start |= zip(stacked, map(int, np.unravel_index(step, steps)), strict=True)
                    tensor = tensor[None]
                elif layout.rows is not None:
                    own = math.prod(sizes[axis] for axis in groups(layout.axes)[0])
                    before = layout.rows[0] * sizes[layout.split] // self.sizes[layout.split]
                    tensor = tensor[before : before + own]
                one = {axis: 1 if axis in stacked else sizes[axis] for axis in start}
                boxes.append(Box(tuple(start.values()), rearrange(tensor, f"{layout.axes} -> {self.axes}", **one)))
        return boxes

    def to_ours(self, layout: Layout, *ranks: Sequence[np.ndarray]) -> np.ndarray:
        """Our array from the layout's tensors: one sequence of them for each rank that has a part of it.

        A view where that is possible.
        """
        return read_boxes(self.boxes(layout, ranks), self.whole)

    def _rank_sizes(self, layout: Layout, ranks: int) -> dict[str, int]:
        if layout.split is None:
            return dict(self.sizes)
        size = self.sizes[layout.split]
        if size % ranks:
            raise ValueError(f"{layout.names[0]}: {ranks} ranks do not divide its axis {layout.split} of {size}.")
        return {**self.sizes, layout.split: size // ranks}


def _grouped(axes: str, contracted: str) -> str:
    return axes.replace(f"({contracted})", "G").replace(contracted, "G")


def groups(axes: str) -> list[tuple[str, ...]]:
    """Which of our axes each axis of a file's tensor is made of: "(N H) D" → [("N", "H"), ("D",)]."""
    return [tuple((group or single).split()) for group, single in re.findall(r"\(([^)]*)\)|(\w+)", axes)]


Index = tuple[slice, ...]  # a part of one of our arrays: start and stop along every axis


def read_boxes(boxes: Sequence[Box], part: Index, check: Callable[[np.ndarray], None] | None = None) -> np.ndarray:
    """A part of our array; a view if it lies in one box. `check` is given what is read of each box."""
    meeting = list(_meeting(boxes, part))
    for box, there, _ in meeting if check is not None else ():
        check(box.view[there])
    if len({box.view.dtype for box in boxes}) > 1:
        raise ValueError(f"the parts of one tensor have different dtypes: {[box.view.dtype.name for box in boxes]}.")
    if len(meeting) == 1:
        [(box, there, _)] = meeting
        return box.view[there]
    out = np.empty([s.stop - s.start for s in part], meeting[0][0].view.dtype)
    for box, there, here in meeting:
        copy(bits(out)[here], bits(box.view[there]))
    return out


def write_boxes(boxes: Sequence[Box], part: Index, array: np.ndarray) -> None:
    """Copies a part of our array to where the boxes' files have it."""
    for box, there, here in _meeting(boxes, part):
        copy(bits(box.view)[there], bits(array)[here])


def _meeting(boxes: Sequence[Box], part: Index) -> Iterator[tuple[Box, Index, Index]]:
    """Each box that a part of ours meets: where in the box, and where in the part."""
    for box in boxes:
        spans = [
            (max(s.start, first), min(s.stop, first + size))
            for s, first, size in zip(part, box.start, box.view.shape, strict=True)
        ]
        if all(first < last for first, last in spans):
            there = tuple(slice(a - first, b - first) for (a, b), first in zip(spans, box.start, strict=True))
            here = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(spans, part, strict=True))
            yield box, there, here


def row_major(array: np.ndarray) -> np.ndarray:
    """The array if its memory is in this order, otherwise a copy that is."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy(bits(out), bits(array))
    return out


_TILE = 256  # rows and columns that stay in a core's cache while they change places


def copy(to: np.ndarray, source: np.ndarray) -> None:
    """to[...] = source, three times as fast where it transposes: numpy goes through one of the two in strides."""
    if isinstance(to, np.memmap):
        order = sorted(range(to.ndim), key=lambda i: (-to.strides[i], -to.shape[i]))  # as in the file
        if to.transpose(order).flags.c_contiguous:
            write_through(to.transpose(order), row_major(source.transpose(order)))
            return
    if to.ndim < 2 or to.size < _TILE**2:
        to[...] = source
        return
    axes = [i for i in reversed(range(to.ndim)) if to.shape[i] > 1]
    fast_to, fast_source = (min(axes, key=lambda i, a=a: abs(a.strides[i])) for a in (to, source))
    if fast_to == fast_source:
        to[...] = source
        return
    index = [slice(None)] * to.ndim
    for i in range(0, to.shape[fast_to], _TILE):
        index[fast_to] = slice(i, i + _TILE)
        for j in range(0, to.shape[fast_source], _TILE):
            index[fast_source] = slice(j, j + _TILE)
            to[tuple(index)] = source[tuple(index)]


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: numpy copies formats that are not its own (bfloat16) one by one."""
    return array.view(f"u{array.dtype.itemsize}")


# ---------------------------------------------------------------------------------------------------------------------
# The table


def rows(config: ModelConfig) -> list[Row]:
    """The table for one model, in the order of its layers; then its vision encoder and projector, if it has them."""
    sizes = {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "P": 2,  # the pair: gate, up
    }

    def row(
        ours: str,
        axes: str,
        contracted: str = "",
        *,
        hf: Layout | Sequence[Layout],
        meta: Sequence[Layout],
        mlp_dim: int = 0,
    ) -> Row:
        every = {**sizes, "F": mlp_dim}
        of_hf = (hf,) if isinstance(hf, Layout) else tuple(hf)
        return Row(ours, axes, {axis: every[axis] for axis in axes.split()}, of_hf, tuple(meta), contracted)

    table = [
        row(
            "embed.embedding",
            "V D",
            hf=_one("model.embed_tokens.weight", "V D"),
            meta=[_one("tok_embeddings.weight", "V D", split="V")],
        )
    ]
    for i, spec in enumerate(config.layers):
        table += _attention_rows(row, i, sizes)
        table += _moe_rows(row, i, config) if spec.moe else _dense_rows(row, i, config.mlp_dim)
    table += [
        row("final_norm.scale", "D", hf=_one("model.norm.weight", "D"), meta=[_one("norm.weight", "D")]),
        row(
            "lm_head.kernel",
            "D V",
            "D",
            hf=_one("lm_head.weight", "V D"),
            meta=[_one("output.weight", "V D", split="V")],
        ),
    ]
    return table + (_vision_rows(config.vision, config.embed_dim) if config.vision is not None else [])


def _one(name: str, axes: str, *, split: str | None = None, rows: tuple[int, int] | None = None) -> Layout:
    return Layout((name,), axes, split, rows)


def _attention_rows(row: Callable[..., Row], i: int, sizes: Mapping[str, int]) -> list[Row]:
    ours, hf, meta = f"layers.{i}.", f"model.layers.{i}.", f"layers.{i}."
    table = [
        row(
            ours + "attention_norm.scale",
            "D",
            hf=_one(hf + "input_layernorm.weight", "D"),
            meta=[
                _one(meta + "attention.wqkv.layer_norm_weight", "D"),
                _one(meta + "attention_norm.weight", "D"),
            ],
        )
    ]
    fused = (sizes["N"] + 2 * sizes["K"]) * sizes["H"]
    first = 0
    for name, heads in (("q", "N"), ("k", "K"), ("v", "K")):
        axes = f"({heads} H) D"
        table.append(
            row(
                f"{ours}attention.{name}.kernel",
                f"D {heads} H",
                "D",
                hf=_one(f"{hf}self_attn.{name}_proj.weight", axes),
                meta=[
                    _one(meta + "attention.wqkv.weight", axes, split=heads, rows=(first, fused)),
                    _one(f"{meta}attention.w{name}.weight", axes, split=heads),
                ],
            )
        )
        first += sizes[heads] * sizes["H"]
    table.append(
        row(
            ours + "attention.o.kernel",
            "N H D",
            "N H",
            hf=_one(hf + "self_attn.o_proj.weight", "D (N H)"),
            meta=[_one(meta + "attention.wo.weight", "D (N H)", split="N")],
        )
    )
    return table


def _dense_rows(row: Callable[..., Row], i: int, mlp_dim: int) -> list[Row]:
    ours, hf, meta = f"layers.{i}.", f"model.layers.{i}.", f"layers.{i}."
    gate, up, down = (f"{hf}feed_forward.{name}_proj.weight" for name in ("gate", "up", "down"))
    w1, w2, w3 = (f"{meta}feed_forward.w{n}.weight" for n in (1, 2, 3))
    return [
        row(
            ours + "mlp_norm.scale",
            "D",
            hf=_one(hf + "post_attention_layernorm.weight", "D"),
            meta=[
                _one(meta + "feed_forward.mlp.layer_norm_weight", "D"),
                _one(meta + "ffn_norm.weight", "D"),
            ],
        ),
        row(
            ours + "mlp.gate_up.kernel",
            "D P F",
            "D",
            mlp_dim=mlp_dim,
            hf=Layout((gate, up), "P F D"),
            meta=[
                _one(meta + "feed_forward.mlp.fc1_weight", "(P F) D", split="F"),
                Layout((w1, w3), "P F D", split="F"),
            ],
        ),
        row(
            ours + "mlp.down.kernel",
            "F D",
            "F",
            mlp_dim=mlp_dim,
            hf=_one(down, "D F"),
            meta=[
                _one(meta + "feed_forward.mlp.fc2_weight", "D F", split="F"),
                _one(w2, "D F", split="F"),
            ],
        ),
    ]


def _moe_rows(row: Callable[..., Row], i: int, config: ModelConfig) -> list[Row]:
    mlp_dim = config.expert_mlp_dim
    ours, hf, meta = f"layers.{i}.", f"model.layers.{i}.", f"layers.{i}.feed_forward."
    gate, up, down = (f"{hf}feed_forward.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down"))
    w1, w2, w3 = (f"{meta}shared_expert.w{n}.weight" for n in (1, 2, 3))

    def of_each_expert(*names: str) -> tuple[str, ...]:
        """As quantizers write them: a linear layer for each expert."""
        where = f"{hf}feed_forward.experts."
        return tuple(f"{where}{e}.{name}_proj.weight" for e in range(config.num_experts) for name in names)

    return [
        row(
            ours + "mlp_norm.scale",
            "D",
            hf=_one(hf + "post_attention_layernorm.weight", "D"),
            meta=[_one(meta + "norm.weight", "D"), _one(f"layers.{i}.ffn_norm.weight", "D")],
        ),
        row(
            ours + "moe.router.kernel",
            "D E",
            "D",
            hf=_one(hf + "feed_forward.router.weight", "E D"),
            meta=[_one(meta + "router_DE", "D E")],
        ),
        row(
            ours + "moe.gate_up",
            "E P D F",
            "D",
            mlp_dim=mlp_dim,
            hf=[
                _one(hf + "feed_forward.experts.gate_up_proj", "E D (P F)"),
                Layout(of_each_expert("gate", "up"), "(E P) F D"),
            ],
            meta=[
                Layout((meta + "experts.moe_w_in_eD_F", meta + "experts.moe_w_swiglu_eD_F"), "P (E D) F", split="F"),
                Layout((meta + "experts.w1", meta + "experts.w3"), "P E D F", split="F"),
            ],
        ),
        row(
            ours + "moe.down",
            "E F D",
            "F",
            mlp_dim=mlp_dim,
            hf=[
                # fbgemm writes these scales as of the transposed matrix
                Layout((hf + "feed_forward.experts.down_proj",), "E F D", scale_axes="E D G"),
                Layout(of_each_expert("down"), "E D F"),
            ],
            meta=[
                _one(meta + "experts.moe_w_out_eF_D", "(E F) D", split="F"),
                _one(meta + "experts.w2", "E F D", split="F"),
            ],
        ),
        row(
            ours + "moe.shared.gate_up.kernel",
            "D P F",
            "D",
            mlp_dim=mlp_dim,
            hf=Layout((gate, up), "P F D"),
            meta=[
                Layout((meta + "w_in_shared_FD.weight", meta + "w_swiglu_FD.weight"), "P F D", split="F"),
                Layout((w1, w3), "P F D", split="F"),
            ],
        ),
        row(
            ours + "moe.shared.down.kernel",
            "F D",
            "F",
            mlp_dim=mlp_dim,
            hf=_one(down, "D F"),
            meta=[_one(meta + "w_out_shared_DF.weight", "D F", split="F"), _one(w2, "D F", split="F")],
        ),
    ]


def _vision_rows(config: VisionConfig, text_dim: int) -> list[Row]:
    """The encoder, the adapter after it, and the projector into the text model's space."""
    sizes = {
        "D": config.embed_dim,
        "N": config.num_heads,
        "H": config.embed_dim // config.num_heads,
        "F": config.mlp_dim,
        "T": config.num_patches + 1,  # and the class token
        "I": config.patch_size**2 * config.num_channels,  # numbers of one patch
        "S": config.shuffled_dim,
        "A": config.adapter_dim,
        "O": config.output_dim,
        "X": text_dim,
    }
    encoder = "vision_embeddings.vision_encoder."
    table: list[Row] = []

    def add(ours: str, axes: str, hf: str, meta: str, file_axes: str | None = None, split: str | None = None) -> None:
        file_axes = file_axes or axes
        own = {axis: sizes[axis] for axis in axes.split()}
        contracted = ""
        if ours.endswith(".kernel"):  # a linear layer, whose inputs come first; those of o are heads
            contracted = "N H" if axes.startswith("N H") else axes.split()[0]
        table.append(Row(ours, axes, own, (_one(hf, file_axes),), (_one(meta, file_axes, split=split),), contracted))

    def norm(ours: str, hf: str, meta: str) -> None:
        for mine, theirs in (("scale", "weight"), ("bias", "bias")):
            add(f"{ours}.{mine}", "D", f"{hf}.{theirs}", f"{meta}.{theirs}")

    add("vision.class_embedding", "D", "vision_model.class_embedding", encoder + "class_embedding")
    add(
        "vision.positional_embedding",
        "T D",
        "vision_model.positional_embedding_vlm",
        encoder + "positional_embedding_vlm",
    )
    patch = ("vision_model.patch_embedding.linear.weight", encoder + "conv1._linear.weight")
    add("vision.patch_embed.kernel", "I D", *patch, "D I", "D")
    norm("vision.pre_norm", "vision_model.layernorm_pre", encoder + "ln_pre")
    for i in range(config.num_layers):
        ours, hf = f"vision.layers.{i}.", f"vision_model.model.layers.{i}."
        meta = f"{encoder}transformer.resblocks.{i}."
        norm(ours + "attention_norm", hf + "input_layernorm", meta + "ln_1")
        for name in "qkv":
            theirs = (f"{hf}self_attn.{name}_proj.", f"{meta}attn.w{name}.")
            add(f"{ours}attention.{name}.kernel", "D N H", *(n + "weight" for n in theirs), "(N H) D", "N")
            add(f"{ours}attention.{name}.bias", "N H", *(n + "bias" for n in theirs), "(N H)", "N")
        theirs = (hf + "self_attn.o_proj.", meta + "attn.wo.")
        add(ours + "attention.o.kernel", "N H D", *(n + "weight" for n in theirs), "D (N H)", "N")
        add(ours + "attention.o.bias", "D", *(n + "bias" for n in theirs))
        norm(ours + "mlp_norm", hf + "post_attention_layernorm", meta + "ln_2")
        theirs = (hf + "mlp.fc1.", meta + "mlp.c_fc.")
        add(ours + "mlp.fc1.kernel", "D F", *(n + "weight" for n in theirs), "F D", "F")
        add(ours + "mlp.fc1.bias", "F", *(n + "bias" for n in theirs), split="F")
        theirs = (hf + "mlp.fc2.", meta + "mlp.c_proj.")
        add(ours + "mlp.fc2.kernel", "F D", *(n + "weight" for n in theirs), "D F", "F")
        add(ours + "mlp.fc2.bias", "D", *(n + "bias" for n in theirs))
    norm("vision.post_norm", "vision_model.layernorm_post", encoder + "ln_post")
    hf, meta = "vision_model.vision_adapter.mlp.", "vision_embeddings.vision_adapter.mlp."
    add("vision.adapter.fc1.kernel", "S A", hf + "fc1.weight", meta + "c_fc.weight", "A S", "A")
    add("vision.adapter.fc2.kernel", "A O", hf + "fc2.weight", meta + "c_proj.weight", "O A", "A")
    add("projector.kernel", "O X", "multi_modal_projector.linear_1.weight", "vision_projection.weight", "X O", "X")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Matching a checkpoint with the table


@dataclass(frozen=True)
class Plan:
    """What is to be read: the layout found for each row, and what is passed over."""

    matches: tuple[tuple[Row, Layout], ...]
    file_names: Mapping[str, str] = field(repr=False)  # of each name in the table
    vision: tuple[str, ...]  # tensors of the vision encoder and its projector, where the config has none
    activation_scales: tuple[str, ...] = ()  # what a quantizer measured of activations; here these are measured anew

    @functools.cached_property
    def scales(self) -> frozenset[str]:
        """Those of our tensors that are scales of others."""
        return frozenset(name + SCALE for name in self.by_name if name + SCALE in self.by_name)

    @functools.cached_property
    def by_name(self) -> dict[str, tuple[Row, Layout]]:
        return {row.ours: (row, layout) for row, layout in self.matches}


def plan(config: ModelConfig, fmt: Format, shapes: Mapping[str, Shape], ranks: int = 1) -> Plan:
    """Finds every row in a checkpoint of these tensors (of one rank of `ranks`), reading nothing.

    Raises ValueError naming tensors that are unknown, missing, of another shape, or there twice: the first few.
    """
    file_names, vision, problems = _names_in_table(fmt, shapes, with_vision=config.vision is not None)
    matches: list[tuple[Row, Layout]] = []
    claimed: set[str] = set()
    for row in rows(config):
        found = [layout for layout in row.layouts(fmt) if any(name in file_names for name in layout.names)]
        if len(found) > 1:
            names = [name for layout in found for name in layout.names if name in file_names]
            problems.append(f"the same weights twice, as {', '.join(names)}")
        layout = found[0] if found else row.layouts(fmt)[0]
        stored = [(row, layout)]
        if row.contracted and any(name + SCALE in file_names for name in layout.names):
            there = {name: tuple(shapes[of_file]) for name, of_file in file_names.items()}
            stored, problem = _quantized(row, layout, there, ranks)
            problems += problem
        for part, part_layout in stored:
            for name in part_layout.names:
                if name not in file_names:
                    problems.append(f"missing: {name}")
                    continue
                expected, actual = part.file_shape(part_layout, ranks), tuple(shapes[file_names[name]])
                if actual != expected and name not in claimed:
                    problems.append(f"wrong shape: {name} is {list(actual)}, but the config makes it {list(expected)}")
                claimed.add(name)
        claimed.update(name for other in found for name in other.names)
        matches += stored
    unclaimed = [name for name in file_names if name not in claimed]
    of_activations = _activation_scales(unclaimed, claimed) if fmt == "hf" else []
    passed_over = set(of_activations)
    problems += [f"unknown: {name}" for name in unclaimed if name not in passed_over]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit the model's config in {len(problems)} point(s):\n  {_listed(problems)}"
            + "\nCheck that the config and the weights belong together."
        )
    return Plan(tuple(matches), file_names, tuple(vision), tuple(file_names[name] for name in of_activations))


def _activation_scales(names: Sequence[str], weights: set[str]) -> list[str]:
    """Those of the names that are scales and zero points of activations, beside weights that the table knows."""
    owner_of = {name: match["owner"] for name in names if (match := _OF_ACTIVATIONS.fullmatch(name))}
    wanted = set(owner_of.values())
    if not wanted:
        return []
    owners = {name[: dot.start()] for name in weights for dot in re.finditer(r"\.", name)} & wanted
    return [name for name, owner in owner_of.items() if owner in owners]


def _listed(problems: Sequence[str]) -> str:
    """The first of them, one a line, in some 350 characters."""
    lines, room = [], 350
    for problem in problems[:20]:
        line = shortened(problem, 160)
        room -= len(line) + 3
        if lines and room < 0:
            break
        lines.append(line)
    return "\n  ".join(lines) + ("\n  …" if len(lines) < len(problems) else "")


def _quantized(
    row: Row, layout: Layout, shapes: Mapping[str, Shape], ranks: int
) -> tuple[list[tuple[Row, Layout]], list[str]]:
    """What is stored of a quantized tensor, given the shapes of the files' tensors: the row of its values, packed if
    they are half as long, and that of its scales, of as many groups as these show; and what is wrong with them."""
    values = next((shapes[name] for name in layout.names if name in shapes), ())
    if 2 * math.prod(values) == math.prod(row.file_shape(layout, ranks)):
        row = row.packed()
    of_scales = layout.scale(row.contracted)
    share = ranks if of_scales.split == "G" else 1  # ranks with inputs of their own have groups of their own
    name = next(name for name in of_scales.names if name in shapes)
    groups = max(1, math.prod(shapes[name]) // math.prod(row.scale(share).file_shape(of_scales, ranks)))
    inputs = row.num_inputs // share
    problems = [f"{name} has {groups} groups, which do not divide {inputs} inputs"] if inputs % groups else []
    return [(row, layout), (row.scale(share * groups), of_scales)], problems


def _names_in_table(
    fmt: Format, names: Mapping[str, Shape], *, with_vision: bool
) -> tuple[dict[str, str], list[str], list[str]]:
    """Each name as the table has it → as the file has it; names of the vision model that are passed over; problems."""
    file_names: dict[str, str] = {}
    vision, problems = [], []
    for name in names:
        if not with_vision and VISION[fmt].match(name):
            vision.append(name)
            continue
        if fmt == "meta" and _META_IS_NO_WEIGHT.fullmatch(name):
            continue
        in_table = name.removeprefix(LANGUAGE_MODEL) if fmt == "hf" else name
        if in_table in file_names:
            problems.append(f"the same weights twice, as {file_names[in_table]}, {name}")
        file_names[in_table] = name
    return file_names, vision, problems


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing


def from_hf(config: ModelConfig, source: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Our tensors, one after another, from Hugging Face's under either of its namings.

    Everything is checked before this returns (see `plan`); each tensor is read when its turn comes.
    """
    return _read(plan(config, "hf", source.shapes()), (source,))


def from_meta(config: ModelConfig, *ranks: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Our tensors from Meta's, given the tensors of every model-parallel rank in order. Checked as `from_hf` is."""
    return _read(plan_ranks(config, "meta", ranks), ranks)


def plan_ranks(config: ModelConfig, fmt: Format, ranks: Sequence[Tensors]) -> Plan:
    """`plan` for all model-parallel ranks. Raises ValueError as it does, or if the ranks do not belong together."""
    plans = [plan(config, fmt, rank.shapes(), len(ranks)) for rank in ranks]
    if any(other.matches != plans[0].matches for other in plans):
        raise ValueError("the ranks of this checkpoint name their tensors differently; they do not belong together.")
    return plans[0]


def _read(plan: Plan, ranks: Sequence[Tensors]) -> Iterator[tuple[str, np.ndarray]]:
    for row, layout in plan.matches:
        holders = ranks if layout.split else ranks[:1]  # what is not split is the same on every rank
        tensors = [[rank.read(plan.file_names[name]) for name in layout.names] for rank in holders]
        yield row.ours, row.to_ours(layout, *tensors)


def to_hf(config: ModelConfig, ours: Ours) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors under the names of Llama4ForCausalLM, contiguous, from ours.

    Raises ValueError, before the first, naming every tensor that is missing, unknown or of another shape.
    """
    return _write(_checked_rows(config, ours), "hf", ours, 0, 1)


def to_meta(config: ModelConfig, ours: Ours, *, rank: int = 0, ranks: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors under the keys that Meta publishes, for one of `ranks` model-parallel ranks. Checked as `to_hf` is."""
    return _write(_checked_rows(config, ours), "meta", ours, rank, ranks)


def _write(table: list[Row], fmt: Format, ours: Ours, rank: int, ranks: int) -> Iterator[tuple[str, np.ndarray]]:
    shared: dict[str, np.ndarray] = {}  # a tensor that several of ours make, until the last of them has come
    for row in table:
        layout, array = row.layouts(fmt)[0], np.asarray(ours[row.ours])
        shape = row.file_shape(layout, ranks)
        tensors = [shared.pop(name, None) for name in layout.names]
        tensors = [np.empty(shape, array.dtype) if tensor is None else tensor for tensor in tensors]
        write_boxes(row.boxes(layout, [tensors], first=rank, of=ranks), row.whole, array)
        if layout.rows is not None and layout.rows[0] + math.prod(row.shape[1:]) < layout.rows[1]:
            shared |= zip(layout.names, tensors, strict=True)
        else:
            yield from zip(layout.names, tensors, strict=True)


def _checked_rows(config: ModelConfig, ours: Ours) -> list[Row]:
    table = rows(config)
    shapes = {row.ours: row.shape for row in table}
    problems = [f"missing: {name}" for name in shapes if name not in ours]
    for name, array in ours.items():
        if name not in shapes:
            problems.append(f"has no counterpart in published Llama 4 checkpoints: {name}")
        elif tuple(array.shape) != shapes[name]:
            problems.append(f"wrong shape: {name} is {list(array.shape)}, expected {list(shapes[name])}")
    if problems:
        raise ValueError(f"cannot write these weights, {len(problems)} point(s):\n  {_listed(problems)}")
    return table

"""Every tensor of the model, once: its name and layout here, at Hugging Face, and at Meta.

A row says what our array's axes are, and how each format writes the same axes down, in einops' words:

    ours  layers.0.attention.q.kernel                  D N H
    hf    model.layers.0.self_attn.q_proj.weight       (N H) D
    meta  layers.0.attention.wqkv.weight, its first N H rows   (N H) D

Reading is `rearrange("(N H) D -> D N H")` and writing is the same sentence backwards, so every operation is a
permutation of elements: the round trip is bit-exact, and gradients map as weights do. Where a format keeps apart what
we keep together (gate and up), its tensors are stacked along the leading axis first.

The table is total. A tensor that no row claims, one that is missing, has another shape or is there twice, is an error
that names it, before anything is read.

Sources: `modeling_llama4.py` of transformers 5.23; the load hooks of llama-models 0.3.0 (`model.py`, `ffn.py`,
`moe.py`), whose published key comes first below and the keys of its own modules after it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import jax
import numpy as np
from einops import rearrange

from llama4_jax.model.config import ModelConfig

Format = Literal["hf", "meta"]
Shape = tuple[int, ...]
Ours = Mapping[str, np.ndarray | jax.Array]  # by our names, one entry a layer

# The vision encoder and its projector have no rows yet: named here, so that passing them over is a decision.
VISION = {
    "hf": re.compile(r"(vision_model|multi_modal_projector)\."),
    "meta": re.compile(r"(vision_embeddings|vision_projection)\."),
}
# What Meta's checkpoints hold beside weights: rotary tables, statistics and serialised states of their training.
_META_IS_NO_WEIGHT = re.compile(
    r"rope\.freqs|freq_cis|.*\._extra_state|.*\.(global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)"
)
_LANGUAGE_MODEL = "language_model."  # Llama4ForConditionalGeneration puts it before the names of Llama4ForCausalLM


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

    names: tuple[str, ...]  # of its tensors; several are stacked along the leading axis of `axes`
    axes: str  # of the tensor, or the stack: "(N H) D"
    split: str | None = None  # the axis that Meta's model-parallel ranks divide among them; None: each has all
    rows: tuple[int, int] | None = None  # (first, of): shares the leading axis of one tensor with other rows


@dataclass(frozen=True)
class Row:
    """One tensor of ours. `hf` and `meta` list the layouts it may be found in; the first is the one written."""

    ours: str
    axes: str
    sizes: Mapping[str, int]  # of each axis
    hf: tuple[Layout, ...]
    meta: tuple[Layout, ...]

    @property
    def shape(self) -> Shape:
        return tuple(self.sizes[axis] for axis in self.axes.split())

    def layouts(self, fmt: Format) -> tuple[Layout, ...]:
        return self.hf if fmt == "hf" else self.meta

    def file_shape(self, layout: Layout, ranks: int = 1) -> Shape:
        """Of each of the layout's tensors, as one of `ranks` model-parallel ranks holds it.

        Raises ValueError if the ranks do not divide it.
        """
        sizes = self._rank_sizes(layout, ranks)
        groups = re.findall(r"\(([^)]*)\)|(\w+)", layout.axes)
        shape = [math.prod(sizes[axis] for axis in (group or single).split()) for group, single in groups]
        if len(layout.names) > 1:
            shape = shape[1:]
        if layout.rows is not None:
            shape[0] = layout.rows[1] // (ranks if layout.split else 1)
        return tuple(shape)

    def to_ours(self, layout: Layout, *ranks: Sequence[np.ndarray]) -> np.ndarray:
        """Our array from the layout's tensors: one sequence of them for each rank that has a part of it.

        A view where that is possible.
        """
        sizes = self._rank_sizes(layout, len(ranks))
        parts = []
        for tensors in ranks:
            stack = list(tensors) if len(tensors) > 1 else self._own_rows(layout, tensors[0], len(ranks))
            parts.append(rearrange(stack, f"{layout.axes} -> {self.axes}", **sizes))
        if len(parts) == 1:
            return parts[0]
        assert layout.split is not None, "one rank is enough for what ranks do not divide"
        return np.concatenate(parts, self.axes.split().index(layout.split))

    def from_ours(self, layout: Layout, array: np.ndarray, rank: int = 0, ranks: int = 1) -> list[np.ndarray]:
        """The layout's tensors, as `rank` of `ranks` holds them; of a shared tensor, its own rows only."""
        sizes = self._rank_sizes(layout, ranks)
        if layout.split is not None and ranks > 1:
            array = np.split(array, ranks, self.axes.split().index(layout.split))[rank]
        tensors = rearrange(array, f"{self.axes} -> {layout.axes}", **sizes)
        return list(tensors) if len(layout.names) > 1 else [tensors]

    def _own_rows(self, layout: Layout, tensor: np.ndarray, ranks: int) -> np.ndarray:
        if layout.rows is None:
            return tensor
        first = layout.rows[0] // ranks
        return tensor[first : first + math.prod(self.shape) // ranks // math.prod(tensor.shape[1:])]

    def _rank_sizes(self, layout: Layout, ranks: int) -> dict[str, int]:
        if layout.split is None:
            return dict(self.sizes)
        size = self.sizes[layout.split]
        if size % ranks:
            raise ValueError(f"{layout.names[0]}: {ranks} ranks do not divide its axis {layout.split} of {size}.")
        return {**self.sizes, layout.split: size // ranks}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def rows(config: ModelConfig) -> list[Row]:
    """The table for one model, in the order of its layers."""
    sizes = {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "P": 2,  # the pair: gate, up
    }

    def row(ours: str, axes: str, *, hf: Layout, meta: Sequence[Layout], mlp_dim: int = 0) -> Row:
        every = {**sizes, "F": mlp_dim}
        return Row(ours, axes, {axis: every[axis] for axis in axes.split()}, (hf,), tuple(meta))

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
        table += _moe_rows(row, i, config.expert_mlp_dim) if spec.moe else _dense_rows(row, i, config.mlp_dim)
    table += [
        row("final_norm.scale", "D", hf=_one("model.norm.weight", "D"), meta=[_one("norm.weight", "D")]),
        row(
            "lm_head.kernel",
            "D V",
            hf=_one("lm_head.weight", "V D"),
            meta=[_one("output.weight", "V D", split="V")],
        ),
    ]
    return table


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
            mlp_dim=mlp_dim,
            hf=_one(down, "D F"),
            meta=[
                _one(meta + "feed_forward.mlp.fc2_weight", "D F", split="F"),
                _one(w2, "D F", split="F"),
            ],
        ),
    ]


def _moe_rows(row: Callable[..., Row], i: int, mlp_dim: int) -> list[Row]:
    ours, hf, meta = f"layers.{i}.", f"model.layers.{i}.", f"layers.{i}.feed_forward."
    gate, up, down = (f"{hf}feed_forward.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down"))
    w1, w2, w3 = (f"{meta}shared_expert.w{n}.weight" for n in (1, 2, 3))
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
            hf=_one(hf + "feed_forward.router.weight", "E D"),
            meta=[_one(meta + "router_DE", "D E")],
        ),
        row(
            ours + "moe.gate_up",
            "E D P F",
            mlp_dim=mlp_dim,
            hf=_one(hf + "feed_forward.experts.gate_up_proj", "E D (P F)"),
            meta=[
                Layout((meta + "experts.moe_w_in_eD_F", meta + "experts.moe_w_swiglu_eD_F"), "P (E D) F", split="F"),
                Layout((meta + "experts.w1", meta + "experts.w3"), "P E D F", split="F"),
            ],
        ),
        row(
            ours + "moe.down",
            "E F D",
            mlp_dim=mlp_dim,
            hf=_one(hf + "feed_forward.experts.down_proj", "E F D"),
            meta=[
                _one(meta + "experts.moe_w_out_eF_D", "(E F) D", split="F"),
                _one(meta + "experts.w2", "E F D", split="F"),
            ],
        ),
        row(
            ours + "moe.shared.gate_up.kernel",
            "D P F",
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
            mlp_dim=mlp_dim,
            hf=_one(down, "D F"),
            meta=[_one(meta + "w_out_shared_DF.weight", "D F", split="F"), _one(w2, "D F", split="F")],
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Matching a checkpoint with the table


@dataclass(frozen=True)
class Plan:
    """What is to be read: the layout found for each row, and what is passed over."""

    matches: tuple[tuple[Row, Layout], ...]
    file_names: Mapping[str, str] = field(repr=False)  # of each name in the table
    vision: tuple[str, ...]  # tensors of the vision encoder and its projector, which have no rows yet


def plan(config: ModelConfig, fmt: Format, shapes: Mapping[str, Shape], ranks: int = 1) -> Plan:
    """Finds every row in a checkpoint of these tensors (of one rank of `ranks`), reading nothing.

    Raises ValueError naming every tensor that is unknown, missing, of another shape, or there twice.
    """
    file_names, vision, problems = _names_in_table(fmt, shapes)
    matches: list[tuple[Row, Layout]] = []
    claimed: set[str] = set()
    for row in rows(config):
        found = [layout for layout in row.layouts(fmt) if any(name in file_names for name in layout.names)]
        if len(found) > 1:
            names = [name for layout in found for name in layout.names if name in file_names]
            problems.append(f"the same weights twice, as {', '.join(names)}")
        layout = found[0] if found else row.layouts(fmt)[0]
        for name in layout.names:
            if name not in file_names:
                problems.append(f"missing: {name}")
                continue
            expected, actual = row.file_shape(layout, ranks), tuple(shapes[file_names[name]])
            if actual != expected and name not in claimed:
                problems.append(f"wrong shape: {name} is {list(actual)}, but the config makes it {list(expected)}")
            claimed.add(name)
        claimed.update(name for other in found for name in other.names)
        matches.append((row, layout))
    problems += [f"unknown: {name}" for name in file_names if name not in claimed]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit the model's config in {len(problems)} point(s):\n  "
            + "\n  ".join(problems[:20])
            + ("\n  …" if len(problems) > 20 else "")
            + "\nCheck that the config and the weights belong together."
        )
    return Plan(tuple(matches), file_names, tuple(vision))


def _names_in_table(fmt: Format, names: Mapping[str, Shape]) -> tuple[dict[str, str], list[str], list[str]]:
    """Each name as the table has it → as the file has it; the vision model's names; problems."""
    file_names: dict[str, str] = {}
    vision, problems = [], []
    for name in names:
        if VISION[fmt].match(name):
            vision.append(name)
            continue
        if fmt == "meta" and _META_IS_NO_WEIGHT.fullmatch(name):
            continue
        in_table = name.removeprefix(_LANGUAGE_MODEL) if fmt == "hf" else name
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
    plans = [plan(config, "meta", rank.shapes(), len(ranks)) for rank in ranks]
    if any(other.matches != plans[0].matches for other in plans):
        raise ValueError("the ranks of this checkpoint name their tensors differently; they do not belong together.")
    return _read(plans[0], ranks)


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
    shared: dict[str, list[np.ndarray]] = {}  # rows of a tensor that several of ours make, in order
    for row in table:
        layout = row.layouts(fmt)[0]
        tensors = row.from_ours(layout, np.asarray(ours[row.ours]), rank, ranks)
        if layout.rows is None:
            yield from zip(layout.names, map(np.ascontiguousarray, tensors), strict=True)
            continue
        [name] = layout.names
        blocks = shared.setdefault(name, [])
        blocks += tensors
        if sum(len(block) for block in blocks) == row.file_shape(layout, ranks)[0]:
            yield name, np.concatenate(shared.pop(name))


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
        raise ValueError(f"cannot write these weights, {len(problems)} point(s):\n  " + "\n  ".join(problems[:20]))
    return table

"""`llama4 plan --slots`: what a server of a model costs on a machine that need not be there, by formulas alone.

A server holds the weights, and slots of a cache: global layers keep the whole context of each slot, chunked ones a
chunk. What the memory has left may hold snapshots of prompts: the keys and values of their tokens in the global layers,
and those of the last chunk in the others; cut at a multiple of the chunk, a snapshot needs the global layers' alone.

Decoding is bound by what it reads: the weights that the busy rows' tokens choose, and the keys and values that the rows
hold. So tokens a second depend on how many rows are busy and on what they hold, not on the size of a slot.
"""

import dataclasses
import json
from dataclasses import asdict, dataclass
from typing import Any

import jax

from llama4_jax.infer.rows import rows_of, settings_of, stacked
from llama4_jax.mesh_search import Work, cache_parts, estimate, precision_notes
from llama4_jax.sharding import MeshConfig
from llama4_jax.sharding.chips import GIB, Topology

_OF_SLOTS = ("cache, global layers", "cache, chunked layers", "rows: settings, counts of tokens")
READ = 128  # tokens of a prompt that `infer.engine` reads at once
_MIB = 2.0**20


@dataclass(frozen=True)
class Rate:
    """Decoding with so many busy rows that hold so many tokens each."""

    busy: int
    held: int
    bytes: float  # that a device must read for a token of each
    seconds: float  # of the slowest of computing, memory and network
    binds: str

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of all rows together: an upper bound."""
        return self.busy / self.seconds


@dataclass(frozen=True)
class Snapshot:
    """What a prompt's keys and values take on all devices together, in bytes.

    - at_its_end: with the chunk that the prompt has come to
    - at_a_chunk: where a chunk begins, in global layers alone; None for a prompt within its first chunk
    """

    tokens: int
    at_its_end: float
    at_a_chunk: float | None


@dataclass(frozen=True)
class ServerPlan:
    """What a server costs one device, in bytes, and how fast it can be."""

    topology: str
    devices: int
    mesh: dict[str, int]
    slots: int
    context: int
    cache: str  # dtype
    memory: float  # that the device has
    parts: dict[str, float]  # what the server holds, by category
    slot: float  # one slot, on all devices together
    global_layers: int
    chunked_layers: int
    snapshots: tuple[Snapshot, ...]
    rates: tuple[Rate, ...]
    assumptions: tuple[str, ...]

    @property
    def bytes(self) -> float:
        return float(sum(self.parts.values()))

    @property
    def fits(self) -> bool:
        return self.bytes <= self.memory

    @property
    def slots_that_fit(self) -> int:
        """Slots of this context that fit, if as many rows were busy as slots are planned."""
        fixed = sum(size for name, size in self.parts.items() if name not in _OF_SLOTS)
        each = sum(self.parts[name] for name in _OF_SLOTS) / self.slots
        return max(0, int((self.memory - fixed) / each))

    @property
    def left(self) -> float:
        """For snapshots; 0 where the server does not fit."""
        return max(0.0, self.memory - self.bytes)

    def to_json(self) -> str:
        rates = [asdict(rate) | {"tokens_per_second": rate.tokens_per_second} for rate in self.rates]
        derived = {name: getattr(self, name) for name in ("bytes", "fits", "left", "slots_that_fit")} | {"rates": rates}
        return json.dumps(asdict(self) | derived, indent=1)

    def text(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one device"
        lines = [f"{self.topology}: {self.devices} devices as {axes}, a server of {self.slots} slots of "
                 f"{self.context:,} tokens, cache in {self.cache}", "", "Memory of a device, GiB"]  # fmt: skip
        lines += [f"  {name:<32}{size / GIB:>10,.2f}" for name, size in self.parts.items() if size]
        lines.append(f"  {'in all':<32}{self.bytes / GIB:>10,.2f} of {self.memory / GIB:,.2f}: "
                     f"{'fits' if self.fits else 'DOES NOT FIT'}")  # fmt: skip
        lines.append(f"  {'left for snapshots':<32}{self.left / GIB:>10,.2f}")
        lines.append(f"  {'slots that fit':<32}{self.slots_that_fit:>10,}")
        lines += ["", f"Of all devices together, MiB: a slot has {self.slot / _MIB:,.1f}, and a snapshot of a prompt"]
        lines.append(f"  {'of tokens':>12}{'at its end':>16}{'at a chunk':>16}")
        for one in self.snapshots:
            cut = "–" if one.at_a_chunk is None else f"{one.at_a_chunk / _MIB:,.1f}"
            lines.append(f"  {one.tokens:>12,}{one.at_its_end / _MIB:>16,.1f}{cut:>16}")
        busy = sorted({rate.busy for rate in self.rates})
        lines += ["", "Tokens a second at most, of all busy rows together (roofline; nothing has run)"]
        lines.append("  held by each" + "".join(f"{f'{rows} busy':>12}" for rows in busy))
        found = {(rate.held, rate.busy): rate for rate in self.rates}
        for held in sorted({rate.held for rate in self.rates}):
            cells = (f"{found[held, rows].tokens_per_second:>12,.0f}" for rows in busy)
            lines.append(f"  {held:>12,}" + "".join(cells))
        return "\n".join([*lines, "", "Assumptions", *(f"  - {line}" for line in self.assumptions)])


def plan_server(work: Work, mesh: MeshConfig, where: Topology, held: tuple[int, ...] = ()) -> ServerPlan:
    """What a server costs.

    - work: a step of decoding, whose rows are the slots
    - mesh: of as many devices as there are
    - held: tokens that each busy row holds, its newest included; none: 1024, four times that, and so on
    """
    whole = estimate(work, mesh, where)
    parts = {name: size for name, size in whole.arguments.items() if name != "cache"}
    of_global, of_chunked = cache_parts(work, mesh)
    layers = [spec.chunk for spec in work.config.model.layers]
    parts |= dict(zip(_OF_SLOTS, (of_global, of_chunked, _rows_bytes(work)), strict=True))
    parts["temporaries"] = max(whole.temporaries, _reading(work, mesh))
    lengths = tuple(sorted(set(held))) or _lengths(work.context)
    rates = []
    for length in lengths:
        for busy in _powers(work.rows):
            step = estimate(dataclasses.replace(work, rows=busy, context=length), mesh, where)
            rates.append(Rate(busy, length, step.traffic, step.seconds, step.binds))
    return ServerPlan(
        topology=where.name, devices=where.num_devices, mesh=asdict(mesh), slots=work.rows, context=work.context,
        cache=work.cache or work.config.precision.compute, memory=float(where.chip.memory), parts=parts,
        slot=sum(_slot(work, work.context)), global_layers=sum(chunk is None for chunk in layers),
        chunked_layers=sum(chunk is not None for chunk in layers),
        snapshots=tuple(_snapshot(work, length) for length in lengths), rates=tuple(rates),
        assumptions=(*_ASSUMPTIONS, *precision_notes(work, where.chip)),
    )  # fmt: skip


_ASSUMPTIONS = (
    "NOT COMPILED: all figures are closed formulas, without what a compiler adds or saves; what a runtime keeps for "
    "itself is not taken off the memory",
    "a chunked layer's whole chunk is read, as far as a row holds it, wherever in the chunk the row is",
    "experts: as many as the busy rows choose on average, if all are equally likely",
    "the engine reads by blocks up to the longest row, so that rows of very unequal length cost more than this",
)


def _slot(work: Work, tokens: int) -> tuple[float, float]:
    """Bytes of one row of so many tokens, on all devices together: of global layers, and of chunked ones."""
    return cache_parts(dataclasses.replace(work, rows=1, context=tokens), MeshConfig(data=1))


def _snapshot(work: Work, tokens: int) -> Snapshot:
    chunks = [spec.chunk for spec in work.config.model.layers if spec.chunk is not None]
    cut = tokens // max(chunks) * max(chunks) if chunks else tokens
    return Snapshot(tokens, sum(_slot(work, tokens)), _slot(work, cut)[0] if cut else None)


def _rows_bytes(work: Work) -> float:
    vocab_size = work.config.model.vocab_size
    settings = stacked([settings_of(vocab_size)] * work.rows)
    rows: Any = jax.eval_shape(lambda: rows_of(settings, vocab_size))
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rows)))


def _reading(work: Work, mesh: MeshConfig) -> float:
    """Temporaries of reading a piece of a prompt whose tokens are all scored."""
    model, tokens = work.config.model, min(READ, work.context)
    width = 2 * model.expert_mlp_dim + 4 * model.embed_dim
    return tokens * (width * 2 + model.vocab_size / mesh.tensor * 4)


def _lengths(context: int) -> tuple[int, ...]:
    below = [1024 * 4**i for i in range(16) if 1024 * 4**i < context]
    return (*below, context)


def _powers(slots: int) -> list[int]:
    return [*(2**i for i in range(slots.bit_length()) if 2**i < slots), slots]

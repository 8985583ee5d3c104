"""What a step costs on a machine that is not there: it is compiled for the named topology, and the result is read.

Three times come of the counts of `hlo`, each as if the other two took none:

- compute: operations / the chip's peak. Nothing reaches it; large matrix products on a TPU come near 90 %
- memory: bytes read and written / the bandwidth of the chip's memory
- network: for each collective, the bytes that leave a device / the bandwidth of the links it may use, one collective
  after another. A group that lies as a box in a torus sends along all its dimensions at once: over two links of each
  that closes to a ring and one of each that does not; where the members of a group are s apart, s groups share a link.
  A gather or a reduce-scatter of n devices sends (n - 1) / n of the whole array, an all-reduce twice that. Of an
  all-to-all on a ring of n a quarter of n times what a device keeps crosses each pair of links, in a line twice that

The step's time is then between the largest of the three (all overlap perfectly) and their sum (nothing does). The first
is what `Plan.utilization` is of. Both are estimates: nothing has run.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from llama4_jax.sharding import hlo
from llama4_jax.sharding.chips import EXAMPLES, GIB, Chip, Topology

# So that libtpu neither looks for a TPU nor minds another process that has loaded it.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip


def topology_devices(topology: Topology) -> list[Any]:
    """Its devices, for a mesh to compile on.

    Raises ValueError if there is no compiler for them here, or the network cannot have these sizes.
    """
    from jax.experimental import topologies

    if not topology.chip.torus:
        raise ValueError(f"{topology.name}: there is no compiler for GPUs without a GPU. Only an estimate can be made.")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ValueError("planning for a TPU needs its compiler, which is not installed: pip install libtpu") from error
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # A chip of a v4 has two cores, which JAX would show as two devices; all later ones show one of their own accord.
    more = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    with _silent():
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more).devices
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"there is no topology {topology.name!r}: {str(error).splitlines()[0]}. One that there is: "
                f"{EXAMPLES[topology.chip.name]}."
            ) from error
    return list(found)


@contextlib.contextmanager
def _silent():
    """Without what libtpu's C++ writes to stderr when it is loaded."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind between the same devices, of one device in one step."""

    kind: str
    axes: tuple[str, ...]  # of the mesh
    devices: int  # of a group
    times: float
    bytes: float  # of the whole arrays
    seconds: float  # estimated
    where: str  # the largest of them, in JAX's words
    by_hand: float | None = None  # bytes that the caller predicts; None: it predicts nothing of the step


@dataclass(frozen=True)
class Plan:
    """What a step costs one device. Bytes, seconds and operations."""

    topology: str
    devices: int
    mesh: dict[str, int]
    memory: float  # that the device has
    arguments: dict[str, float]  # by category
    results: float  # new arrays that the step returns; what it updates in place is among the arguments
    temporaries: float  # activations, gradients and all else that lives during the step only
    fits: bool
    flops: float  # executed
    model_flops: float  # that the model needs, however it is computed
    traffic: float  # to and from the device's memory
    model_traffic: float  # of it what the model needs, however it is computed; 0 where nobody counts it
    sent: tuple[Sent, ...]
    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    peak: float  # operations a second, bfloat16
    assumptions: tuple[str, ...]
    tokens: float = 0.0  # that all devices together train on, read or write in a step; 0 where nobody counts them

    @property
    def bytes(self) -> float:
        return float(sum(self.arguments.values()) + self.results + self.temporaries)

    @property
    def seconds(self) -> float:
        """Estimated time of a step if computing, memory and network overlap perfectly."""
        return max(self.compute_seconds, self.memory_seconds, self.network_seconds)

    @property
    def seconds_without_overlap(self) -> float:
        return self.compute_seconds + self.memory_seconds + self.network_seconds

    @property
    def binds(self) -> str:
        times = {"compute": self.compute_seconds, "memory": self.memory_seconds, "network": self.network_seconds}
        return max(times, key=times.__getitem__)

    @property
    def utilization(self) -> float:
        """Model FLOPs utilisation at `seconds`: an estimate, and an upper bound."""
        return self.model_flops / (self.seconds * self.peak) if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of all devices at `seconds`: an estimate, and an upper bound."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second_without_overlap(self) -> float:
        return self.tokens / self.seconds_without_overlap if self.seconds else 0.0

    def _beyond_the_needed(self) -> str:
        if not self.model_traffic:
            return ""
        return f", {self.traffic / self.model_traffic:.3f} x the {self.model_traffic / 1e9:,.2f} that must be read"

    def to_json(self) -> str:
        derived = {name: getattr(self, name) for name in ("bytes", "seconds", "seconds_without_overlap", "binds",
                                                          "utilization", "tokens_per_second",
                                                          "tokens_per_second_without_overlap")}  # fmt: skip
        return json.dumps(asdict(self) | derived, indent=1)

    def text(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one device"
        lines = [f"{self.topology}: {self.devices} devices as {axes}", "", "Memory of a device, GiB"]
        rows = [*self.arguments.items(), ("results", self.results), ("temporaries", self.temporaries)]
        lines += [f"  {name:<28}{size / GIB:>10,.2f}" for name, size in rows if size]
        lines.append(f"  {'in all':<28}{self.bytes / GIB:>10,.2f} of {self.memory / GIB:,.2f}: "
                     f"{'fits' if self.fits else 'DOES NOT FIT'}")  # fmt: skip
        lines += ["", "Work of a device in a step"]
        if self.flops:
            ratio = f", {self.flops / self.model_flops:.3f} x the model's {self.model_flops / 1e12:,.2f}"
            lines.append(f"  executed       {self.flops / 1e12:>12,.2f} TFLOP{ratio if self.model_flops else ''}")
        lines.append(f"  to memory      {self.traffic / 1e9:>12,.2f} GB{self._beyond_the_needed()}")
        if self.sent:
            counted = any(s.by_hand is not None for s in self.sent)
            lines += ["", f"  {'collective':<20}{'over':<22}{'devices':>8}{'times':>8}{'GB':>12}{'est. ms':>10}"
                          f"{'GB by hand' if counted else '':>14}"]  # fmt: skip
            for s in self.sent:
                where = "+".join(s.axes) or "-"
                by_hand = f"{s.by_hand / 1e9:>14,.3f}" if s.by_hand is not None else ""
                lines.append(f"  {s.kind:<20}{where:<22}{s.devices:>8}{s.times:>8.0f}{s.bytes / 1e9:>12,.3f}"
                             f"{s.seconds * 1e3:>10,.2f}{by_hand}")  # fmt: skip
        else:
            lines.append("  no collectives")
        lines += ["", "Estimated time of a step, ms (roofline; nothing has run)"]
        for name in ("compute", "memory", "network"):
            binds = "   <- binds" if name == self.binds else ""
            lines.append(f"  {name:<28}{getattr(self, f'{name}_seconds') * 1e3:>12,.2f}{binds}")
        lines.append(f"  {'all overlapping':<28}{self.seconds * 1e3:>12,.2f}" + (
            f"   estimated MFU {self.utilization:.1%}" if self.model_flops else ""))  # fmt: skip
        lines.append(f"  {'nothing overlapping':<28}{self.seconds_without_overlap * 1e3:>12,.2f}")
        if self.tokens:
            rates = self.tokens_per_second, self.tokens_per_second_without_overlap
            lines += ["", f"Estimated tokens a second{'all overlapping':>22}{'nothing':>14}"]
            for who, among in (("of all devices", 1), ("of one", self.devices)):
                fast, slow = (rate / among for rate in rates)
                lines.append(f"  {who:<28}{_rate(fast):>17}{_rate(slow):>14}")
        return "\n".join([*lines, "", "Assumptions", *(f"  - {line}" for line in self.assumptions)])


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:,.1f}"


def make_plan(
    lowered: jax.stages.Lowered,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    arguments: Mapping[str, Any],
    *,
    model_flops: float,
    model_traffic: float = 0.0,
    kernel_flops: hlo.KernelFlops = hlo.its_word,
    turns: hlo.Turns = hlo.unknown,
    takes_cheapest: hlo.TakesCheapest = hlo.never,
    steps: int = 1,
    tokens: float = 0.0,
    by_hand: Mapping[tuple[str, tuple[str, ...]], float] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Compiles the step, and counts.

    - arguments: trees of the step's `jax.ShapeDtypeStruct`s with shardings, by category
    - model_flops, model_traffic: what one device must compute in one step, and read
    - kernel_flops: has the last word on the operations of custom kernels
    - turns: how often loops run whose length depends on the data, on average
    - takes_cheapest: of which conditionals the branch that costs least is taken; of others the dearest counts
    - steps: how many of them one run of the program takes; what it does once for all of them is shared out
    - tokens: of all devices together in a step
    - by_hand: bytes that the step should send, by kind and mesh axes, to stand beside what was compiled
    - notes: assumptions of the caller, to stand with the plan's own

    A step that needs more memory than the device has gives a plan that does not fit.
    """
    text, used, results, accepted = _compiled(lowered)
    sizes = {name: device_bytes(tree) for name, tree in arguments.items()}
    temporaries = max(0.0, used - sum(sizes.values()) - results)
    common = {
        "topology": topology.name, "devices": mesh.devices.size, "mesh": dict(mesh.shape),
        "memory": float(topology.chip.memory), "arguments": sizes, "results": results, "temporaries": temporaries,
        "fits": accepted and used <= topology.chip.memory, "model_flops": model_flops, "peak": topology.chip.bf16,
    }  # fmt: skip
    chip = topology.chip
    costs = hlo.Costs()
    costs.add(hlo.costs(text, kernel_flops, turns, takes_cheapest), 1 / steps)
    network = Network(topology, mesh)
    sent = network.summary(costs.collectives)
    if by_hand is not None:
        sent = _beside(sent, by_hand, mesh)
    assumptions = [f"{line} ({count}x)" if count > 1 else line for line, count in costs.assumptions.items()]
    return Plan(
        **common,
        flops=costs.total_flops,
        traffic=costs.traffic,
        model_traffic=model_traffic,
        sent=sent,
        compute_seconds=float(sum(flops / chip.peak(dtype) for dtype, flops in costs.flops.items())),
        memory_seconds=costs.traffic / chip.bandwidth,
        network_seconds=float(sum(s.seconds for s in sent)),
        assumptions=(*notes, *_ASSUMPTIONS, *assumptions),
        tokens=tokens,
    )


def _beside(
    sent: Sequence[Sent], by_hand: Mapping[tuple[str, tuple[str, ...]], float], mesh: jax.sharding.Mesh
) -> tuple[Sent, ...]:
    """With the bytes predicted of each; what is predicted but not sent comes last."""
    found = {(s.kind, s.axes) for s in sent}
    missing = (
        Sent(kind, axes, math.prod(mesh.shape[axis] for axis in axes), 0.0, 0.0, 0.0, "nowhere", size)
        for (kind, axes), size in by_hand.items()
        if (kind, axes) not in found
    )
    return (*(dataclasses.replace(s, by_hand=by_hand.get((s.kind, s.axes), 0.0)) for s in sent), *missing)


_ASSUMPTIONS = (
    "compute at the peak, memory and links at their published bandwidth; a step is measured, not estimated, on the pod",
    "collectives one after another, each over all links that its devices have along their axes",
)


def device_bytes(tree: Any) -> float:
    """Bytes on one device of arrays with shardings."""
    sizes = (
        math.prod(x.sharding.shard_shape(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) for x in jax.tree.leaves(tree)
    )
    return sum(sizes) / 8


_TOO_LARGE = re.compile(r"\([\d.]+[KMGT]\) exceeds")
_USED = re.compile(r"Memory Space: default .*\nTotal bytes: (\d+)")


def _compiled(lowered: jax.stages.Lowered) -> tuple[str, float, float, bool]:
    """The optimised text, bytes of main memory that the program needs in all, those of its results that are no updated
    arguments, and whether the compiler takes it for one that its device can hold.

    Raises ValueError for what the compiler refuses for another reason.
    """
    # The compiler writes text and memory itself: what this jaxlib reads back of a newer libtpu's program it may not
    # know, and `memory_analysis` counts temporaries that share their places twice.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with _silent():
                memory = lowered.compile(compiler_options=options).memory_analysis()
            results, accepted = float(memory.output_size_in_bytes - memory.alias_size_in_bytes), True
        except jax.errors.JaxRuntimeError as error:
            if not _TOO_LARGE.search(str(error)):
                said = " ".join(str(error).splitlines()[:2])  # the first may be a mere title
                raise ValueError(f"the compiler refuses the step: {said[:500]}") from error
            results, accepted = 0.0, False
        used = max(float(_USED.search(text)[1]) for text in _written(folder, "memory-usage-report"))
        return max(_written(folder, "after_optimizations"), key=len), used, results, accepted


def _written(folder: str, what: str) -> list[str]:
    """What the compiler wrote at one of its stages: for the step, and maybe for small programs beside it."""
    names = glob.glob(f"{folder}/*{what}.txt")
    if not names:
        raise RuntimeError(f"the compiler wrote no {what} into {folder}.")
    texts = []
    for name in names:
        with open(name) as file:
            texts.append(file.read())
    return texts


class Network:
    """How long collectives take between the devices of a mesh on a topology."""

    def __init__(self, topology: Topology, mesh: jax.sharding.Mesh):
        self.chip: Chip = topology.chip
        self.sizes = topology.sizes
        self.mesh = dict(mesh.shape)
        devices = mesh.devices.flat
        self.coords = np.array([d.coords[: self.chip.torus] for d in devices]) if self.chip.torus else None

    def summary(self, collectives: Sequence[hlo.Collective]) -> tuple[Sent, ...]:
        found: dict[tuple, list[hlo.Collective]] = {}
        for c in collectives:
            found.setdefault((c.kind, hlo.axes_of(c.groups, self.mesh), c.groups.shape[1]), []).append(c)
        sent = [
            Sent(
                kind, axes, devices,
                times=float(sum(c.times for c in same)),
                bytes=float(sum(c.bytes * c.times for c in same)),
                seconds=float(sum(self.seconds(c) * c.times for c in same)),
                where=max(same, key=lambda c: c.bytes * c.times).op_name,
            )
            for (kind, axes, devices), same in found.items()
        ]  # fmt: skip
        return tuple(sorted(sent, key=lambda s: -s.seconds))

    def seconds(self, collective: hlo.Collective) -> float:
        """Of one run of it."""
        kind, size, groups = collective.kind, collective.bytes, collective.groups
        devices = groups.shape[1]
        if devices == 1 or not size:
            return 0.0
        if kind == "collective-permute":
            return size * self.hops(groups) / self.chip.link * self.chip.per_chip
        if kind in ("all-to-all", "ragged-all-to-all"):
            return size * self.exchange(groups[0])
        share = (devices - 1) / devices * (2 if kind == "all-reduce" else 1)
        return size * share / self.bandwidth(groups[0])

    def box(self, group: np.ndarray) -> list[tuple[int, int, bool]]:
        """Of each dimension of the torus that a group lies along: how many, how far apart, whether it closes a ring."""
        found = []
        for dimension, extent in enumerate(self.sizes):
            places = np.unique(self.coords[group, dimension])
            if len(places) > 1:
                apart = int(np.diff(places).min())
                ring = len(places) * apart == extent and extent % self.chip.wraps_at == 0 and extent > 2
                found.append((len(places), apart, ring))
        return found

    def bandwidth(self, group: np.ndarray) -> float:
        """Bytes a second that a device of this group can send in a collective of all of them."""
        if self.coords is None:
            one_host = len(np.unique(group // self.chip.per_host)) == 1
            return self.chip.link if one_host else self.chip.host_link
        links = sum((2 if ring else 1) / apart for _, apart, ring in self.box(group))
        # Devices of one chip share its links, and have faster ones between them.
        return max(links, 1) * self.chip.link / self.chip.per_chip

    def exchange(self, group: np.ndarray) -> float:
        """Seconds a byte that each device keeps for all others together, in an all-to-all."""
        if self.coords is None:
            return (len(group) - 1) / len(group) / self.bandwidth(group)
        slowest = max((count * apart / (8 if ring else 4) for count, apart, ring in self.box(group)), default=0.5)
        return slowest / self.chip.link * self.chip.per_chip

    def hops(self, pairs: np.ndarray) -> int:
        """The longest way of a permute, in links."""
        if self.coords is None:
            return 1
        source, target = self.coords[pairs[:, 0]], self.coords[pairs[:, 1]]
        far = np.abs(source - target)
        sizes = np.array(self.sizes)
        closes = (sizes % self.chip.wraps_at == 0) & (sizes > 2)
        return max(1, int(np.where(closes, np.minimum(far, sizes - far), far).sum(axis=1).max()))

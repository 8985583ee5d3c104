"""What a compiled program does, read from its text: operations, bytes moved, and what devices send each other.

XLA's own cost analysis counts the body of a loop once, knows nothing of a network, and does not say where a figure
comes from. This reads the optimised HLO as XLA prints it for CPUs, GPUs and TPUs, and walks it from the entry, with
loops times their trip counts. All figures are of one device.

What is counted, and how:

- operations: two for each multiply-add of a `dot` or a `convolution` (TPUs have only the latter; positions in padding
  or between dilated elements are no work), and what a custom kernel estimates of itself. Elementwise work is left out
- traffic: what each instruction reads and writes in the device's main memory. A fusion is one instruction; of what it
  only slices the slice counts, and of what it updates in place the update. What XLA keeps in a TPU's vector memory is
  free
- collectives: bytes of the whole array that is gathered, reduced or exchanged, and between which devices

A loop whose trip count the text does not tell counts once, and of a conditional the dearest branch: each is said
in `assumptions`. The grammar of the text: `HloInstruction::ToString` of openxla/xla; of replica groups,
`ReplicaGroupList`, `IotaReplicaGroupList` and `MeshAxesReplicaGroupList` there.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # and of the others the number in the name

# Their operands and results are names of memory, not reads or writes of it. `-start` has been counted before `-done`.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "add-dependency", "async-update", "async-done", "copy-done", "domain",
    *(f"{kind}-done" for kind in COLLECTIVES),
}  # fmt: skip
_FREE_TARGETS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "SPMDFullToShardShape",
                 "SPMDShardToFullShape"}  # fmt: skip


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    space: int  # of memory: 0 is the main one

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * _bits(self.dtype) / 8

    @property
    def traffic(self) -> float:
        return self.bytes if self.space == 0 else 0.0


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result; of a tuple its leaves
    operands: tuple[str, ...]
    inside: str  # the parentheses after the opcode: the number of a parameter, the value of a constant
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations in these attributes."""
        names = []
        for attribute in attributes:
            for single, several in re.findall(attribute + r"=(?:%([\w.\-]+)|\{([^}]*)\})", self.attributes):
                names += [single] if single else [name.strip().lstrip("%") for name in several.split(",")]
        return names

    def numbers(self, attribute: str) -> tuple[int, ...]:
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]  # in order

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    @property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.inside): i for i in self.instructions.values() if i.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: Computation
    num_devices: int


@dataclass(frozen=True)
class Collective:
    kind: str  # one of COLLECTIVES
    bytes: float  # of the whole array, once: as large as the gathered one, or the one before it is reduced
    groups: np.ndarray  # [groups, devices of one]; of a permute [pairs, (source, target)]
    times: float  # how often it runs
    op_name: str  # where it comes from, in JAX's words


@dataclass
class Costs:
    """Of one device, in one run of the program."""

    flops: Counter = field(
        default_factory=Counter
    )  # dtype of the operands (of a custom kernel "kernel", unless two are of fp8): operations
    traffic: float = 0.0  # bytes read and written in main memory
    collectives: list[Collective] = field(default_factory=list)
    assumptions: Counter = field(default_factory=Counter)  # in words: how often

    @property
    def total_flops(self) -> float:
        return float(sum(self.flops.values()))

    def add(self, other: "Costs", times: float) -> None:
        for dtype, flops in other.flops.items():
            self.flops[dtype] += flops * times
        self.traffic += other.traffic * times
        self.collectives += [_repeated(collective, times) for collective in other.collectives]
        self.assumptions += other.assumptions


# name of a custom kernel, operands, results, and the operations that it says it has: those that it has, if known
KernelFlops = Callable[[str, list[Array], list[Array], float | None], float | None]


def its_word(name: str, operands: list[Array], results: list[Array], said: float | None) -> float | None:
    """Takes a kernel at its word."""
    return said


# where a loop of unknown length comes from, in JAX's words: how often it runs on average, if that is known
Turns = Callable[[str], float | None]


def unknown(op_name: str) -> float | None:
    """Nothing is known of such loops."""
    return None


# where a conditional comes from, in JAX's words: whether on average it takes the branch that costs least
TakesCheapest = Callable[[str], bool]


def never(op_name: str) -> bool:
    """Any branch may be taken."""
    return False


def costs(
    text: str, kernel_flops: KernelFlops = its_word, turns: Turns = unknown, takes_cheapest: TakesCheapest = never
) -> Costs:
    """What the program of this text costs. `kernel_flops` has the last word on custom kernels, `turns` is asked about
    loops whose length depends on the data, and `takes_cheapest` about conditionals.

    Raises ValueError if the text is not that of a compiled HLO module.
    """
    module = parse(text)
    return _Walk(module, kernel_flops, turns, takes_cheapest).computation(module.entry, {})


# -- reading ---------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+[a-z0-9]*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")


def parse(text: str) -> Module:
    """Raises ValueError if the text has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = Computation(header[2], {})
                entry = current if header[1] else entry
        elif current is not None and (start := _LINE.match(line)):
            instruction = _instruction(start[2], line[start.end() :], is_root=start[1] is not None)
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation.")
    header = text[: text.index("\n")]
    counts = [int(n) for n in re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", header)]
    return Module(computations, entry, math.prod(counts))


def _instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    arrays = tuple(_arrays(rest[:end]))
    opcode = _OPCODE.match(rest, end)
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close - 1]
    return Instruction(name, opcode[1], arrays, tuple(_NAME.findall(inside)), inside, rest[close:], is_root)


def _closing(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i + 1
    raise ValueError(f"this is not the text of a compiled program: a parenthesis is open in {text[:100]!r}.")


def _arrays(text: str) -> Iterable[Array]:
    for dtype, shape, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        dims = tuple(int(n.replace("<=", "")) for n in shape.split(",") if n.strip())
        yield Array(dtype, dims, int(space[1]) if space else 0)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.search(r"\d+", dtype)  # f32, s8, bf16, f8e4m3fn, c64
    return int(number[0]) if number else 0


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The devices that take part together, one group a row, from an instruction's attributes. Devices are numbered as
    in the mesh, the last axis fastest."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return np.array([int(n) for n in re.findall(r"\d+", found[1])], int).reshape(-1, 2)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids = np.arange(num_devices).reshape([int(n) for n in found[3].split(",")])
        if found[4]:
            ids = ids.transpose([int(n) for n in found[4].split(",")])
        return ids.reshape(int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", attributes):
        return _mesh_groups(found[1], found[3], found[2])
    if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"replica groups in a notation that this does not know: {attributes[:200]!r}.")
    return np.arange(num_devices)[None]


def _mesh_groups(mesh: str, axes: str, device_ids: str | None) -> np.ndarray:
    """Groups over axes of a mesh, mesh['a'=4,'b'=8] {'a','b':(2)4}: of b a part, 4 long, with 2 of them before it. The
    mesh's devices are numbered in order, or as `device_ids` say: [8,4]T(1,0) is 0 … 31 in that shape, transposed."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    wanted = {name: (int(before or 1), int(size or sizes[name]))
              for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)}  # fmt: skip
    shape, inside = [], []
    for name, size in sizes.items():
        before, middle = wanted.get(name, (size, 1))
        inside += [len(shape) + 1] if name in wanted else []
        shape += [before, middle, size // (before * middle)]
    ids = np.arange(math.prod(sizes.values()))
    if device_ids:
        found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
        if found is None:
            raise ValueError(f"devices of a mesh in a notation that this does not know: {device_ids!r}.")
        ids = ids.reshape([int(n) for n in found[1].split(",")])
        ids = ids.transpose([int(n) for n in found[2].split(",")]) if found[2] else ids
    ids = ids.reshape(shape)
    ids = np.moveaxis(ids, inside, range(ids.ndim - len(inside), ids.ndim))
    return ids.reshape(-1, math.prod(size for _, size in wanted.values()))


def axes_of(groups: np.ndarray, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, yes in zip(mesh_shape, differs, strict=True) if yes)


def _repeated(collective: Collective, times: float) -> Collective:
    c = collective
    return Collective(c.kind, c.bytes, c.groups, c.times * times, c.op_name)


# -- counting --------------------------------------------------------------------------------------------------------

Known = dict[int, int]  # elements of a computation's tuple parameter that are known constants


class _Walk:
    def __init__(self, module: Module, kernel_flops: KernelFlops, turns: Turns, takes_cheapest: TakesCheapest):
        self.module, self.kernel_flops, self.turns, self.takes_cheapest = module, kernel_flops, turns, takes_cheapest
        self.inner: dict[str, Costs] = {}  # of computations within fusions, which know no constants

    def computation(self, computation: Computation, known: Known) -> Costs:
        total = Costs()
        for instruction in computation.instructions.values():
            self.instruction(total, computation, instruction, known)
        return total

    def instruction(self, total: Costs, computation: Computation, i: Instruction, known: Known) -> None:
        if i.opcode in _FREE:
            return
        if i.opcode == "while":
            return self.loop(total, computation, i, known)
        if i.opcode == "conditional":
            return self.conditional(total, i)
        if i.opcode in ("call", "async-start"):
            for name in i.called("to_apply", "calls"):
                total.add(self.computation(self.module.computations[name], {}), 1.0)
            return None
        if i.opcode == "custom-call" and (target := _target(i)) in _FREE_TARGETS:
            return None
        total.traffic += self.traffic(computation, i)
        if i.opcode == "fusion":
            for name in i.called("calls"):
                total.add(self.fused(name), 1.0)
        elif i.opcode == "dot":
            operands = computation.operands(i)
            total.flops[operands[0].arrays[0].dtype] += dot_flops(i, operands[0].arrays[0])
        elif i.opcode == "convolution":
            operands = computation.operands(i)
            total.flops[operands[0].arrays[0].dtype] += convolution_flops(i, *(o.arrays[0] for o in operands))
        elif i.opcode == "custom-call":
            self.kernel(total, computation, i, target)
        elif i.opcode.removesuffix("-start") in COLLECTIVES:
            total.collectives.append(self.collective(computation, i, i.opcode.removesuffix("-start")))
        return None

    def fused(self, name: str) -> Costs:
        """What is computed and sent within a fusion; the memory is the fusion's own affair."""
        if name not in self.inner:
            computation = self.module.computations[name]
            costs = self.computation(computation, {})
            costs.traffic = 0.0
            if _keeps_a_part(computation):  # how a TPU writes a reduce-scatter
                costs.collectives = [
                    dataclasses.replace(c, kind="reduce-scatter") if c.kind == "all-reduce" else c
                    for c in costs.collectives
                ]
            self.inner[name] = costs
        return self.inner[name]

    def loop(self, total: Costs, computation: Computation, i: Instruction, known: Known) -> None:
        (condition,), (body,) = i.called("condition"), i.called("body")
        condition, body = self.module.computations[condition], self.module.computations[body]
        first = {n: value for n, operand in enumerate(self.elements(computation, i))
                 if (value := self.constant(computation, operand, known)) is not None}  # fmt: skip
        constant = {n: value for n, value in first.items() if self.is_unchanged(body, n)}
        trips = self.trip_count(i, condition, body, first, constant)
        if trips is None and (trips := self.turns(i.op_name)) is None:
            total.assumptions[f"a loop of unknown length counts once: {i.op_name or i.name}"] += 1
            trips = 1
        total.add(self.computation(body, constant), float(trips))

    def elements(self, computation: Computation, i: Instruction) -> list[Instruction]:
        """What the elements of a loop's first tuple are, or nothing if they are not made on the spot."""
        (operand,) = computation.operands(i)
        return computation.operands(operand) if operand.opcode == "tuple" else []

    def trip_count(
        self, i: Instruction, condition: Computation, body: Computation, first: Known, constant: Known
    ) -> int | None:
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.attributes):
            return int(found[1])
        # A TPU's compiler does not say it. Its loops count from `first` in steps up to a limit, which is a constant.
        compared = self.compared(condition)
        if compared is None:
            return None
        counter, limit, direction = compared
        index = _element(condition, counter)
        end = self.constant(condition, limit, constant)
        step = self.step(body, index, constant)
        if index not in first or end is None or not step:
            return None
        end += {"LT": 0, "LE": 1, "NE": 0, "GT": 0, "GE": -1}.get(direction, 0)
        return max(0, math.ceil((end - first[index]) / step))

    def compared(self, condition: Computation) -> tuple[Instruction, Instruction, str] | None:
        """The two sides of the comparison that a condition is, both as instructions of the condition itself."""
        root = _behind(condition, condition.root)
        sides = condition.operands(root)
        if root.opcode == "fusion":
            inner = self.module.computations[root.called("calls")[0]]
            root = _behind(inner, inner.root)
            if root.opcode != "compare":
                return None
            inside = [_behind(inner, operand) for operand in inner.operands(root)]
            if any(i.opcode not in ("parameter", "constant") for i in inside):
                return None
            sides = [sides[int(i.inside)] if i.opcode == "parameter" else i for i in inside]
        if root.opcode != "compare" or len(sides) != 2:
            return None
        found = re.search(r"direction=(\w+)", root.attributes)
        return _behind(condition, sides[0]), sides[1], found[1]

    def step(self, body: Computation, index: int | None, constant: Known) -> int | None:
        """What the body adds to an element of its tuple each time."""
        if index is None or body.root.opcode != "tuple":
            return None
        new = _behind(body, body.operands(body.root)[index])
        operands = body.operands(new)
        if new.opcode == "fusion":
            inner = self.module.computations[new.called("calls")[0]]
            root = _behind(inner, inner.root)
            if root.opcode != "add":
                return None
            inside = [_behind(inner, operand) for operand in inner.operands(root)]
            if any(i.opcode not in ("parameter", "constant") for i in inside):
                return None
            operands = [operands[int(i.inside)] if i.opcode == "parameter" else i for i in inside]
        elif new.opcode != "add":
            return None
        here = [_element(body, _behind(body, operand)) == index for operand in operands]
        if sum(here) != 1:
            return None
        return self.constant(body, operands[1 - here.index(True)], constant)

    def constant(self, computation: Computation, i: Instruction, known: Known) -> int | None:
        i = _behind(computation, i)
        if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.inside):
            return int(i.inside)
        element = _element(computation, i)
        return None if element is None else known.get(element)

    def is_unchanged(self, body: Computation, index: int) -> bool:
        root = body.root
        return root.opcode == "tuple" and _element(body, _behind(body, body.operands(root)[index])) == index

    def conditional(self, total: Costs, i: Instruction) -> None:
        names = i.called("branch_computations") or i.called("true_computation", "false_computation")
        branches = [self.computation(self.module.computations[name], {}) for name in names]
        taken = max(branches, key=lambda costs: (costs.total_flops, costs.traffic))
        if self.takes_cheapest(i.op_name):
            taken = min(branches, key=lambda costs: (costs.total_flops, costs.traffic))
        elif any(b.total_flops != taken.total_flops or len(b.collectives) != len(taken.collectives) for b in branches):
            total.assumptions[f"the dearest branch of a conditional is taken: {i.op_name or i.name}"] += 1
        total.add(taken, 1.0)

    def kernel(self, total: Costs, computation: Computation, i: Instruction, target: str) -> None:
        if target not in ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2", "__gpu$xla.gpu.triton"):
            if "gemm" in target or "matmul" in target:
                total.flops[computation.operands(i)[0].arrays[0].dtype] += _library_matmul_flops(computation, i)
            return
        name = _kernel_name(i)
        operands = [o.arrays[0] for o in computation.operands(i)]
        flops = self.kernel_flops(name, operands, list(i.arrays), _said(i, "flops"))
        if flops is None:
            total.assumptions[f"a kernel that does not say its operations counts none: {name}"] += 1
        else:
            of_8_bits = [array.dtype for array in operands if array.dtype.startswith("f8")]
            total.flops[of_8_bits[0] if len(of_8_bits) == 2 else "kernel"] += flops

    def collective(self, computation: Computation, i: Instruction, kind: str) -> Collective:
        groups = replica_groups(i.attributes, self.module.num_devices)
        operands = computation.operands(i)
        if kind == "ragged-all-to-all":  # rows, their places, and four vectors of lengths and offsets
            operands = operands[:1]
        if kind == "collective-permute":
            operands = operands[:1] if i.opcode.endswith("-start") else operands
        size = float(sum(array.bytes for operand in operands for array in operand.arrays))
        return Collective(kind, size * (groups.shape[1] if kind == "all-gather" else 1), groups, 1.0, i.op_name)

    # -- main memory --

    def traffic(self, computation: Computation, i: Instruction) -> float:
        operands = computation.operands(i)
        if i.opcode == "fusion":
            inner = self.module.computations[i.called("calls")[0]]
            read = sum(self.read_of(inner, n) for n, o in enumerate(operands) if _in_memory(o))
            return read + self.written(inner, inner.root, i.arrays)
        if i.opcode == "dynamic-update-slice":
            return 2 * operands[1].arrays[0].traffic
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            read = sum(array.bytes for array in i.arrays) if _in_memory(operands[0]) else 0.0
            return read + sum(array.traffic for array in i.arrays)
        if i.opcode == "scatter":
            return 2 * operands[-1].arrays[0].traffic
        if i.opcode in ("broadcast", "iota"):
            return i.arrays[0].traffic
        if "output_to_operand_aliasing=" in i.attributes and (said := _said(i, "bytes_accessed")) is not None:
            return said  # a kernel that updates an operand, of which it touches what it says
        read = sum(array.traffic for o in operands for array in o.arrays)
        if i.opcode.endswith("-start"):  # the result names the operands, too, and then the result itself
            results = i.arrays[:1] if i.opcode == "copy-start" else i.arrays[len(operands) : 2 * len(operands)]
            return float(read + sum(array.traffic for array in results or i.arrays))
        return float(read + sum(array.traffic for array in i.arrays))

    def read_of(self, computation: Computation, number: int) -> float:
        """Bytes that a fused computation reads of one of its parameters."""
        parameter = computation.parameters.get(number)
        if parameter is None:
            return 0.0
        return min(self.read(computation, parameter), float(sum(array.traffic for array in parameter.arrays)))

    def read(self, computation: Computation, i: Instruction) -> float:
        total, whole = 0.0, float(sum(array.bytes for array in i.arrays))
        for user in computation.instructions.values():
            for place in [n for n, name in enumerate(user.operands) if name == i.name]:
                if user.opcode in ("bitcast", "reshape", "tuple", "get-tuple-element"):
                    total += self.read(computation, user)
                elif user.opcode == "copy":  # another layout, of what is then used of it
                    total += whole if user.is_root else self.read(computation, user)
                elif user.opcode in ("dynamic-slice", "slice") or (user.opcode == "gather" and place == 0):
                    total += sum(array.bytes for array in user.arrays) if place == 0 else 0
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    total += 0  # updated in place
                elif user.opcode == "fusion":
                    inner = self.module.computations[user.called("calls")[0]]
                    same = self.renamed(inner)
                    through = same is not None and int(same.inside) == place
                    total += self.read(computation, user) if through else self.read_of(inner, place)
                else:
                    total += whole
        return total

    def renamed(self, computation: Computation) -> Instruction | None:
        """The parameter that a computation within a fusion returns as it is, but for its shape and layout, if it does
        no more: nothing is read of it there."""
        i = _behind(computation, computation.root, ("bitcast", "reshape", "copy"))
        while i.opcode == "fusion":
            inner = self.module.computations[i.called("calls")[0]]
            found = self.renamed(inner)
            if found is None:
                return None
            i = computation.instructions[i.operands[int(found.inside)]]
            i = _behind(computation, i, ("bitcast", "reshape", "copy"))
        return i if i.opcode == "parameter" else None

    def written(self, computation: Computation, root: Instruction, results: tuple[Array, ...]) -> float:
        """Bytes that a fused computation writes of its results."""
        if root.opcode == "tuple":
            parts = computation.operands(root)
            if sum(len(part.arrays) for part in parts) != len(results):
                return float(sum(array.traffic for array in results))
            total, at = 0.0, 0
            for part in parts:
                total += self.written(computation, part, results[at : at + len(part.arrays)])
                at += len(part.arrays)
            return total
        if any(array.space for array in results):
            return float(sum(array.traffic for array in results))
        made = _behind(computation, root, ("bitcast", "reshape", "copy", "convert"))
        if made.opcode == "dynamic-update-slice":
            return computation.operands(made)[1].arrays[0].bytes
        if made.opcode == "fusion":
            inner = self.module.computations[made.called("calls")[0]]
            return self.written(inner, inner.root, results)
        return float(sum(array.traffic for array in results))


def _in_memory(i: Instruction) -> bool:
    return any(array.space == 0 for array in i.arrays)


def _behind(computation: Computation, i: Instruction, through: tuple[str, ...] = ("copy", "bitcast")) -> Instruction:
    """What an instruction is but for copies of it."""
    while i.opcode in through and i.operands and i.operands[0] in computation.instructions:
        i = computation.instructions[i.operands[0]]
    return i


def _element(computation: Computation, i: Instruction) -> int | None:
    """Which element of the computation's tuple parameter it is."""
    if i.opcode != "get-tuple-element" or computation.instructions[i.operands[0]].opcode != "parameter":
        return None
    return int(re.search(r"\bindex=(\d+)", i.attributes)[1])


def _keeps_a_part(computation: Computation) -> bool:
    """Whether it slices all that it sums over devices."""
    through = ("bitcast", "copy", "convert")
    root = _behind(computation, computation.root, through)
    parts = [
        _behind(computation, i, through) for i in (computation.operands(root) if root.opcode == "tuple" else [root])
    ]
    sums = [i for i in computation.instructions.values() if i.opcode == "all-reduce"]
    return all(part.opcode in ("dynamic-slice", "fusion") for part in parts) and _elements(parts) < _elements(sums)


def _elements(instructions: Iterable[Instruction]) -> int:
    return sum(math.prod(array.shape) for i in instructions for array in i.arrays)


def _target(i: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    return found[1] if found else ""


def _said(i: Instruction, what: str) -> float | None:
    """What a custom kernel estimates of itself."""
    found = re.search(rf'"cost_estimate":\{{[^}}]*?"{what}":"?(\d+)', i.attributes)
    return float(found[1]) if found else None


def _kernel_name(i: Instruction) -> str:
    found = re.search(r'kernel_name\\?"?[:=]\s*\\?"([\w.\-]+)', i.attributes)
    return found[1] if found else i.op_name or i.name


def dot_flops(i: Instruction, lhs: Array) -> float:
    """Two for each element of the result and each of those summed over."""
    summed = math.prod(lhs.shape[axis] for axis in i.numbers("lhs_contracting_dims"))
    return 2.0 * math.prod(i.arrays[0].shape) * summed


def convolution_flops(i: Instruction, lhs: Array, rhs: Array) -> float:
    """Two for each multiply-add with an element of the input: padding and the holes of a dilation are no work. A TPU's
    compiler writes products with batch axes as convolutions whose windows are mostly padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    inputs, outputs = labels[1], labels[3]
    out = i.arrays[0].shape
    batch_groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    feature_groups = re.search(r"feature_group_count=(\d+)", i.attributes)
    flops = 2.0 * lhs.shape[inputs.index("b")] / (int(batch_groups[1]) if batch_groups else 1)
    flops *= lhs.shape[inputs.index("f")] / (int(feature_groups[1]) if feature_groups else 1)
    flops *= out[outputs.index("f")]
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    window = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in range(len(inputs) - 2):
        size, stride, low, lhs_dilate, rhs_dilate = (
            int(window[name].split("x")[axis].split("_")[0]) if name in window else default
            for name, default in (("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        flops *= _window_positions(
            size=size, stride=stride, low=low, lhs_dilate=lhs_dilate, rhs_dilate=rhs_dilate,
            length=lhs.shape[inputs.index(str(axis))], out=out[outputs.index(str(axis))],
        )  # fmt: skip
    return flops


def _window_positions(
    *, size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int, length: int, out: int
) -> int:
    """Pairs of a place in the output and one in the window that meet an element of the input."""
    start = np.arange(out, dtype=np.int64) * stride - low
    last = (length - 1) * lhs_dilate
    if lhs_dilate == 1:
        first = np.maximum(0, -(start // rhs_dilate))
        end = np.minimum(size - 1, (last - start) // rhs_dilate)
        return int(np.maximum(0, end - first + 1).sum())
    total = 0
    for k in range(size):
        place = start + k * rhs_dilate
        total += int(((place >= 0) & (place <= last) & (place % lhs_dilate == 0)).sum())
    return total


def _library_matmul_flops(computation: Computation, i: Instruction) -> float:
    """Of a GPU library's product: the summed axes stand in the backend's config."""
    lhs = computation.operands(i)[0].arrays[0]
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    axes = [int(n) for n in re.findall(r"\d+", found[1])] if found else [len(lhs.shape) - 1]
    return 2.0 * math.prod(i.arrays[0].shape) * math.prod(lhs.shape[axis] for axis in axes)

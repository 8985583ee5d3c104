"""What accelerators can do at best, as their makers publish it. Figures are of one device, as JAX counts them.

Sources: the system pages of Google Cloud's TPU documentation (v4, v5e, v5p, v6e, TPU7x); for the bandwidth of one link
in one direction, and the shape of the network, chapter 2 of "How To Scale Your Model"
(jax-ml.github.io/scaling-book/tpus); NVIDIA's H100 (SXM) and H200 data sheets, without sparsity.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One device. Rates are a second.

    - name: as topologies are named: "v5p" of "v5p:4x4x8"
    - kinds: what `jax.Device.device_kind` says
    - bf16, int8, fp8: dense operations; where the hardware has no such units, those of bf16
    - link: bytes over one link in one direction
    - torus: dimensions of the network; 0 is a switch, over which a device sends `link` bytes to any other of its host
    - wraps_at: a dimension of the torus that is a multiple of this closes to a ring
    - per_chip: devices of one chip, which share its links
    - host_link: bytes a device sends to other hosts, where that is another network
    - per_host: devices of one host, where hosts bound a network
    """

    name: str
    kinds: tuple[str, ...]
    bf16: float
    int8: float
    fp8: float
    memory: float  # bytes
    bandwidth: float  # of it, bytes
    link: float
    torus: Literal[0, 2, 3]
    wraps_at: int = 1
    per_chip: int = 1
    host_link: float = 0.0
    per_host: int = 0

    def peak(self, dtype: str) -> float:
        """Operations on operands of this dtype, by XLA's name of it."""
        if dtype in ("s8", "u8", "s4", "u4"):
            return self.int8
        if dtype.startswith("f8"):
            return self.fp8
        if dtype in ("f32", "f64"):  # six products of 16 bits give 32, where no cheaper precision is asked for
            return self.bf16 / 6
        return self.bf16


GIB = float(2**30)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", kinds=("TPU v4",), bf16=275e12, int8=275e12, fp8=275e12, memory=32 * GIB, bandwidth=1.2e12,
            link=4.5e10, torus=3, wraps_at=4,
        ),
        Chip(
            name="v5e", kinds=("TPU v5 lite", "TPU v5e"), bf16=197e12, int8=394e12, fp8=197e12, memory=16 * GIB,
            bandwidth=8.19e11, link=4.5e10, torus=2, wraps_at=16,
        ),
        Chip(
            name="v5p", kinds=("TPU v5", "TPU v5p"), bf16=459e12, int8=918e12, fp8=459e12, memory=95 * GIB,
            bandwidth=2.765e12, link=9e10, torus=3, wraps_at=4,
        ),
        Chip(
            name="v6e", kinds=("TPU v6 lite", "TPU v6e"), bf16=918e12, int8=1836e12, fp8=918e12, memory=32 * GIB,
            bandwidth=1.638e12, link=9e10, torus=2, wraps_at=16,
        ),
        Chip(  # two devices a chip: half of the chip's 2307 and 4614 Tflop/s, 192 GiB and 7.38 TB/s each
            name="tpu7x", kinds=("TPU7x",), bf16=1153.5e12, int8=1153.5e12, fp8=2307e12, memory=96 * GIB,
            bandwidth=3.69e12, link=9e10, torus=3, wraps_at=4, per_chip=2,
        ),
        Chip(  # 450 GB/s of NVLink to each of 8, and a 400 Gbit/s network card to each of the others
            name="h100", kinds=("NVIDIA H100 80GB HBM3",), bf16=989e12, int8=1979e12, fp8=1979e12, memory=80e9,
            bandwidth=3.35e12, link=4.5e11, torus=0, host_link=5e10, per_host=8,
        ),
        Chip(
            name="h200", kinds=("NVIDIA H200",), bf16=989e12, int8=1979e12, fp8=1979e12, memory=141e9,
            bandwidth=4.8e12, link=4.5e11, torus=0, host_link=5e10, per_host=8,
        ),
        Chip(
            name="a100", kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"), bf16=312e12, int8=624e12, fp8=312e12,
            memory=80e9, bandwidth=2.04e12, link=3e11, torus=0, host_link=2.5e10, per_host=8,
        ),
    )
}  # fmt: skip

EXAMPLES = {
    "v4": "v4:4x4x4", "v5e": "v5e:4x4", "v5p": "v5p:4x4x8", "v6e": "v6e:16x16", "tpu7x": "tpu7x:4x4x4",
    "h100": "h100:8, or h100:4x8 for four hosts",
}  # fmt: skip


def of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None where it is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


@dataclass(frozen=True)
class Topology:
    """Chips and how they are wired: sizes of a torus's dimensions, or of GPUs the hosts and the devices of one."""

    chip: Chip
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes) * self.chip.per_chip


def topology(name: str) -> Topology:
    """The topology of that name, such as "v5p:4x4x8" or "h100:4x8". Raises ValueError, with examples, for another."""
    kind, _, sizes = name.partition(":")
    parts = sizes.split("x")
    if kind not in EXAMPLES or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"unknown topology {name!r}: expected a chip and the sizes of its network, such as "
            f"{'; '.join(EXAMPLES.values())}."
        )
    chip = CHIPS[kind]
    numbers = tuple(int(part) for part in parts)
    if chip.torus and len(numbers) != chip.torus:
        raise ValueError(
            f"topology {name!r} has {len(numbers)} sizes, but the network of a {kind} has {chip.torus} dimensions, "
            f"as in {EXAMPLES[kind]}."
        )
    if not chip.torus and len(numbers) > 2:
        raise ValueError(f"topology {name!r}: expected hosts x GPUs of one, as in {EXAMPLES[kind]}.")
    return Topology(chip, numbers)

"""Which devices, in which named axes."""

import dataclasses
import math
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each axis; one axis may be -1 and takes what the others leave.

    - data: copies of the model, each with its own rows of the batch
    - fsdp: rows of the batch too, and parameters and optimizer state are split over it
    - expert: rows of the batch too, and the routed experts are split over it
    - tensor: heads, feed-forward width and vocabulary are split over it
    - context: the sequence is split over it
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name} must be at least 1, or -1 for what the others leave, got {size}.")
        if list(self.shape).count(-1) > 1:
            raise ValueError(f"only one mesh axis may be -1, got {self}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)

    @property
    def named_size(self) -> int:
        """Product of the sizes that are given: how many devices the mesh needs at least."""
        return math.prod(size for size in self.shape if size != -1)

    def resolve(self, num_devices: int) -> "MeshConfig":
        """Replaces -1. Raises ValueError if the mesh does not use exactly `num_devices`."""
        named = self.named_size
        sizes = dataclasses.asdict(self)
        if -1 in self.shape and num_devices % named == 0:
            free = next(name for name, size in sizes.items() if size == -1)
            return dataclasses.replace(self, **{free: num_devices // named})
        if -1 not in self.shape and named == num_devices:
            return self
        axes = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size != 1)
        raise ValueError(
            f"the mesh ({axes or 'all axes 1'}) needs {'a multiple of ' if -1 in self.shape else ''}{named} "
            f"devices, but there are {num_devices}. Choose axis sizes whose product is {num_devices}, "
            f"or set one axis to -1."
        )


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all devices by default).

    Where a slow network lies between devices, between the slices of a TPU or the hosts of GPUs, `data` goes over it,
    and the other axes stay on one side as far as they fit. Raises ValueError if the sizes do not fit the devices, and
    if `data` is not a multiple of a TPU's slices.
    """
    devices = jax.devices() if devices is None else devices
    config = config.resolve(len(devices))
    axes = tuple(dataclasses.asdict(config))
    # Auto axes: the partitioner propagates shardings. `jax.make_mesh` would default to explicit ones.
    auto = (AxisType.Auto,) * len(axes)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) == 1:
        try:
            return jax.make_mesh(config.shape, axes, axis_types=auto, devices=devices)
        except NotImplementedError:  # an axis would take a part of one of the torus's: allowed, if it must be
            parts = mesh_utils.create_device_mesh(config.shape, devices, allow_split_physical_axes=True)
            return Mesh(parts, axes, axis_types=auto)
    if devices[0].platform == "tpu":
        return Mesh(_over_slices(config, devices, len(slices)), axes, axis_types=auto)
    # GPUs of a host are all one step from each other: in the order of hosts, the last axes are the nearest.
    nearest = sorted(devices, key=lambda device: (device.slice_index, device.id))
    return Mesh(np.array(nearest).reshape(config.shape), axes, axis_types=auto)


def _over_slices(config: MeshConfig, devices: list, slices: int) -> np.ndarray:
    if config.data % slices:
        raise ValueError(
            f"mesh.data is {config.data}, and must be a multiple of the number of TPU slices, {slices}: the network "
            f"between slices is slow, and only mesh.data goes over it. The other axes must fit into a slice of "
            f"{len(devices) // slices} devices."
        )
    within = dataclasses.replace(config, data=config.data // slices)
    small = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")  # as `jax.make_mesh`: their torus has two axes only
    return mesh_utils.create_hybrid_device_mesh(
        within.shape, (slices, *[1] * (len(within.shape) - 1)), devices, allow_split_physical_axes=small
    )


def platform() -> str:
    """What the function being traced is compiled for, "cpu", "tpu" or "gpu": the devices of the mesh in use, be they
    only a topology's, or else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name

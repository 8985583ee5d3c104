"""Meshes over the slices of real TPU topologies, and over hosts with GPUs: `data` takes the slow network."""

import jax
import pytest
from topologies import chips

from llama4_jax.sharding import MeshConfig, make_mesh


@pytest.fixture
def two_slices():
    """Two slices of eight chips each."""
    return chips("v5e:2x4", num_slices=2)


@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=2, fsdp=8), MeshConfig(data=4, fsdp=2, tensor=2), MeshConfig(expert=4, context=2)],
    ids=["a copy a slice", "two copies a slice", "data left open"],
)
def test_data_goes_over_the_slices_and_all_else_stays_within_one(two_slices, config):
    mesh = make_mesh(config, two_slices)
    assert set(mesh.devices.flat) == set(two_slices)
    copies = mesh.devices.reshape(mesh.shape["data"], -1)
    for copy in copies:
        assert len({device.slice_index for device in copy}) == 1
    assert [copy[0].slice_index for copy in copies] == sorted(copy[0].slice_index for copy in copies)


def test_a_slice_too_small_for_the_other_axes_is_an_error_in_words(two_slices):
    with pytest.raises(ValueError, match=r"mesh.data is 1, and must be a multiple of the number of TPU slices, 2: .*8"):
        make_mesh(MeshConfig(data=1, fsdp=16), two_slices)


class _GPU:
    """JAX needs to know no more of a device to put it into a mesh."""

    platform = device_kind = "gpu"

    def __init__(self, number: int):
        self.id, self.process_index, self.slice_index = number, number, number // 4


@pytest.mark.parametrize(("config", "hosts"), [(MeshConfig(fsdp=4), 1), (MeshConfig(data=1, fsdp=-1), 2)])
def test_on_hosts_with_gpus_a_copy_stays_on_one_as_far_as_it_fits(config, hosts):
    mesh = make_mesh(config, [_GPU(number) for number in reversed(range(8))])
    for copy in mesh.devices.reshape(-1, 4 * hosts):
        assert [gpu.id for gpu in copy] == sorted(gpu.id for gpu in copy)
        assert len({gpu.slice_index for gpu in copy}) == hosts


def test_one_slice_is_laid_out_as_jax_does(two_slices):
    devices = two_slices[:8]
    ours = make_mesh(MeshConfig(fsdp=4, tensor=2), devices)
    assert (ours.devices.squeeze() == jax.make_mesh((4, 2), ("a", "b"), devices=devices).devices).all()

"""Plans against numbers counted by hand: of programs small enough to count, compiled for real topologies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.sharding.chips import CHIPS, of_kind, topology
from llama4_jax.sharding.hlo import Collective
from llama4_jax.sharding.plan import Network, Plan, make_plan, topology_devices

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")


def mesh_on(name: str, **sizes: int) -> Mesh:
    return make_mesh(MeshConfig(data=sizes.pop("data", 1), **sizes), topology_devices(topology(name)))


@pytest.mark.parametrize(
    ("name", "devices"), [("v4:2x2x2", 8), ("v5e:2x4", 8), ("v5p:2x2x2", 8), ("v6e:2x4", 8), ("tpu7x:2x2x1", 8)]
)
def test_a_topology_has_the_devices_that_jax_would_show_and_the_chip_is_known(name, devices):
    found = topology_devices(topology(name))
    assert len(found) == devices == topology(name).num_devices
    assert {of_kind(device.device_kind) for device in found} == {topology(name).chip}


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:", "v5p:4x", "v5p:0x4x4", "4x4x8", "v5p:-1x2x2"])
def test_an_unknown_topology_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match="unknown topology .* v5p:4x4x8"):
        topology(name)


def test_a_topology_of_the_wrong_dimensions_or_sizes_is_refused():
    with pytest.raises(ValueError, match=r"has 2 sizes, but the network of a v5p has 3 dimensions, as in v5p:4x4x8"):
        topology("v5p:4x4")
    with pytest.raises(ValueError, match=r"no topology 'v5p:3x3x3'.*v5p:4x4x8"):
        topology_devices(topology("v5p:3x3x3"))
    with pytest.raises(ValueError, match="no compiler for GPUs"):
        topology_devices(topology("h100:8"))


def small_plan(name: str, mesh: Mesh, rows: int = 512, layers: int = 6, width: int = 1024) -> Plan:
    """Of the sum of tanh(x w) over layers that are split over fsdp."""

    def step(w, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, w)[0]

    def shape(*size, spec):
        return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    w = shape(layers, width, width, spec=(None, "fsdp"))
    x = shape(rows, width, spec=(("data", "fsdp"),))
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, out_shardings=x.sharding).lower(w, x)
    return make_plan(lowered, topology(name), mesh, {"parameters": w, "batch": x}, model_flops=1e9)


def test_the_plan_of_a_small_step_is_what_a_hand_count_says():
    plan = small_plan("v5p:2x2x2", mesh_on("v5p:2x2x2", data=2, fsdp=4))
    layer = 1024 * 1024 * 2
    assert plan.arguments == {"parameters": 6 * layer / 4, "batch": 64 * 1024 * 2}
    assert plan.results == pytest.approx(64 * 1024 * 2, abs=4096) and plan.fits
    assert plan.flops == 6 * 2 * 64 * 1024 * 1024
    (gather,) = [s for s in plan.sent if s.bytes > 1e6]
    assert (gather.kind, gather.axes, gather.devices, gather.times, gather.bytes) == (
        "all-gather", ("fsdp",), 4, 6, 6 * layer,
    )  # fmt: skip
    assert plan.compute_seconds == plan.flops / 459e12
    # Each layer's part is read and the whole written and read: what stays in vector memory is not counted.
    assert 6 * layer / 4 <= plan.traffic <= 4 * 6 * layer
    assert plan.seconds == max(plan.compute_seconds, plan.memory_seconds, plan.network_seconds)
    assert plan.utilization == pytest.approx(1e9 / 459e12 / plan.seconds)
    assert "estimated MFU" in plan.text() and "all-gather" in plan.text() and '"binds"' in plan.to_json()


def test_a_step_that_its_chip_cannot_hold_gives_a_plan_that_does_not_fit():
    plan = small_plan("v5e:2x2", mesh_on("v5e:2x2", fsdp=4), rows=4 * 2**21, width=4096)
    assert not plan.fits and plan.bytes > 16 * 2**30
    assert plan.flops == 6 * 2 * 2**21 * 4096**2
    assert "DOES NOT FIT" in plan.text()


def test_memory_is_what_the_compiler_itself_compares_with_the_chips():
    """Which takes this step. Its `memory_analysis` says 17 GiB: temporaries that share a place it counts apart."""
    mesh = mesh_on("v5e:2x2", fsdp=4)

    def step(w, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None))
        return jax.grad(lambda w: jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum())(w)

    w = jax.ShapeDtypeStruct((35, 8192, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((65536, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(w, x)
    plan = make_plan(lowered, topology("v5e:2x2"), mesh, {"parameters": w, "batch": x}, model_flops=1e9)
    assert plan.fits and 15.6 * 2**30 < plan.bytes < 15.75 * 2**30  # 0.25 are the system's


def sent(network: Network, kind: str, groups, size: float = 1e9) -> float:
    return network.seconds(Collective(kind, size, np.array(groups), 1.0, ""))


def test_a_collective_uses_both_directions_of_each_ring_that_its_devices_form():
    mesh = mesh_on("v5p:4x4x8", fsdp=8, expert=16)
    network, link = Network(topology("v5p:4x4x8"), mesh), CHIPS["v5p"].link
    ids = np.arange(128).reshape(8, 16)
    assert sent(network, "all-gather", ids.T) == pytest.approx(1e9 * 7 / 8 / (2 * link))  # a ring of 8
    assert sent(network, "reduce-scatter", ids) == pytest.approx(1e9 * 15 / 16 / (4 * link))  # 4 x 4, both rings
    assert sent(network, "all-reduce", ids.reshape(1, -1)) == pytest.approx(2e9 * 127 / 128 / (6 * link))
    assert sent(network, "all-to-all", ids) == pytest.approx(1e9 * 4 / (8 * link))
    assert sent(network, "all-gather", ids.reshape(-1, 1)) == 0


def test_a_small_torus_does_not_close_to_rings_and_neighbours_are_one_link_away():
    mesh = mesh_on("v5e:4x4", fsdp=4, expert=4)
    network, link = Network(topology("v5e:4x4"), mesh), CHIPS["v5e"].link
    ids = np.arange(16).reshape(4, 4)
    assert sent(network, "all-gather", ids) == pytest.approx(1e9 * 3 / 4 / link)
    assert sent(network, "collective-permute", [[0, 1]]) == pytest.approx(1e9 / link)
    assert sent(network, "collective-permute", [[0, 3]]) == pytest.approx(3e9 / link)


def test_of_gpus_a_group_within_a_host_sends_over_its_switch_and_another_over_the_network_cards():
    class Mesh8x2:  # of GPUs there is no topology without a GPU
        shape = {"data": 2, "fsdp": 8}  # noqa: RUF012
        devices = np.arange(16).reshape(2, 8)

    network = Network.__new__(Network)
    network.chip, network.sizes, network.mesh, network.coords = CHIPS["h100"], (2, 8), Mesh8x2.shape, None
    ids = np.arange(16).reshape(2, 8)
    assert sent(network, "all-gather", ids) == pytest.approx(1e9 * 7 / 8 / 4.5e11)
    assert sent(network, "all-gather", ids.T) == pytest.approx(1e9 / 2 / 5e10)

"""Axis names are closed, tables give the specs they say, and sizes that a mesh does not divide are named."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sharding import MeshConfig, activation_sharding, constrain, make_mesh, parameter_sharding
from sharding.rules import ACTIVATIONS, PARAMETERS, spec


def test_parameters_are_split_over_fsdp_and_activations_are_not():
    assert spec(("embed", "mlp"), PARAMETERS) == P("fsdp", "tensor")
    assert spec(("batch", "seq", "embed"), ACTIVATIONS) == P(("data", "fsdp", "expert"), "context", None)


def test_experts_are_split_over_the_expert_axis():
    assert spec(("experts", "embed", "gate_up", "mlp"), PARAMETERS) == P("expert", "fsdp", None, "tensor")


def test_every_axis_goes_to_an_axis_of_the_mesh():
    mesh = make_mesh(MeshConfig(data=8))
    assert {axis for table in (PARAMETERS, ACTIVATIONS) for axes in table.values() for axis in axes} <= set(
        mesh.axis_names
    )


def test_an_unknown_axis_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown axis 'embd': expected one of layers, embed"):
        spec(("embd",), PARAMETERS)
    with pytest.raises(ValueError, match="unknown axis 'sequence'"):
        constrain(jnp.zeros((2, 3)), "batch", "sequence")


def test_constrain_needs_a_name_for_each_axis():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs 2 axis names, got \('batch',\)"):
        constrain(jnp.zeros((2, 3)), "batch")


def test_constrain_changes_nothing_without_a_mesh_and_places_with_one():
    x = jnp.arange(16.0).reshape(8, 2)
    assert constrain(x, "batch", "embed") is x
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x * 1, "batch", "embed"))(x)
    assert y.sharding.is_equivalent_to(activation_sharding(("batch", "embed"), mesh), 2)
    assert (y == x).all()


def test_a_parameter_is_placed_by_its_names():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    sharding = parameter_sharding((16, 4, 8), ("embed", "q_heads", "head_dim"), mesh)
    assert sharding.shard_shape((16, 4, 8)) == (4, 2, 8)


def test_a_size_that_the_mesh_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with pytest.raises(
        ValueError, match="layers.0.attention.k.kernel: its 'kv_heads' axis has size 2, which mesh.tensor=4"
    ):
        parameter_sharding((16, 2, 8), ("embed", "kv_heads", "head_dim"), mesh, "layers.0.attention.k.kernel")


def test_minus_one_takes_what_the_others_leave():
    assert MeshConfig(data=-1, tensor=2).resolve(8) == MeshConfig(data=4, tensor=2)
    assert MeshConfig().resolve(1) == MeshConfig(data=1)
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2, "context": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=16), r"mesh \(mesh.data=16\) needs 16 devices, but there are 8"),
        (MeshConfig(data=-1, tensor=3), "needs a multiple of 3 devices, but there are 8"),
        (MeshConfig(data=2), "needs 2 devices, but there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_machine_says_so(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_only_one_axis_is_free_and_none_is_empty():
    with pytest.raises(ValueError, match="only one mesh axis may be -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="mesh.tensor must be at least 1, or -1"):
        MeshConfig(tensor=0)

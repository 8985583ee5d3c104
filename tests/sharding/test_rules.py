"""Axis names are closed, tables give the specs they say, and sizes that a mesh does not divide are named."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sharding import (
    SERVING,
    TRAINING,
    MeshConfig,
    activation_sharding,
    activation_spec,
    constrain,
    make_mesh,
    mesh_axes,
    parameter_sharding,
    use_rules,
    ways,
)
from sharding.rules import spec

EVERY = jax.sharding.AbstractMesh((2, 2, 2, 2, 2), ("data", "fsdp", "expert", "tensor", "context"))


def test_in_training_parameters_are_split_along_embed_and_activations_along_rows_and_tokens():
    assert spec((64, 64), ("embed", "mlp"), TRAINING.parameters, EVERY) == P(("fsdp", "expert", "context"), "tensor")
    axes = ("batch", "seq", "embed")
    assert spec(None, axes, TRAINING.activations, EVERY) == P(("data", "fsdp", "expert"), "context", None)


def test_a_mesh_axis_splits_an_array_once_and_experts_come_first():
    shape, axes = (8, 2, 64, 64), ("experts", "gate_up", "embed", "mlp")
    expected = P("expert", None, ("fsdp", "context"), "tensor")
    assert spec(shape, axes, TRAINING.parameters, EVERY) == expected


def test_in_serving_matrices_are_split_along_what_they_put_out():
    assert spec((64, 64), ("embed", "mlp"), SERVING.parameters, EVERY) == P("fsdp", ("tensor", "expert"))


def test_further_axes_join_only_where_they_divide():
    assert spec((2, 64), ("embed", "mlp"), TRAINING.parameters, EVERY) == P("fsdp", "tensor")
    assert spec((12, 64), ("embed", "mlp"), TRAINING.parameters, EVERY) == P(("fsdp", "expert"), "tensor")


def test_the_rules_in_use_decide_where_activations_live():
    assert activation_spec((8, 8), "batch", "mlp") == P(None, None)
    with jax.sharding.use_abstract_mesh(EVERY):
        assert activation_spec((8, 1, 8), "rows", "seq", "mlp") == P(("data", "fsdp", "expert"), None, "tensor")
        assert activation_spec((1, 8), "batch", "seq") == P(None, "context")  # one row is on every device
        assert mesh_axes("rows") == ("data", "fsdp", "expert") and ways(mesh_axes("rows")) == 8
        with use_rules(SERVING):
            assert activation_spec((8, 1, 8), "rows", "seq", "mlp") == P(("data", "fsdp"), None, ("tensor", "expert"))
        assert mesh_axes("seq") == ("context",)


def test_every_axis_goes_to_an_axis_of_the_mesh():
    mesh = make_mesh(MeshConfig(data=8))
    tables = [table for rules in (TRAINING, SERVING) for table in (rules.parameters, rules.activations)]
    assert {axis for table in tables for axes in table.values() for axis in axes} <= set(mesh.axis_names)


def test_an_unknown_axis_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown axis 'embd': expected one of layers, embed"):
        spec((8,), ("embd",), TRAINING.parameters, EVERY)
    with jax.sharding.use_abstract_mesh(EVERY), pytest.raises(ValueError, match="unknown axis 'sequence'"):
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

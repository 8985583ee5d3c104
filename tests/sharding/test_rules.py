"""Axis names are closed, tables give the specs they say, and sizes that a mesh does not divide are named."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llama4_jax.sharding import (
    SERVING,
    TRAINING,
    MeshConfig,
    activation_sharding,
    activation_spec,
    constrain,
    for_use,
    hlo,
    make_mesh,
    mesh_axes,
    parameter_sharding,
    use_rules,
    ways,
)
from llama4_jax.sharding.hlo import axes_of as axes_in
from llama4_jax.sharding.rules import spec

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


def test_matrices_that_put_out_embed_are_split_along_their_inputs_too():
    """Or a device's columns would be few, and XLA for TPUs neither keeps nor scatters those well."""
    table = TRAINING.parameters
    assert spec((64, 64), ("mlp", "embed"), table, EVERY) == P(("tensor", "expert"), ("fsdp", "context"))
    heads = ("q_heads", "head_dim", "embed")
    assert spec((8, 16, 64), heads, table, EVERY) == P("tensor", "expert", ("fsdp", "context"))
    assert spec((8, 3, 64), heads, table, EVERY) == P("tensor", None, ("fsdp", "expert", "context"))
    assert parameter_sharding((8, 3), ("q_heads", "head_dim"), EVERY).spec == P("tensor", None)  # a bias


def test_further_axes_join_only_where_they_divide():
    assert spec((2, 64), ("embed", "vocab"), TRAINING.parameters, EVERY) == P("fsdp", "tensor")
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


def moves(shape, axes, mesh: MeshConfig):
    """What devices send each other to bring a parameter to its use, and its gradient home."""
    devices = make_mesh(mesh)
    w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=parameter_sharding(shape, axes, devices))
    x = jax.ShapeDtypeStruct((64, shape[0]), jnp.float32, sharding=activation_sharding(("batch", "embed"), devices))

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ for_use(w, jnp.bfloat16, *axes).astype(jnp.float32)))

    with jax.set_mesh(devices):
        text = jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()
    return {(c.kind, axes_in(c.groups, dict(devices.shape))) for c in hlo.costs(text).collectives}


ONE_AFTER_ANOTHER = {("all-gather", ("fsdp",)), ("all-gather", ("expert",))}


def test_parameters_are_gathered_and_gradients_summed_over_one_axis_after_another():
    """Over all devices at once XLA for TPUs would do it by all-reduce, and send twice as much."""
    found = moves((64, 32), ("embed", None), MeshConfig(data=1, fsdp=4, expert=2))
    assert {move for move in found if move[0] == "all-gather"} == ONE_AFTER_ANOTHER
    assert {axes for kind, axes in found if kind != "all-gather"} == {("fsdp",), ("expert",)}


def test_with_heads_split_too_they_are_gathered_so():
    found = moves((64, 32), ("embed", "mlp"), MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    assert {move for move in found if move[0] == "all-gather"} == ONE_AFTER_ANOTHER


def test_with_replicas_they_are_gathered_at_once():
    found = moves((64, 32), ("embed", None), MeshConfig(data=2, fsdp=2, expert=2))
    assert {axes for kind, axes in found if kind == "all-gather"} == {("fsdp", "expert")}

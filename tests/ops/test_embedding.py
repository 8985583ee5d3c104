"""The rows of a table, wherever its parts are, and their gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.ops.embedding import AXES, lookup
from llama4_jax.sharding import SERVING, TRAINING, MeshConfig, activation_spec, make_mesh, parameter_spec, use_rules

MESHES = {
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, expert 2, context 2": MeshConfig(data=1, fsdp=2, expert=2, context=2),
    "tensor 8": MeshConfig(data=1, tensor=8),
    "expert 4, tensor 2": MeshConfig(data=1, expert=4, tensor=2),
}


@functools.partial(jax.jit, static_argnames=("mesh", "rules"))
def value_and_gradient(table, tokens, cotangent, mesh=None, rules=TRAINING):
    with use_rules(rules):
        x, pull = jax.vjp(lambda table: lookup(table, tokens, jnp.float32), table)
    return x, *pull(cotangent)


@pytest.mark.parametrize("rules", [TRAINING, SERVING], ids=["training", "serving"])
@pytest.mark.parametrize("shape", [(8, 4), (1, 4), (1, 1)])
@pytest.mark.parametrize("mesh", MESHES)
def test_a_split_table_gives_the_rows_of_a_whole_one(mesh, shape, rules):
    draw = np.random.default_rng(0)
    table = draw.normal(size=(32, 16)).astype(np.float32)
    tokens = draw.integers(0, 32, shape, dtype=np.int32)
    cotangent = draw.normal(size=(*shape, 16)).astype(np.float32)
    expected = value_and_gradient(table, tokens, cotangent)
    mesh = make_mesh(MESHES[mesh])
    with jax.set_mesh(mesh), use_rules(rules):
        table = jax.device_put(table, NamedSharding(mesh, parameter_spec(table.shape, *AXES)))
        tokens = jax.device_put(tokens, NamedSharding(mesh, activation_spec(shape, "batch", "seq")))
        got = value_and_gradient(table, tokens, cotangent, mesh, rules)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


def test_the_table_stays_where_it_is():
    mesh = make_mesh(MESHES["fsdp 8"])
    with jax.set_mesh(mesh):
        shapes = [((512, 64), jnp.float32, P(None, "fsdp")), ((8, 4), jnp.int32, P("fsdp")),
                  ((8, 4, 64), jnp.float32, P("fsdp"))]  # fmt: skip
        arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, p)) for s, d, p in shapes]
        text = value_and_gradient.lower(*arguments, mesh=mesh).compile().as_text()
    moved = re.findall(r" = \(?\w+\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text)
    assert ("32", "all-gather") in moved and " all-to-all(" in text
    assert not any("512" in shape for shape, _ in moved)

"""A step on eight devices, whatever the mesh, is the step on one: figures, gradients of every tensor, biases, and the
steps after it."""

import functools

import jax
import numpy as np
import pytest
from small_run import MAVERICK, SCOUT, arrays, config, gradients, largest_error, packed_batch, run, trainer

from sharding import MeshConfig

MODELS = {"scout": SCOUT, "maverick": MAVERICK}
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2, expert 4": MeshConfig(data=2, expert=4),
    "fsdp 4, tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
    "data 2, expert 2, tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "data 4, context 2": MeshConfig(data=4, context=2),
    "fsdp 2, expert 2, context 2": MeshConfig(data=1, fsdp=2, expert=2, context=2),
}


@functools.cache
def steps(model: str, mesh: str | None):
    """What three steps give, of which the first shows the gradients."""
    small = config(MODELS[model])
    batches = [packed_batch(small, seed) for seed in range(3)]
    made = trainer(small, None if mesh is None else MESHES[mesh])
    state, figures = run(made, batches[:1])
    first = gradients(state), arrays(state.bias)
    state, more = run(made, batches[1:], state)
    return made, state, *first, figures + more


@pytest.mark.parametrize(
    ("model", "mesh"),
    [*(("scout", mesh) for mesh in MESHES),
     *(("maverick", mesh) for mesh in ("data 2, expert 4", "fsdp 4, tensor 2", "data 4, context 2"))],
)  # fmt: skip
def test_loss_and_gradients_on_eight_devices_equal_those_on_one(model, mesh):
    _, _, expected_gradients, expected_bias, expected = steps(model, None)
    made, _, got_gradients, got_bias, got = steps(model, mesh)
    assert made.mesh.size == 8
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.loss, theirs.loss, rtol=2e-6)
        np.testing.assert_allclose(mine.grad_norm, theirs.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(mine.balance, theirs.balance, rtol=1e-5)
        assert mine.tokens == theirs.tokens
    assert largest_error(got_gradients, expected_gradients) < 1e-5
    for name, bias in expected_bias.items():
        np.testing.assert_allclose(got_bias[name], bias, atol=1e-9)


@pytest.mark.parametrize(
    ("mesh", "split"),
    [("fsdp 8", "embed"), ("data 2, expert 4", "experts"), ("fsdp 4, tensor 2", "q_heads"),
     ("fsdp 4, tensor 2", "vocab")],
)  # fmt: skip
def test_each_device_holds_its_part_of_what_the_mesh_splits_and_so_does_the_optimizer(mesh, split):
    _, state, *_ = steps("scout", mesh)
    for tree in (state.params, state.optimizer):
        variables = [v for v in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "axes")) if hasattr(v, "axes")]
        parts = [v for v in variables if split in v.axes]
        assert parts
        for variable in parts:
            array, axis = variable.get_value(), variable.axes.index(split)
            ways = array.shape[axis] // array.addressable_shards[0].data.shape[axis]
            assert ways == {"embed": 8, "experts": 4, "q_heads": 2, "vocab": 2}[split]


def test_the_first_state_does_not_depend_on_the_mesh():
    one, eight = (trainer(config(SCOUT), mesh) for mesh in (None, MESHES["fsdp 4, tensor 2"]))
    for made in (one, eight):
        with jax.set_mesh(made.mesh):
            state = made.init()
        if made is one:
            expected = jax.device_get(state)
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)

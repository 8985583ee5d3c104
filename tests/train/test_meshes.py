"""A step on eight devices, whatever the mesh, is the step on one: figures, gradients of every tensor, biases, and the
steps after it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from micro_run import PICTURES
from small_run import MAVERICK, SCOUT, arrays, config, gradients, largest_error, packed_batch, run, trainer

from llama4_jax.data.batch import Batch
from llama4_jax.data.config import DataConfig
from llama4_jax.sharding import MeshConfig
from llama4_jax.train.balance import BalanceConfig

MODELS = {"scout": SCOUT, "maverick": MAVERICK, "pictures": dataclasses.replace(PICTURES, num_experts=4)}
MESHES = {
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "fsdp 4, tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
    "tensor 2, expert 4": MeshConfig(data=1, tensor=2, expert=4),
    "data 2, expert 2, tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "context 4, fsdp 2": MeshConfig(data=1, context=4, fsdp=2),
    "context 2, expert 4": MeshConfig(data=1, context=2, expert=4),
    "data 4, tensor 2": MeshConfig(data=4, tensor=2),
}
CASES = [  # each model over each axis, and no more: every one takes ten seconds to compile
    ("scout", "fsdp 8"),
    ("scout", "tensor 2, expert 4"),
    ("scout", "context 4, fsdp 2"),
    ("scout", "data 4, tensor 2"),
    ("maverick", "fsdp 8"),
    ("maverick", "data 2, expert 2, tensor 2"),
    ("maverick", "context 2, expert 4"),
    ("pictures", "fsdp 4, tensor 2"),
    ("pictures", "data 2, expert 2, tensor 2"),
    ("pictures", "context 2, expert 4"),
]


def with_pictures(batch: Batch, seed: int) -> Batch:
    """No tile, one or two in a row: four of its tokens stand for each, and the loss passes over them."""
    draw = np.random.default_rng(seed)
    tokens, weights = batch.tokens.copy(), batch.weights.copy()
    tokens[tokens == PICTURES.vision.patch_token_id] = 0
    for row, tiles in enumerate(draw.integers(0, 3, len(tokens))):
        places = np.sort(draw.choice(np.flatnonzero(batch.segment_ids[row]), 4 * tiles, replace=False))
        tokens[row, places], weights[row, places] = PICTURES.vision.patch_token_id, 0
    assert {0, 4, 8} == set((tokens == PICTURES.vision.patch_token_id).sum(1).tolist())
    images = draw.integers(0, 256, (len(tokens), 2, 28, 28, 3), dtype=np.uint8)
    return batch._replace(tokens=tokens, weights=weights, images=images)


@functools.cache
def steps(model: str, mesh: str | None):
    """What three steps give, of which the first shows the gradients."""
    if model == "pictures":
        data = DataConfig(seq_len=32, batch_size=8, tiles_per_row=2)
        small = config(MODELS[model], data=data, balance=BalanceConfig(switch=1e-2, z=1e-3))
        # One step: Adam then divides gradients of the encoder that are as small as their rounding by themselves.
        batches = [with_pictures(packed_batch(small), 0)]
    else:
        small = config(MODELS[model])
        batches = [packed_batch(small, seed) for seed in range(3)]
    made = trainer(small, None if mesh is None else MESHES[mesh])
    state, figures = run(made, batches[:1])
    first = gradients(state), arrays(state.bias)
    state, more = run(made, batches[1:], state) if batches[1:] else (state, [])
    return made, state, *first, figures + more


@pytest.mark.parametrize(("model", "mesh"), CASES)
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
    [("fsdp 8", "embed"), ("tensor 2, expert 4", "experts"), ("data 4, tensor 2", "q_heads"),
     ("data 4, tensor 2", "vocab")],
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
    one, eight = (trainer(config(SCOUT), mesh) for mesh in (None, MESHES["data 4, tensor 2"]))
    for made in (one, eight):
        with jax.set_mesh(made.mesh):
            state = made.init()
        if made is one:
            expected = jax.device_get(state)
    for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)

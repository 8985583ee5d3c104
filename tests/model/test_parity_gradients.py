"""Loss and the gradient of every tensor against PyTorch's, and twenty steps of AdamW along the same curve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import hf, ours
from oracles.cases import CASES, MAVERICK, SCOUT, tokens

from llama4_jax.weights.table import to_hf

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# Of each tensor's largest gradient.
GRADIENT_TOLERANCE = 1e-5


def next_token_loss(model, ids):
    """Mean cross entropy in nats of every next token."""
    return optax.softmax_cross_entropy_with_integer_labels(model(ids)[:, :-1], ids[:, 1:]).mean()


@functools.cache
def loss_and_gradients(case, scan_layers: bool):
    model = ours.model(case, scan_layers=scan_layers)
    graphdef, state = nnx.split(model)
    value_and_grad = jax.jit(jax.value_and_grad(lambda state, ids: next_token_loss(nnx.merge(graphdef, state), ids)))
    loss, grads = value_and_grad(state, jnp.asarray(tokens(case), jnp.int32))
    return float(loss), dict(to_hf(model.config, ours.by_name(model, grads)))


def assert_gradients_equal(mine, theirs):
    assert sorted(mine) == sorted(theirs)
    wrong = {}
    for name, expected in theirs.items():
        assert np.abs(expected).max() > 1e-6, f"{name} gets no gradient: nothing is compared"
        error = np.abs(mine[name] - expected).max() / np.abs(expected).max()
        if not error <= GRADIENT_TOLERANCE:
            wrong[name] = error
    assert not wrong


@every_case
def test_loss_equals_torchs(case):
    assert loss_and_gradients(case, False)[0] == pytest.approx(hf.step(case).loss, rel=5e-7)


@every_case
def test_the_gradient_of_every_tensor_equals_torchs(case):
    assert_gradients_equal(loss_and_gradients(case, False)[1], hf.step(case).grads)


@pytest.mark.parametrize("case", [MAVERICK, CASES[2]], ids=lambda case: case.name)
def test_gradients_through_scanned_layers_equal_torchs(case):
    assert_gradients_equal(loss_and_gradients(case, True)[1], hf.step(case).grads)


def twenty_steps(case) -> tuple[list[float], list[float]]:
    """The losses of 20 steps of AdamW on four batches in turn: ours and torch's."""
    steps, lr, betas, eps, decay = 20, 3e-3, (0.9, 0.95), 1e-8, 0.1
    batches = [tokens(case, seed=step % 4) for step in range(steps)]
    theirs, _ = hf.reference(case).adamw(batches, lr=lr, betas=betas, eps=eps, decay=decay)

    graphdef, state = nnx.split(ours.model(case, scan_layers=True))
    optimizer = optax.adamw(lr, b1=betas[0], b2=betas[1], eps=eps, weight_decay=decay)

    @jax.jit
    def train(state, moments, ids):
        loss, grads = jax.value_and_grad(lambda state: next_token_loss(nnx.merge(graphdef, state), ids))(state)
        updates, moments = optimizer.update(grads, moments, state)
        return optax.apply_updates(state, updates), moments, loss

    mine, moments = [], optimizer.init(state)
    for ids in batches:
        state, moments, loss = train(state, moments, jnp.asarray(ids, jnp.int32))
        mine.append(float(loss))
    return mine, theirs


@pytest.mark.parametrize("case", [SCOUT, MAVERICK], ids=lambda case: case.name)
def test_twenty_steps_of_adamw_follow_torchs_loss_curve(case):
    mine, theirs = twenty_steps(case)
    assert theirs[-1] < theirs[3] - 0.5  # it learns
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)

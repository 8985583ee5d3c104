"""Balancing: the formulas, which way they push, and that the loss-free bias evens out a skewed router."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.model.moe import RouterStats, router_stats
from llama4_jax.train.balance import BalanceConfig, balance_loss, balance_metrics, moved_bias


def random_stats(layers=3, experts=5, seed=0) -> RouterStats:
    draw = np.random.default_rng(seed)
    probabilities = draw.dirichlet(np.ones(experts), layers)
    return RouterStats(
        counts=jnp.asarray(draw.integers(0, 50, (layers, experts)), jnp.float32),
        probabilities=jnp.asarray(probabilities, jnp.float32),
        z=jnp.asarray(draw.random(layers), jnp.float32),
        gate=jnp.asarray(draw.random(layers), jnp.float32),
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_mean_over_layers_of_the_two_formulas(seed):
    stats = random_stats(seed=seed)
    expected = 0.0
    for counts, probabilities, z in zip(*(np.asarray(x, np.float64) for x in stats[:3]), strict=True):
        switch = len(counts) * sum(f * p for f, p in zip(counts / counts.sum(), probabilities, strict=True))
        expected += (0.3 * switch + 0.7 * z) / 3
    np.testing.assert_allclose(balance_loss(stats, BalanceConfig(switch=0.3, z=0.7)), expected, rtol=1e-6)


def test_even_use_gives_a_switch_loss_of_one_and_what_is_off_gives_zero():
    even = RouterStats(jnp.full((2, 4), 7.0), jnp.full((2, 4), 0.25), jnp.ones(2), jnp.ones(2))
    np.testing.assert_allclose(balance_loss(even, BalanceConfig(switch=1.0)), 1.0, rtol=1e-6)
    assert balance_loss(even, BalanceConfig()) == 0


def of_logits(logits) -> RouterStats:
    """The statistics of one layer, top 1."""
    logits = logits[None]  # one row
    chosen = jnp.argmax(logits, axis=-1, keepdims=True)
    gate = jax.nn.sigmoid(jnp.max(logits, axis=-1, keepdims=True))
    stats = router_stats(logits, chosen, gate, jnp.ones(logits.shape[:2], bool))
    return jax.tree.map(lambda x: x[None], stats)


def skewed_logits(tokens=512, experts=4) -> jax.Array:
    """Expert 0 is liked best, the last one hardly at all."""
    return jax.random.normal(jax.random.key(0), (tokens, experts)) + jnp.linspace(2.0, -2.0, experts)


def test_the_switch_loss_pushes_the_busiest_expert_down_and_the_idlest_up():
    grad = jax.grad(lambda x: balance_loss(of_logits(x), BalanceConfig(switch=1.0)))(skewed_logits()).sum(0)
    assert grad[0] > 0 > grad[-1]
    np.testing.assert_allclose(grad.sum(), 0, atol=1e-6)  # a softmax does not feel what all logits share


def test_the_z_loss_pushes_logits_towards_a_logsumexp_of_zero():
    def loss(x):
        return balance_loss(of_logits(x), BalanceConfig(z=1.0))

    assert (jax.grad(loss)(jnp.full((3, 4), 5.0)) > 0).all()
    assert (jax.grad(loss)(jnp.full((3, 4), -5.0)) < 0).all()


def test_the_bias_rises_for_idle_experts_falls_for_busy_ones_and_keeps_its_sum():
    counts = jnp.array([[10.0, 2.0, 6.0, 6.0], [0.0, 0.0, 0.0, 24.0]])
    bias = moved_bias(jnp.zeros((2, 4)), counts, 0.1)
    expected = 0.1 * np.array([[-1, 1, 0, 0], [1, 1, 1, -1]])
    np.testing.assert_allclose(bias, expected - expected.mean(-1, keepdims=True), atol=1e-7)
    np.testing.assert_allclose(moved_bias(bias, counts, 0.1).sum(-1), 0, atol=1e-6)


def test_the_bias_evens_out_a_skewed_router_without_any_gradient():
    gates = jax.nn.sigmoid(skewed_logits())

    def count(bias):
        return jnp.sum(jax.nn.one_hot(jnp.argmax(gates + bias, -1), 4), axis=0)

    def violation(bias):
        return float(balance_metrics(count(bias)[None], jnp.ones(1)).max_violation)

    bias = jnp.zeros(4)
    assert violation(bias) > 1.5
    step = jax.jit(lambda bias: moved_bias(bias, count(bias), 1e-2))
    for _ in range(150):
        bias = step(bias)
    assert violation(bias) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_their_definitions(seed):
    counts = np.random.default_rng(seed).integers(0, 1000, (3, 6)).astype(np.float64)
    counts[0, 1], counts[2, :2] = 1.0, 0.0  # almost dead, dead
    gate = np.array([0.2, 0.4, 0.9])
    violations, entropies, dead = [], [], 0
    for row in counts:
        violations.append(row.max() / row.mean() - 1)
        entropies.append(-sum(p * math.log(p) for p in row / row.sum() if p > 0) / math.log(6))
        dead += sum(row < row.mean() / 100)
    got = balance_metrics(jnp.asarray(counts, jnp.float32), jnp.asarray(gate, jnp.float32))
    expected = (np.mean(violations), max(violations), np.mean(entropies), dead / 3, gate.mean())
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_even_use_is_a_violation_of_0_an_entropy_of_1_and_no_dead_expert():
    got = balance_metrics(jnp.full((2, 8), 5.0), jnp.ones(2))
    np.testing.assert_allclose(got, (0, 0, 1, 0, 1), atol=1e-6)


def test_a_step_without_tokens_or_with_one_expert_has_finite_figures():
    for counts in (jnp.zeros((2, 4)), jnp.full((2, 1), 9.0)):
        assert np.isfinite(np.array(balance_metrics(counts, jnp.zeros(2)))).all()


@pytest.mark.parametrize("field", ["switch", "z", "bias_rate"])
def test_a_negative_coefficient_is_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"balance\.{field} must not be negative, got -0.1"):
        BalanceConfig(**{field: -0.1})

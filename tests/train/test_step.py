"""One update: accumulation is the large batch, a bad batch changes nothing, dtypes are kept, and it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import MAVERICK, SCOUT, arrays, config, gradients, largest_error, packed_batch, run, start, trainer

from llama4_jax.model.config import Precision
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.next_token import next_token
from llama4_jax.train.optimizer import OptimizerConfig, at_step


def test_gradient_accumulation_equals_the_large_batch():
    """A row at a time. Without balance losses, which each micro-batch has for itself: they are not linear in tokens.

    Parts of several rows: `test_learning_from_pictures.test_accumulation_and_remat_change_nothing_but_rounding`.
    """
    plain = config(MAVERICK, balance=BalanceConfig(bias_rate=1e-3))
    batch = packed_batch(plain)
    large, (expected,) = run(trainer(plain), [batch])
    small, (got,) = run(trainer(dataclasses.replace(plain, grad_accumulation=8)), [batch])
    assert largest_error(gradients(small), gradients(large)) < 1e-5
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(got.grad_norm, expected.grad_norm, rtol=1e-6)
    assert got.tokens == expected.tokens and got.target_bytes == expected.target_bytes
    np.testing.assert_allclose(got.balance, expected.balance, rtol=1e-5)
    for name, bias in arrays(small.bias).items():
        np.testing.assert_array_equal(bias, arrays(large.bias)[name])


def test_the_loss_and_gradient_are_means_over_the_tokens_of_documents_alone():
    """Padding weighs nothing, whatever stands in it."""
    small = config()
    batch = packed_batch(small)
    noise = np.random.default_rng(1).integers(0, small.model.vocab_size, batch.tokens.shape, dtype=np.int32)
    padding = batch.segment_ids == 0
    assert padding.any()
    noisy = batch._replace(
        tokens=np.where(padding, noise, batch.tokens), targets=np.where(padding, noise, batch.targets)
    )
    first, (expected,) = run(trainer(small), [batch])
    second, (got,) = run(trainer(small), [noisy])
    assert expected.tokens == batch.weights.sum()
    np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-6)
    assert largest_error(gradients(second), gradients(first)) < 1e-5


def scaled(model, batch, frozen):
    """The usual loss, times what is given as frozen."""
    out = next_token(model, batch)
    return out._replace(total=out.total * frozen)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_batch_changes_nothing_but_the_counters(bad):
    """At a constant rate: the schedule goes by steps, those that are left out included."""
    small = config(optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule="wsd"))
    made = trainer(small, loss=scaled)
    good, poor, other = (packed_batch(small, seed) for seed in range(3))

    def after(steps):
        with jax.set_mesh(made.mesh):
            state = start(made)
            for batch, factor in steps:
                state, metrics = made.step(state, batch, jnp.float32(factor))
        return state, metrics

    state, metrics = after([(good, 1), (poor, bad), (poor, bad)])
    assert (int(state.step), int(metrics.skipped), int(metrics.bad_steps)) == (3, 2, 2)
    state, metrics = after([(good, 1), (poor, bad), (poor, bad), (other, 1)])
    expected, _ = after([(good, 1), (other, 1)])
    assert (int(state.step), int(metrics.skipped), int(metrics.bad_steps)) == (4, 2, 0)
    state, expected = (s._replace(optimizer=at_step(s.optimizer, s.step * 0)) for s in (state, expected))
    for mine, theirs in zip(jax.tree.leaves(state[1:4]), jax.tree.leaves(expected[1:4]), strict=True):
        np.testing.assert_array_equal(mine, theirs)  # parameters, biases and the optimizer's state


def test_the_balance_bias_moves_with_a_rate_and_only_then():
    for rate in (0.0, 1e-3):
        state, _ = run(
            trainer(config(balance=BalanceConfig(bias_rate=rate, switch=1e-2, z=1e-3))), [packed_batch(config())]
        )
        biases = arrays(state.bias)
        assert biases
        for bias in biases.values():
            assert bool(np.abs(bias).max() > 0) == bool(rate)
            np.testing.assert_allclose(bias.sum(-1), 0, atol=1e-8)
            assert np.abs(bias).max() <= 2 * rate


def test_bfloat16_parameters_are_updated_in_float32_and_stay_bfloat16():
    small = config(precision=Precision(params="bfloat16", compute="bfloat16"))
    state, figures = run(trainer(small), [packed_batch(small)] * 3)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.optimizer)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert figures[-1].loss < figures[0].loss


@pytest.mark.parametrize(("model", "remat"), [(SCOUT, "none"), (MAVERICK, "full")], ids=["scout", "maverick"])
def test_a_batch_seen_again_and_again_is_learnt(model, remat):
    small = config(model, remat=remat)
    _, figures = run(trainer(small), [packed_batch(small)] * small.steps)
    assert figures[0].loss == pytest.approx(np.log(small.model.vocab_size), rel=0.1)
    assert figures[-1].loss < 0.6 * figures[0].loss


def test_the_state_is_donated_so_that_there_are_never_two():
    small = config()
    made = trainer(small)
    with jax.set_mesh(made.mesh):
        before = start(made)
        made.step(before, packed_batch(small), None)
    assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.optimizer)))


def test_after_steps_that_were_left_out_the_rate_is_that_of_the_step_and_the_logged_one_is_used():
    """The last of 2 updates and the last of 5 steps of which 3 were left out: each moves the parameters by its rate."""
    settings = OptimizerConfig(peak_lr=1e-2, warmup_steps=10, weight_decay=0.0)

    def loss(model, batch, factor):
        out = next_token(model, batch)
        return out._replace(total=out.total * factor)

    small = config(optimizer=settings, balance=BalanceConfig())
    made = trainer(small, loss=loss)
    batch, moved, logged = packed_batch(small), [], []
    for factors in ((1, 1), (1, np.nan, np.nan, np.nan, 1)):
        state = start(made)
        with jax.set_mesh(made.mesh):
            for factor in factors:
                before = {name: x.copy() for name, x in arrays(state.params).items()}  # the state is donated
                state, metrics = made.step(state, batch, np.float32(factor))
        after = arrays(state.params)
        moved.append({name: after[name] - before[name] for name in after})
        logged.append(float(metrics.learning_rate))
        assert int(state.step) == len(factors) and int(state.skipped) == len(factors) - 2
    np.testing.assert_allclose(logged, [2e-3, 5e-3], rtol=1e-6)
    for name, x in moved[0].items():
        np.testing.assert_allclose(moved[1][name], x * 2.5, rtol=2e-2, atol=3e-6, err_msg=name)

"""Schedules against their closed forms, which parameters decay, and clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llama4_jax.model.config import ModelConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.train.optimizer import OptimizerConfig, decays, learning_rate, make_optimizer

PEAK, FINAL = 2e-3, 0.1


def cosine(update: int, warmup: int, steps: int) -> float:
    """The rate of the n-th update, counted from 1 (from 0 if nothing warms up)."""
    if update < warmup:
        return PEAK * update / warmup
    done = min(1.0, (update - warmup) / max(1, steps - warmup))
    return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)


def wsd(update: int, warmup: int, steps: int, decay: int) -> float:
    if update < warmup:
        return PEAK * update / warmup
    falling = min(1.0, max(0.0, (update - (steps - decay)) / decay))
    return PEAK * (1 - falling * (1 - FINAL))


def config(**fields) -> OptimizerConfig:
    return OptimizerConfig(**{"peak_lr": PEAK, "final_lr_fraction": FINAL, **fields})


@pytest.mark.parametrize(("warmup", "steps"), [(10, 50), (1, 7), (0, 20), (20, 20), (100, 20)])
def test_the_cosine_schedule_is_its_closed_form(warmup, steps):
    schedule = learning_rate(config(warmup_steps=warmup), steps)
    first = 1 if warmup else 0
    expected = [cosine(step + first, min(warmup, steps), steps) for step in range(steps)]
    np.testing.assert_allclose([schedule(step) for step in range(steps)], expected, rtol=2e-6)


@pytest.mark.parametrize(("warmup", "steps", "decay"), [(10, 50, 0.2), (0, 20, 0.5), (5, 20, 1.0), (4, 12, 0.0)])
def test_warmup_stable_decay_is_its_closed_form(warmup, steps, decay):
    schedule = learning_rate(config(schedule="wsd", warmup_steps=warmup, decay_fraction=decay), steps)
    length = max(1, min(round(decay * steps), steps - warmup))
    first = 1 if warmup else 0
    expected = [wsd(step + first, warmup, steps, length) for step in range(steps)]
    np.testing.assert_allclose([schedule(step) for step in range(steps)], expected, rtol=2e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 1000])
def test_no_update_is_lost_to_a_rate_of_zero_and_none_exceeds_the_peak(schedule, warmup):
    rates = np.array([learning_rate(config(schedule=schedule, warmup_steps=warmup), 30)(i) for i in range(30)])
    assert (rates > 0).all() and (rates <= PEAK * 1.000001).all()


def test_matrices_decay_and_norms_and_softmax_scales_do_not():
    model = Llama4(
        ModelConfig(
            vocab_size=20, embed_dim=8, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8,
            expert_mlp_dim=8, num_experts=2, nope_interval=2, moe_interval=2, query_scale="ssmax_bias",
        )
    )  # fmt: skip
    params = nnx.state(model, nnx.Param)
    mask = {
        jax.tree_util.keystr(path, simple=True, separator="."): bool(value)
        for path, value in jax.tree_util.tree_flatten_with_path(decays(params))[0]
    }
    small = {name for name in mask if "norm" in name or "query_scale" in name or "ssmax" in name}
    assert sum("norm" in name for name in small) >= 3  # two of each layer, stacked to [layers, D] by the scan; the last
    assert len(small) > sum("norm" in name for name in small)  # and the scales of scalable softmax
    for name, value in mask.items():
        assert value == (name not in small), name
    stacked = [v for v in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable)) if "layers" in v.axes]
    assert any(v.get_value().ndim == 2 and set(v.axes) == {"layers", "norm"} for v in stacked)


def test_decay_pulls_only_what_decays():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    for name, axes in {"kernel": ("embed", "mlp"), "bias": ("norm",)}.items():
        params[name] = nnx.Param(jnp.ones_like(params[name][...]), axes=axes, eager_sharding=False)
    optimizer = make_optimizer(config(warmup_steps=0, weight_decay=0.5), steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"][...], -PEAK * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"][...], 0.0)


def test_a_long_gradient_is_scaled_to_the_clip_norm_and_a_short_one_is_left():
    """Adam forgets the length of a constant gradient, so it is read from the first moment, (1 - b1) g."""
    optimizer = make_optimizer(config(clip_norm=1.0, b1=0.9), steps=10)
    params = nnx.State({"w": nnx.Param(jnp.zeros((2, 2)), axes=("embed", "mlp"), eager_sharding=False)})
    for length, expected in ((10.0, 1.0), (0.5, 0.5)):
        grads = jax.tree.map(lambda x, length=length: jnp.full_like(x, length / 2), params)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
        np.testing.assert_allclose(optax.tree.norm(adam.mu), 0.1 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("peak_lr", 0.0), ("eps", -1.0), ("clip_norm", 0.0), ("warmup_steps", -1), ("weight_decay", -0.1), ("b1", 1.0),
     ("b2", -0.1), ("decay_fraction", 1.5), ("final_lr_fraction", -0.1)],
)  # fmt: skip
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"optimizer\.{field} .*got {value}"):
        OptimizerConfig(**{field: value})

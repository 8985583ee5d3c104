"""Routing: who is chosen, what padding costs, what the statistics say, and that nothing is dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.moe import MoE
from llama4_jax.ops.experts import combine, dispatch, sort_by_expert


def make_moe(top_k=1, num_experts=4, router_bias=False) -> MoE:
    config = ModelConfig(
        vocab_size=10, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=8,
        expert_mlp_dim=12, num_experts=num_experts, top_k=top_k, router_bias=router_bias, init_std=0.3,
    )  # fmt: skip
    return MoE(config, Precision(), rngs=nnx.Rngs(params=0))


run = jax.jit(lambda moe, x, valid: moe(x, valid))


def obvious(moe: MoE, x: np.ndarray) -> np.ndarray:
    """Token by token and expert by expert, in float64."""
    router, gate_up, down = (np.asarray(p[...], np.float64) for p in (moe.router.kernel, moe.gate_up, moe.down))
    shared_in, shared_out = (np.asarray(p.kernel[...], np.float64) for p in (moe.shared.gate_up, moe.shared.down))

    def swiglu(x, w_in, w_out):
        gate, up = x @ w_in[:, 0], x @ w_in[:, 1]
        return (gate / (1 + np.exp(-gate)) * up) @ w_out

    out = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:2]):
        token = x[index].astype(np.float64)
        logits = token @ router
        out[index] = swiglu(token, shared_in, shared_out)
        for expert in np.argsort(-logits)[: moe.top_k]:
            w_in = gate_up[expert].swapaxes(0, 1)
            out[index] += swiglu(token / (1 + np.exp(-logits[expert])), w_in, down[expert])
    return out


@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 4), (2, 4), (3, 3), (1, 1), (1, 64)])
def test_the_sorted_experts_equal_the_obvious_loop(top_k, num_experts):
    moe = make_moe(top_k, num_experts)
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    out, stats = run(moe, x, None)
    np.testing.assert_allclose(out, obvious(moe, np.asarray(x)), atol=2e-5)
    assert stats.counts.sum() == 2 * 9 * top_k  # nothing is dropped


def test_every_token_on_one_expert_is_still_computed():
    moe = make_moe()
    moe.router.kernel[...] = jnp.zeros((16, 4)).at[:, 2].set(1.0)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (2, 9, 16)))
    out, stats = run(moe, x, None)
    np.testing.assert_array_equal(stats.counts, [0, 0, 18, 0])
    np.testing.assert_allclose(out, obvious(moe, np.asarray(x)), atol=2e-5)


def test_padding_is_neither_computed_nor_counted():
    moe = make_moe(top_k=2)
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    valid = jnp.arange(9) < jnp.array([[9], [4]])
    out, stats = run(moe, x.at[1, 4:].set(1e6), valid)
    alone, alone_stats = run(moe, x[1:, :4], None)
    np.testing.assert_allclose(out[1, :4], alone[0], atol=1e-5)
    _, first_stats = run(moe, x[:1], None)
    np.testing.assert_array_equal(stats.counts, first_stats.counts + alone_stats.counts)
    for name in ("probabilities", "z", "gate"):
        mean = (9 * getattr(first_stats, name) + 4 * getattr(alone_stats, name)) / 13
        np.testing.assert_allclose(getattr(stats, name), mean, rtol=1e-5)


def test_the_balance_bias_decides_who_is_chosen_but_not_how_much_they_count():
    moe = make_moe(router_bias=True)
    logits = jnp.array([[[1.0, 0.9, -2.0, 0.0]]])
    expert, gate = moe.choose(logits)
    assert expert.tolist() == [[[0]]]
    moe.bias[...] = jnp.array([0.0, 0.5, 0.0, 0.0])
    expert, gate = moe.choose(logits)
    assert expert.tolist() == [[[1]]]
    np.testing.assert_allclose(gate, jax.nn.sigmoid(jnp.array([[[0.9]]])))


def test_gates_are_not_normalised_so_the_router_learns_with_one_expert():
    moe = make_moe()
    graphdef, params = nnx.split(moe)
    x = jax.random.normal(jax.random.key(1), (1, 9, 16))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x, None)[0] ** 2)))(params)
    assert float(jnp.abs(grads["router"]["kernel"][...]).max()) > 1e-3


def test_dispatch_and_combine_are_each_others_transposes():
    key = jax.random.key(0)
    expert = jax.random.randint(key, (7, 2), 0, 3)
    routing = sort_by_expert(expert, jnp.ones((7, 2)), 3)
    rows, y = jax.random.normal(key, (7, 4)), jax.random.normal(key, (14, 4))
    np.testing.assert_allclose(jnp.vdot(dispatch(rows, routing), y), jnp.vdot(rows, combine(y, routing)), rtol=1e-5)
    for function, x in ((dispatch, rows), (combine, y)):
        plain = {dispatch: lambda x: x[routing.token], combine: lambda x: x[routing.sorted_at].sum(1)}[function]
        ours = jax.grad(lambda x, f=function: jnp.sum(jnp.sin(f(x, routing))))(x)
        np.testing.assert_allclose(ours, jax.grad(lambda x, f=plain: jnp.sum(jnp.sin(f(x))))(x), atol=1e-6)


@pytest.mark.parametrize("nobody", [3, -1, 7])
def test_choices_are_sorted_by_expert_and_those_of_none_come_last(nobody):
    expert = jnp.array([[2], [0], [nobody], [0]])
    routing = sort_by_expert(expert, jnp.arange(4.0)[:, None], 3)
    assert routing.token.tolist() == [1, 3, 0, 2]
    assert routing.gate.tolist() == [1, 3, 0, 2]
    assert routing.group_sizes.tolist() == [2, 0, 1]
    assert routing.sorted_at[:, 0].tolist() == [2, 0, 3, 1]

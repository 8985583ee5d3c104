"""With the reference operations a loss is differentiated forwards and twice, and gives what differences give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llama4_jax
from llama4_jax import Llama4, ModelConfig
from llama4_jax.ops.cross_entropy import linear_cross_entropy

CONFIG = ModelConfig(
    vocab_size=40, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, expert_mlp_dim=16,
    num_experts=2, moe_interval=2, attention_chunk=8, context_length=64, nope_interval=2, init_std=0.1,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 13), 0, 40)
REFERENCE = {"attention": "reference", "experts": "reference"}


def loss_of(**how):
    graphdef, params = nnx.split(Llama4(CONFIG, **how))

    def loss(params):
        model = nnx.merge(graphdef, params)
        hidden, _ = model.hidden(TOKENS[:, :-1])
        weights = jnp.ones(TOKENS[:, 1:].shape)
        return linear_cross_entropy(hidden, model.lm_head.kernel[...], TOKENS[:, 1:], weights)[0] / weights.size

    return loss, params


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_jvp_and_both_hessian_vector_products_are_what_differences_of_gradients_give():
    fast, _ = loss_of()
    reference, params = loss_of(**REFERENCE)

    def slow(params):
        with llama4_jax.ops.plain():
            return reference(params)

    keys = iter(jax.random.split(jax.random.key(1), 100))
    v = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), params)
    at = lambda s: jax.tree.map(lambda p, d: p + s * d, params, v)  # noqa: E731

    @jax.jit
    def everything(params):
        over_reverse = jax.jvp(jax.grad(slow), (params,), (v,))[1]
        twice = jax.grad(lambda p: dot(jax.grad(slow)(p), v))(params)
        return jax.jvp(slow, (params,), (v,))[1], over_reverse, twice

    gradient = jax.jit(jax.grad(fast))
    along, over_reverse, twice = everything(params)
    np.testing.assert_allclose(along, dot(gradient(params), v), rtol=1e-4)
    size = float(jnp.sqrt(dot(twice, twice)))
    apart = lambda a, b: float(jnp.sqrt(dot(d := jax.tree.map(jnp.subtract, a, b), d))) / size  # noqa: E731
    step = 1e-3  # a larger one lets a token choose another expert, which is no derivative
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * step), gradient(at(step)), gradient(at(-step)))
    assert size > 0.01
    assert apart(over_reverse, twice) < 1e-5
    assert apart(differences, twice) < 5e-4


def test_the_reference_operations_give_the_fast_ones_numbers():
    fast, params = loss_of()
    slow, _ = loss_of(**REFERENCE)
    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(params) for f in (fast, slow))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), da, db)


@pytest.mark.parametrize("layers", [2, 4])
def test_the_error_of_the_fast_operations_says_what_to_switch_on(layers):
    graphdef, params = nnx.split(Llama4(dataclasses.replace(CONFIG, num_layers=layers)))
    with pytest.raises(TypeError, match=r'attention="reference", experts="reference"'):
        jax.jvp(lambda p: nnx.merge(graphdef, p)(TOKENS).sum(), (params,), (params,))

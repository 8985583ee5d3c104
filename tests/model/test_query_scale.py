"""Temperature and scalable softmax, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.model.config import ModelConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.query_scale import ScalableSoftmax, num_visible, scale_query, temperature


def test_temperature_has_the_values_of_the_paper_table():
    positions = jnp.array([[0, 8190, 8191, 16383, 131071, 262143, 999_999, 9_999_999]])
    expected = [1.0, 1.0, 1.0693, 1.1099, 1.2833, 1.3497, 1.4812, 1.7107]
    np.testing.assert_allclose(temperature(positions, floor=8192, coef=0.1)[0], expected, atol=5e-5)
    assert float(temperature(jnp.array([[8190]]), floor=8192, coef=0.1)[0, 0]) == 1.0


def test_every_position_of_a_quarter_million_falls_into_its_own_bucket():
    """A peer casts positions to bfloat16 and gets 10 896 of these wrong."""
    positions = np.arange(262_144)
    exact = 1 + 0.1 * np.log((positions + 1) // 8192 + 1)
    np.testing.assert_allclose(temperature(jnp.array(positions)[None], floor=8192, coef=0.1)[0], exact, atol=3e-7)


def test_the_visible_keys_are_counted_within_the_chunk():
    np.testing.assert_array_equal(num_visible(jnp.arange(7)[None], 3), [[1, 2, 3, 1, 2, 3, 1]])
    np.testing.assert_array_equal(num_visible(jnp.arange(4)[None], None), [[1, 2, 3, 4]])


@pytest.mark.parametrize("length", [1024, 2048, 8192])
def test_the_initial_scale_averages_to_one_over_the_training_length(length):
    s = ScalableSoftmax(2, length=length, bias=False).s[...]
    np.testing.assert_allclose(s * np.mean(np.log(np.arange(1, length + 1))), 1.0, rtol=1e-6)


def test_softmax_fades_with_length_where_scalable_softmax_does_not():
    """Fig. 1 of the paper: inputs of -2 and one of +3, s = 0.43."""
    for n, plain, scaled in [(16, 0.908, 0.963), (256, 0.368, 0.998), (65536, 0.0023, 1.000)]:
        z = jnp.full((n,), -2.0).at[0].set(3.0)
        assert float(jax.nn.softmax(z)[0]) == pytest.approx(plain, abs=1e-3)
        assert float(jax.nn.softmax(0.43 * jnp.log(n) * z)[0]) == pytest.approx(scaled, abs=1e-3)


@pytest.mark.parametrize("chunk", [None, 5])
def test_scaling_the_query_equals_the_definition_in_values_and_gradients(chunk):
    heads, length, dim = 3, 12, 8
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, heads, length, dim))
    positions = jnp.arange(length)[None]
    mask = positions[0, :, None] >= positions[0]
    if chunk is not None:
        mask &= positions[0, :, None] // chunk == positions[0] // chunk
    graphdef, state = nnx.split(ScalableSoftmax(heads, length=length, bias=False))
    s = jnp.array([0.2, 0.5, 0.9])

    def by_query(s, q):
        module = nnx.merge(graphdef, jax.tree.map(lambda _: s, state))
        scaled = scale_query(q, module(num_visible(positions, chunk)))
        scores = jnp.where(mask, jnp.einsum("BNTH,BNSH->BNTS", scaled, k) * dim**-0.5, -jnp.inf)
        return jnp.einsum("BNTS,BNSH->BNTH", jax.nn.softmax(scores), v)

    def by_definition(s, q):
        z = jnp.einsum("BNTH,BNSH->BNTS", q, k) * dim**-0.5
        n = jnp.sum(mask, axis=-1)[None, None, :, None].astype(jnp.float32)
        powers = jnp.where(mask, n ** (s[None, :, None, None] * z), 0.0)
        return jnp.einsum("BNTS,BNSH->BNTH", powers / powers.sum(-1, keepdims=True), v)

    np.testing.assert_allclose(by_query(s, q), by_definition(s, q), atol=1e-6)
    ours, theirs = (
        jax.grad(lambda s, q, f=f: jnp.sum(jnp.sin(f(s, q))), (0, 1))(s, q) for f in (by_query, by_definition)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("kind", ["ssmax", "ssmax_bias"])
def test_training_prefill_and_decode_scale_alike(kind):
    config = ModelConfig(
        vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
        expert_mlp_dim=24, moe_interval=0, nope_interval=2, attention_chunk=5, query_scale=kind,
        query_scale_layers="all", context_length=32, init_std=0.08,
    )  # fmt: skip
    model = Llama4(config, scan_layers=False)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and path[-1] in ("s", "b"):
            variable[...] = jax.random.uniform(jax.random.key(len(path)), variable.shape, minval=0.2, maxval=0.9)
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 50)
    whole, _ = jax.jit(model.hidden)(tokens)
    step = jax.jit(model.step)
    prefill, cache = step(tokens[:, :6], model.empty_cache(2, 16))
    steps = [prefill]
    for t in range(6, 13):
        hidden, cache = step(tokens[:, t : t + 1], cache)
        steps.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=2e-5)

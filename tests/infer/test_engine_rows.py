"""How a row's next token is chosen, against numpy; and that rows do not feel one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.infer.rows import BIASES, NOTHING, STOPS, Settings, advanced, choose
from llama4_jax.infer.sampling import make_sampling, row_keys, sample

V = 40
jitted = jax.jit(choose)


def settings(**said) -> Settings:
    ids, bias = np.full((BIASES,), NOTHING, np.int32), np.zeros((BIASES,), np.float32)
    for i, (token, value) in enumerate(said.pop("bias", {}).items()):
        ids[i], bias[i] = token, value
    stops = np.full((STOPS,), NOTHING, np.int32)
    given = {
        "seed": 0,
        "temperature": 0,
        "top_k": V,
        "top_p": 1,
        "frequency": 0,
        "presence": 0,
        "left": 9,
        "wants_top": 0,
    }
    types = {"seed": np.uint32, "top_k": np.int32, "left": np.int32, "wants_top": np.bool_}
    numbers = {name: types.get(name, np.float32)(value) for name, value in (given | said).items()}
    return Settings(**numbers, bias_ids=ids, bias=bias, stops=stops)


def rows_of(*each: Settings, counts=None):
    rows = jax.tree.map(lambda *x: jnp.stack(x), *[one.row(V) for one in each])
    return rows if counts is None else rows._replace(counts=jnp.asarray(counts, jnp.int16))


def logits(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 3)


KINDS = [
    {}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.3, "top_k": 4}, {"temperature": 0.7, "top_p": 0.6},
    {"frequency": 1.5, "presence": 0.5}, {"bias": {3: 100.0}}, {"wants_top": 1},
    {"temperature": 2.0, "bias": {7: -100.0}},
]  # fmt: skip


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_row_does_not_feel_what_others_want(kind):
    x, counts = logits(len(KINDS)), np.random.default_rng(1).integers(0, 3, (len(KINDS), V))
    together = jitted(x, rows_of(*[settings(**said) for said in KINDS], counts=counts))
    plain = [settings(**KINDS[i]) if i == kind else settings() for i in range(len(KINDS))]
    alone = jitted(x, rows_of(*plain, counts=counts))
    assert together.token[kind] == alone.token[kind] and together.logprob[kind] == alone.logprob[kind]


@pytest.mark.parametrize(
    "said", [{}, {"temperature": 0.8}, {"temperature": 1.2, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_draws_are_those_of_generate(said):
    """Row 0 of a batch with the seed of the request."""
    x = logits(1)
    how = make_sampling(**{name: value for name, value in said.items() if name != "seed"})
    for drawn in range(20):
        rows = rows_of(settings(**{**said, "seed": 11}))._replace(drawn=jnp.array([drawn]))
        assert jitted(x, rows).token[0] == sample(x, how, row_keys(11, 1), drawn)[0]


def test_penalties_and_biases_move_logits_and_the_log_probabilities_are_the_models_own():
    x, counts = np.asarray(logits(3)), np.zeros((3, V), int)
    counts[0, :5], counts[1, :] = [3, 0, 1, 7, 0], 1
    rows = rows_of(
        settings(frequency=0.9, presence=0.4), settings(bias={2: 50.0, 5: -9.0}), settings(wants_top=1), counts=counts
    )
    got = jitted(jnp.asarray(x), rows)
    moved = x.copy()
    moved[0] -= 0.9 * counts[0] + 0.4 * (counts[0] > 0)
    moved[1, 2] += 50
    moved[1, 5] -= 9
    assert got.token.tolist() == moved.argmax(-1).tolist()
    logprobs = x - np.log(np.exp(x.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(got.logprob, logprobs[np.arange(3), moved.argmax(-1)], atol=1e-5)
    best = np.argsort(-logprobs[2])[:20]
    assert got.top[2].tolist() == best.tolist()
    np.testing.assert_allclose(got.top_logprobs[2], logprobs[2][best], atol=1e-5)


def test_a_mask_leaves_nothing_else():
    allowed = [{1, 31, 32, 39}, {39}]
    mask = np.zeros((2, 2), np.uint32)
    for row, ids in enumerate(allowed):
        for i in ids:
            mask[row, i // 32] |= np.uint32(1 << (i % 32))
    for temperature in (0.0, 5.0):
        for seed in range(10):
            rows = rows_of(*[settings(temperature=temperature, seed=seed)] * 2)
            tokens = jitted(logits(2, seed), rows, jnp.asarray(mask)).token.tolist()
            assert tokens[0] in allowed[0] and tokens[1] == 39


def test_a_row_ends_by_a_stop_id_or_when_nothing_is_left():
    rows = rows_of(settings(left=2), settings(), settings(left=1))
    rows = rows._replace(stops=rows.stops.at[1, 3].set(7), active=jnp.ones(3, bool))
    choice = jitted(logits(3), rows)._replace(token=jnp.array([7, 7, 1]))
    after = advanced(rows, choice, jnp.array([True, True, True]))
    assert after.active.tolist() == [True, False, False] and after.counts[0, 7] == 1 and after.drawn.tolist() == [1] * 3
    still = advanced(after, choice, jnp.array([False, False, False]))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), still, after))

"""How a row's next token is chosen, against numpy; and that rows do not feel one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.infer.rows import advanced, choose, settings_of

V = 40
jitted = jax.jit(choose)


def rows_of(*each: dict, counts=None):
    rows = jax.tree.map(
        lambda *x: jnp.stack(x), *[settings_of(V, **{"max_new_tokens": 9} | said).row(V) for said in each]
    )
    return rows if counts is None else rows._replace(counts=jnp.asarray(counts, jnp.int16))


def logits(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 3)


KINDS = [
    {}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.3, "top_k": 4}, {"temperature": 0.7, "top_p": 0.6},
    {"frequency_penalty": 1.5, "presence_penalty": 0.5}, {"logit_bias": {3: 100.0}}, {"wants_top": True},
    {"temperature": 2.0, "logit_bias": {7: -100.0}},
]  # fmt: skip


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_row_does_not_feel_what_others_want(kind):
    x, counts = logits(len(KINDS)), np.random.default_rng(1).integers(0, 3, (len(KINDS), V))
    together = jitted(x, rows_of(*[said for said in KINDS], counts=counts))
    plain = [KINDS[i] if i == kind else {} for i in range(len(KINDS))]
    alone = jitted(x, rows_of(*plain, counts=counts))
    assert together.token[kind] == alone.token[kind] and together.logprob[kind] == alone.logprob[kind]


def test_penalties_and_biases_move_logits_and_the_log_probabilities_are_the_models_own():
    x, counts = np.asarray(logits(3)), np.zeros((3, V), int)
    counts[0, :5], counts[1, :] = [3, 0, 1, 7, 0], 1
    rows = rows_of(
        {"frequency_penalty": 0.9, "presence_penalty": 0.4},
        {"logit_bias": {2: 50.0, 5: -9.0}},
        {"wants_top": True},
        counts=counts,
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
            rows = rows_of(*[{"temperature": temperature, "seed": seed}] * 2)
            tokens = jitted(logits(2, seed), rows, jnp.asarray(mask)).token.tolist()
            assert tokens[0] in allowed[0] and tokens[1] == 39


def test_a_row_ends_by_a_stop_id_or_when_nothing_is_left():
    rows = rows_of({"max_new_tokens": 2}, {}, {"max_new_tokens": 1})
    rows = rows._replace(stops=rows.stops.at[1, 3].set(7), active=jnp.ones(3, bool))
    choice = jitted(logits(3), rows)._replace(token=jnp.array([7, 7, 1]))
    after = advanced(rows, choice, jnp.array([True, True, True]))
    assert after.active.tolist() == [True, False, False] and after.counts[0, 7] == 1 and after.drawn.tolist() == [1] * 3
    still = advanced(after, choice, jnp.array([False, False, False]))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), still, after))

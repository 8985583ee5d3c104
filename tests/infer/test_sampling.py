"""Tokens are drawn from exactly the distribution that temperature, top-k and top-p leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llama4_jax.infer.rows import Row, choose, filtered, rows_of, settings_of, stacked
from llama4_jax.infer.sampling import check_sampling, draw

jitted_choose, jitted_filtered = jax.jit(choose), jax.jit(filtered)


def rows(count: int, vocab: int, drawn: int = 0, **how) -> Row:
    """As many, which draw one stream after another of a seed's random numbers."""
    each = [settings_of(vocab, stream=row, plain=True, **how) for row in range(count)]
    return rows_of(stacked(each), vocab)._replace(drawn=jnp.full((count,), drawn))


def sample(logits: jax.Array, drawn: int = 0, **how) -> np.ndarray:
    return np.asarray(jitted_choose(logits, rows(*logits.shape, drawn, **how)).token)


def left(logits: jax.Array, **how) -> np.ndarray:
    return np.asarray(jitted_filtered(logits, rows(*logits.shape, **how)))


def logits_of(rows: int, vocab: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(3 * np.random.default_rng(seed).standard_normal((rows, vocab)), jnp.float32)


def test_temperature_zero_takes_the_most_likely_token_whatever_the_filters():
    logits = logits_of(4, 1000)
    for how in ({}, {"temperature": 0.0, "top_k": 5, "top_p": 0.3}):
        np.testing.assert_array_equal(sample(logits, **how), logits.argmax(-1))


@settings(max_examples=30, deadline=None)
@given(
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 5, 200, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 100),
)
def test_the_same_tokens_are_left_as_in_transformers(temperature, top_k, top_p, seed):
    logits = logits_of(3, 200, seed)
    ours = left(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    theirs += [] if top_k is None else [TopKLogitsWarper(top_k)]
    theirs += [] if top_p == 1 else [TopPLogitsWarper(top_p)]
    expected = theirs(None, torch.tensor(np.asarray(logits))).numpy()
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
    np.testing.assert_allclose(jax.nn.softmax(ours), jax.nn.softmax(expected), atol=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = np.array([[0.1, 0.5, 0.05, 0.3, 0.05]], np.float32)
    for top_p, kept in ((0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.81, [0, 1, 3]), (0.9, [0, 1, 3])):
        found = left(jnp.log(probabilities), temperature=1.0, top_p=top_p - 1e-6)
        assert np.flatnonzero(np.isfinite(found[0])).tolist() == kept, top_p


def test_ties_with_the_last_token_kept_are_kept():
    found = left(jnp.array([[2.0, 1.0, 1.0, 0.0, 1.0]]), temperature=1.0, top_k=2)
    assert np.isfinite(found[0]).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8}])
def test_frequencies_are_the_probabilities(settings):
    """Pearson's χ² of 20 000 draws, one a row; 12 tokens, so at most 11 degrees of freedom."""
    draws = 20_000
    logits = logits_of(1, 12, seed=1) / 2
    drawn = sample(jnp.repeat(logits, draws, axis=0), 3, temperature=0.8, seed=7, **settings)
    expected = draws * np.asarray(jax.nn.softmax(left(logits, temperature=0.8, **settings)))[0]
    counts = np.bincount(drawn, minlength=12)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    chi2 = np.sum((counts[likely] - expected[likely]) ** 2 / expected[likely])
    assert chi2 < 31.3  # 99.9th percentile for 11


def test_what_a_row_draws_depends_on_seed_row_and_step_alone():
    logits = logits_of(1, 500).repeat(6, axis=0)

    def steps(count: int, seed: int) -> np.ndarray:
        return np.stack([sample(logits[:count], step, temperature=1.0, seed=seed) for step in range(20)])

    six = steps(6, seed=0)
    np.testing.assert_array_equal(steps(2, seed=0), six[:, :2])
    for other in (six[:, 1], six[::-1, 0], steps(1, seed=1)[:, 0]):  # another row, another order, another seed
        assert np.mean(other == six[:, 0]) < 0.3


def test_a_large_vocabulary_is_drawn_from_evenly():
    """Over blocks and within them: 4 000 draws among 1 500 equal tokens spread over 202 048."""
    vocab = 202_048
    chosen = np.random.default_rng(0).choice(vocab, 1500, replace=False)
    probabilities = np.zeros((1, vocab), np.float32)
    probabilities[0, chosen] = 1 / 1500
    u = 1 - np.random.default_rng(1).random(4000, np.float32)
    drawn = jax.jit(jax.vmap(lambda u: draw(jnp.asarray(probabilities), u[None])[0]))(u)
    assert set(np.unique(drawn)) <= set(chosen)
    counts = np.bincount(np.searchsorted(np.sort(chosen), drawn), minlength=1500)
    assert np.sum((counts - 4000 / 1500) ** 2) / (4000 / 1500) < 1499 + 3.1 * np.sqrt(2 * 1499)


jitted_draw = jax.jit(draw)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 40, 512, 1200]), st.integers(0, 1000), st.sampled_from([1e-7, 0.5, 1.0]))
def test_a_token_of_probability_zero_is_never_drawn(vocab, seed, u):
    rng = np.random.default_rng(seed)
    weights = rng.random((1, vocab)).astype(np.float32) * (rng.random((1, vocab)) < 0.01)
    weights[0, rng.integers(vocab)] = 1e-6
    drawn = int(jitted_draw(jnp.asarray(weights / weights.sum()), jnp.array([u], jnp.float32))[0])
    assert weights[0, drawn] > 0


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": t} for t in (1e-6, 1e-29, 1e-31, 1e-38, 1e-40, 5e-324)),
        *({"temperature": 1.0, "top_p": p} for p in (1e-6, 1e-38, 1e-40, 1e-46, 5e-324)),
        {"temperature": 1e-6, "top_p": 1e-46, "top_k": 2**31 - 1},
    ],
)  # fmt: skip
def test_numbers_too_small_for_a_float32_take_the_most_likely_token(settings):
    logits = logits_of(4, 1000) * 8
    for seed in range(3):
        np.testing.assert_array_equal(sample(logits, seed=seed, **settings), logits.argmax(-1))


def test_numbers_at_the_other_end_of_their_range_draw_from_all_tokens():
    logits = logits_of(1, 50)
    assert settings_of(50, temperature=1.0, top_p=1 - 1e-12).top_p == 1
    drawn = {int(sample(logits, temperature=3e38, seed=seed)[0]) for seed in range(40)}
    assert len(drawn) > 15


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "seed", "max_new_tokens"])
@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), -1, 2**31, 10**400, 1e39, True, np.True_, "0.7", b"1", [], {}, 1j,
     np.ones(2)],
    ids=lambda value: f"{value!r:.12}",
)  # fmt: skip
def test_what_is_no_number_in_range_is_one_short_error_that_names_it(name, value):
    if name == "temperature" and type(value) is int and value == 2**31:
        return  # a temperature like any other
    with pytest.raises(ValueError, match=f"^{name} must be ") as error:
        check_sampling(**{name: value})
    assert len(str(error.value)) < 200


def test_numbers_of_every_kind_are_numbers():
    for kind in (int, np.int32, np.uint8, np.int64, jnp.int32):
        check_sampling(top_k=kind(3), seed=kind(3), max_new_tokens=kind(3), temperature=kind(1), top_p=kind(1))
    for kind in (float, np.float32, np.float64, np.float16, jnp.float32, jnp.bfloat16):
        check_sampling(temperature=kind(0.5), top_p=kind(0.5))


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"temperature must be 0 .* or a positive number, got -0.5"):
        check_sampling(temperature=-0.5)
    with pytest.raises(ValueError, match="temperature must be .* got nan"):
        check_sampling(temperature=float("nan"))
    with pytest.raises(ValueError, match="top_k must be at least 1, or None to consider every token, got 0"):
        check_sampling(temperature=1.0, top_k=0)
    for top_p in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"top_p must be above 0 and at most 1 \(every token\), got {top_p}"):
            check_sampling(temperature=1.0, top_p=top_p)

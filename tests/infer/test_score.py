"""Scores are the model's own: the negative logarithm of the softmax of its logits."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from oracles import ours
from oracles.cases import SCOUT, tokens

from llama4_jax.infer.score import Span, bits_per_byte, by_position, score
from llama4_jax.model.llama4 import Llama4

CASE = dataclasses.replace(SCOUT, layers=4)
IDS = tokens(CASE, batch=1, length=150)[0]


@pytest.fixture(scope="module")
def model():
    return ours.model(CASE)


def test_every_token_but_the_first_is_scored_given_those_before_it(model):
    nll = score(model, IDS)
    logits = jax.jit(lambda model, tokens: model(tokens))(model, IDS[None, :-1].astype(np.int32))[0]
    expected = -jax.nn.log_softmax(logits)[np.arange(149), IDS[1:]]
    np.testing.assert_allclose(nll, expected, atol=1e-5)
    assert nll.shape == (149,) and nll.dtype == np.float32


def test_padding_to_a_compiled_length_changes_nothing(model):
    np.testing.assert_allclose(score(model, IDS[:71]), score(model, IDS)[:70], atol=1e-5)


def test_beyond_the_context_length_documents_follow_one_another():
    short = Llama4(dataclasses.replace(ours.config(CASE), context_length=60), scan_layers=False)
    whole = score(short, IDS)
    parts = [score(short, part) for part in (IDS[:61], IDS[60:121], IDS[120:])]
    assert [len(part) for part in parts] == [60, 60, 29]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-5)


def test_spans_double_and_cover_every_token():
    nll = np.arange(70, dtype=np.float32)
    spans = by_position(nll, context_length=40)
    assert [(s.first, s.last, s.tokens) for s in spans] == [
        (1, 1, 2), (2, 3, 4), (4, 7, 8), (8, 15, 16), (16, 31, 31), (32, 40, 9),
    ]  # fmt: skip
    assert spans[0] == Span(1, 1, 2, 20.0)  # tokens 0 and 40
    assert sum(s.tokens * s.nats for s in spans) == pytest.approx(nll.sum())


def test_bits_per_byte_of_a_fair_coin_is_one():
    assert bits_per_byte(np.full(8, math.log(2), np.float32), num_bytes=8) == pytest.approx(1)


def test_what_cannot_be_scored_is_said(model):
    with pytest.raises(ValueError, match="at least two tokens, the first being the past of the second; got 1"):
        score(model, [1])
    with pytest.raises(ValueError, match=r"tokens\[2\] is the token id 97, but the model's vocabulary has 97 ids"):
        score(model, [1, 2, 97])

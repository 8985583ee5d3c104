"""Token by token through the cache: what a prefill gives at every position, and what Hugging Face generates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import hf, ours
from oracles.cases import CASES, MAVERICK, SCOUT, tokens

TOLERANCE = 1e-6  # of the logit scale
MAX_LENGTH = 80

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def difference(ours, theirs) -> float:
    """Largest difference as a fraction of the largest magnitude."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@functools.cache
def compiled_step(case):
    """(empty cache for a batch, step: tokens, cache → logits, cache), compiled once a shape."""
    model = ours.model(case)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(ids, cache):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.step(ids, cache)
        return model.logits(hidden), cache

    return functools.partial(model.empty_cache, max_length=MAX_LENGTH), step


def decode(case, ids, prefill: int):
    """Logits at every position when the first `prefill` tokens are fed at once and the others one by one."""
    empty, step = compiled_step(case)
    cache, out = empty(len(ids)), []
    ids = jnp.asarray(ids, jnp.int32)
    for block in [ids[:, :prefill], *jnp.split(ids[:, prefill:], ids.shape[1] - prefill, axis=1)]:
        if block.shape[1]:
            logits, cache = step(block, cache)
            out.append(np.asarray(logits))
    return np.concatenate(out, axis=1)


@every_case
def test_decoding_from_the_first_token_gives_the_prefills_logits_at_every_position(case):
    assert difference(decode(case, tokens(case), 0), ours.logits(case)) <= TOLERANCE


@every_case
def test_decoding_equals_hugging_faces_decoding(case):
    decoded = decode(case, tokens(case), 0)
    assert difference(decoded, hf.reference(case).decode_logits(tokens(case))) <= TOLERANCE


@pytest.mark.parametrize("prefill", [7, 8, 9, 16, 19])
def test_decoding_goes_on_from_a_prefill_that_ends_anywhere_in_a_chunk(prefill):
    assert difference(decode(SCOUT, tokens(SCOUT), prefill), ours.logits(SCOUT)) <= TOLERANCE


@pytest.mark.parametrize("case", [SCOUT, MAVERICK, CASES[3]], ids=lambda case: case.name)
def test_sixty_four_greedy_tokens_are_those_of_hugging_face(case):
    prompt = tokens(case, length=11, seed=1)
    empty, step = compiled_step(case)
    logits, cache = step(jnp.asarray(prompt, jnp.int32), empty(len(prompt)))
    generated = []
    for _ in range(64):
        token = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32)
        generated.append(np.asarray(token))
        logits, cache = step(token, cache)
    np.testing.assert_array_equal(np.concatenate(generated, axis=1), hf.reference(case).greedy(prompt, 64))

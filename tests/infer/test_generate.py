"""Generating in batches, through caches and compiled loops, gives what one plain forward pass after another gives."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from oracles import hf, ours
from oracles.cases import MAVERICK, SCOUT, Case, tokens

import llama4_jax
from llama4_jax.infer import generate as module
from llama4_jax.infer.generate import generate
from sharding import MeshConfig, make_mesh, parameter_sharding

CASE = dataclasses.replace(SCOUT, layers=4, vocab=96)  # three chunked layers and a global one
LENGTHS = (29, 1, 8)  # chunks are of 8 tokens
PROMPTS = [row[:length].tolist() for row, length in zip(tokens(CASE, batch=3), LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def model():
    return ours.model(CASE)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, max_new_tokens=40)


@pytest.mark.parametrize("case", [SCOUT, MAVERICK], ids=lambda case: case.name)
def test_64_greedy_tokens_are_those_of_hugging_face_for_prompts_of_unequal_length(case: Case):
    rows = tokens(case, batch=3)
    prompts = [row[:length].tolist() for row, length in zip(rows, (29, 5, 16), strict=True)]
    replies = generate(ours.model(case), prompts, max_new_tokens=64)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply == hf.reference(case).greedy(np.array([prompt]), 64)[0].tolist()


def test_each_row_gives_what_it_gives_alone(model, greedy):
    for prompt, reply in zip(PROMPTS, greedy, strict=True):
        assert generate(model, [prompt], max_new_tokens=40) == [reply]


def test_decoding_gives_what_a_forward_pass_over_everything_gives(model, greedy):
    forward = jax.jit(lambda model, tokens: model(tokens))
    for prompt, reply in zip(PROMPTS, greedy, strict=True):
        whole = np.zeros((1, 69), np.int32)  # one length, compiled once
        whole[0, : len(prompt) + 40] = prompt + reply
        best = np.asarray(forward(model, whole))[0].argmax(-1)
        assert best[len(prompt) - 1 : len(prompt) + 39].tolist() == reply


def test_long_prompts_are_read_piece_by_piece(model, greedy, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 12)  # neither a chunk nor a divisor of one
    assert generate(model, PROMPTS, max_new_tokens=40) == greedy


def test_a_reply_continued_is_the_longer_reply(model, greedy):
    longer = [prompt + reply[:11] for prompt, reply in zip(PROMPTS, greedy, strict=True)]
    assert generate(model, longer, max_new_tokens=29) == [reply[11:] for reply in greedy]


def test_a_scanned_model_gives_the_same():
    case = dataclasses.replace(CASE, layers=2, rope_pattern=(True, True))
    unscanned, scanned = (ours.model(case, scan_layers=scan) for scan in (False, True))
    assert scanned.decoder.repeats == 2
    assert generate(scanned, PROMPTS, max_new_tokens=12) == generate(unscanned, PROMPTS, max_new_tokens=12)


def test_the_number_of_new_tokens_is_exact(model, greedy):
    for count in (1, 2, 33):
        assert generate(model, PROMPTS, max_new_tokens=count) == [reply[:count] for reply in greedy]
    assert generate(model, [], max_new_tokens=3) == []


def test_a_row_ends_with_its_stop_id_and_the_others_go_on(model, greedy):
    stop_ids = [greedy[0][5], greedy[2][0]]
    replies = generate(model, PROMPTS, max_new_tokens=40, stop_ids=stop_ids)
    for reply, full in zip(replies, greedy, strict=True):
        ends = [i + 1 for i, token in enumerate(full) if token in stop_ids]
        assert reply == full[: min(ends, default=40)]
    assert len(replies[2]) == 1 and len(replies[0]) <= 6


def test_on_tokens_sees_every_token_once_and_in_order(model, greedy):
    stop = greedy[0][5]
    seen, calls = [[] for _ in PROMPTS], 0

    def collect(gained):
        nonlocal calls
        calls += 1
        for row, more in zip(seen, gained, strict=True):
            row += more

    replies = generate(model, PROMPTS, max_new_tokens=40, stop_ids=[stop], on_tokens=collect)
    assert seen == replies == generate(model, PROMPTS, max_new_tokens=40, stop_ids=[stop])
    assert calls > 2  # the first token at once, then as time passes


def test_draws_repeat_with_the_seed_and_do_not_depend_on_other_rows(model):
    settings = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    first = generate(model, PROMPTS, **settings, seed=5)
    assert generate(model, PROMPTS, **settings, seed=5) == first
    assert generate(model, PROMPTS[:2], **settings, seed=5) == first[:2]
    assert generate(model, PROMPTS, **settings, seed=5, on_tokens=lambda gained: None) == first
    assert generate(model, PROMPTS, **settings, seed=6) != first
    same = generate(model, [PROMPTS[0]] * 3, **settings)
    assert same[0] != same[1] != same[2]


def test_other_values_compile_nothing(model):
    def compiled() -> list[int]:
        return [f._cache_size() for f in (module._empty_cache, module._prefill, module._decode)]

    settings = {"temperature": 0.9, "top_p": 0.9, "top_k": 7, "stop_ids": [1, 2]}
    generate(model, PROMPTS, max_new_tokens=30, **settings)
    before = compiled()
    others = [row[:length].tolist() for row, length in zip(tokens(CASE, batch=3, seed=1), (17, 20, 3), strict=True)]
    settings = {"temperature": 0.3, "top_p": 0.5, "top_k": 3, "stop_ids": [3, 4], "seed": 9}
    generate(model, others, max_new_tokens=19, **settings)
    generate(model, others, max_new_tokens=5, on_tokens=lambda gained: None, **settings)
    assert compiled() == before
    generate(model, [*others, [1], [2]], max_new_tokens=2, **settings)  # another shape
    assert compiled() == [size + 1 for size in before]


@pytest.mark.parametrize("axes", [{"data": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}], ids=str)
def test_a_mesh_changes_nothing_and_is_compiled_for_once(axes, greedy):
    mesh = make_mesh(MeshConfig(**{"data": 1} | axes))
    model = placed(ours.model(CASE), mesh)
    with jax.set_mesh(mesh):
        assert generate(model, PROMPTS, max_new_tokens=40) == greedy  # three rows, which no mesh axis divides
        before = module._prefill._cache_size(), module._decode._cache_size()
        assert generate(model, PROMPTS, max_new_tokens=40) == greedy
        assert (module._prefill._cache_size(), module._decode._cache_size()) == before


def placed(model, mesh):
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable[...]
        variable.set_value(jax.device_put(value, parameter_sharding(value.shape, variable.axes, mesh)))
    return model


def test_what_cannot_be_generated_is_said_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(module, "_prefill", None)
    for prompts, settings, message in [
        ([[1], []], {}, r"prompts\[1\] is empty: give at least one token"),
        ([[1], [5, 96]], {}, r"prompts\[1\]\[1\] is the token id 96, but the model's vocabulary has 96 ids, 0 to 95"),
        ([[-1]], {}, r"prompts\[0\]\[0\] is the token id -1"),
        ([[1], [1] * 1000], {"max_new_tokens": 25}, r"prompts\[1\] has 1000 tokens, .*25 exceeds .* of 1024"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"stop_ids": [97]}, "stop_ids has 97"),
        ([[1]], {"seed": -1}, "seed must be from 0 to 2147483647, got -1"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, **{"max_new_tokens": 5} | settings)


def test_the_last_position_of_the_context_can_be_reached(model):
    prompt = tokens(CASE, batch=1, length=1020)[0].tolist()
    assert len(llama4_jax.generate(model, [prompt], max_new_tokens=4)[0]) == 4

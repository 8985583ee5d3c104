"""Each module against Hugging Face's on the very inputs that its own forward pass gave it: a failure names the module.

Outputs are compared relative to their largest magnitude.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import hf, meta, numpy_llama4, ours
from oracles.cases import CASES, MAVERICK, SCOUT, tokens
from transformers import Llama4TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, apply_rotary_emb

from llama4_jax.model.config import RopeScaling
from llama4_jax.model.layers import rms_normalize
from llama4_jax.model.query_scale import temperature
from llama4_jax.model.rope import frequencies, rotate, rotation

TOLERANCE = 1e-6  # of the output's scale

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@functools.cache
def model(case):
    return ours.model(case)


def assert_same(mine, theirs, what: str = ""):
    difference = np.abs(np.asarray(mine) - theirs).max() / np.abs(theirs).max()
    assert difference <= TOLERANCE, what


def modules(case, theirs: str):
    """(our layer, input, output) of the module of that name in every layer, input and output as [B, T, …]."""
    trace, shape = hf.trace(case), (case.batch, case.length)
    for i, layer in enumerate(model(case).decoder.layers()):
        name = f"model.layers.{i}.{theirs}"
        if name in trace:
            yield i, layer, *(jnp.asarray(array).reshape(*shape, -1) for array in trace[name])


@every_case
def test_embedding_and_output_head(case):
    trace = hf.trace(case)
    weights = hf.reference(case).state_dict
    embedded = model(case).embed(jnp.asarray(tokens(case), jnp.int32), "float32")
    np.testing.assert_array_equal(np.asarray(embedded), weights["model.embed_tokens.weight"][tokens(case)])
    given, expected = trace["lm_head"]
    assert_same(model(case).logits(jnp.asarray(given)), expected)


@every_case
def test_norms(case):
    given, expected = hf.trace(case)["model.norm"]
    assert_same(model(case).final_norm(jnp.asarray(given)), expected)
    for ours_name, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        for i, layer, x, expected in modules(case, theirs):
            assert_same(getattr(layer, ours_name)(x), np.asarray(expected), f"layer {i}")


def test_qk_norm_is_the_weightless_rms_norm_of_each_head():

    x = np.random.default_rng(0).standard_normal((2, 3, 4, 16)).astype(np.float32)
    expected = Llama4TextL2Norm(1e-5)(torch.from_numpy(x)).numpy()
    assert_same(rms_normalize(jnp.asarray(x), 1e-5), expected)


@every_case
def test_attention_of_every_layer(case):
    positions = jnp.broadcast_to(jnp.arange(case.length, dtype=jnp.int32), (case.batch, case.length))
    place = model(case)._place(positions, None)
    for i, layer, x, expected in modules(case, "self_attn"):
        assert_same(layer.attention(x, place)[0], np.asarray(expected), f"layer {i}, rope: {case.rope[i]}")


@every_case
def test_feed_forward_of_every_layer(case):
    """Dense layers, and routed plus shared experts."""
    for i, layer, x, expected in modules(case, "feed_forward"):
        out = layer.moe(x, None)[0] if case.moe[i] else layer.mlp(x)
        assert_same(out, np.asarray(expected), f"layer {i}, experts: {case.moe[i]}")


@every_case
def test_router_logits_of_every_expert_layer(case):
    for i, layer, x, expected in modules(case, "feed_forward.router"):
        assert_same(layer.moe.router(x), np.asarray(expected), f"layer {i}")


@every_case
def test_the_shared_expert_of_every_expert_layer(case):
    for i, layer, x, expected in modules(case, "feed_forward.shared_expert"):
        assert_same(layer.moe.shared(x), np.asarray(expected), f"layer {i}")


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions and the temperature


@every_case
def test_rope_frequencies_equal_hugging_faces_and_the_definition(case):
    config = ours.config(case)
    mine = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(mine, hf.reference(case).inv_freq, rtol=2e-7)
    np.testing.assert_allclose(mine, numpy_llama4.frequencies(case), rtol=1e-7)


def published_frequencies(factor: float, high: float):
    """(Hugging Face's, Meta's) at Scout's real size, with these scaling factors."""

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }
    theirs, attention_scaling = ROPE_INIT_FUNCTIONS["llama3"](Llama4TextConfig(rope_parameters=rope))
    assert attention_scaling == 1.0
    plain = 1.0 / (500_000.0 ** (torch.arange(0, 128, 2).float() / 128))
    return theirs.numpy(), meta.meta_model.apply_scaling(plain, factor, high).numpy()


def test_scouts_real_frequencies_are_cut_hard_at_pair_35():
    mine = frequencies(128, 500_000.0, RopeScaling())  # its defaults are Scout's: 16, 1, 1, 8192
    plain = frequencies(128, 500_000.0, None)
    np.testing.assert_array_equal(mine[:35], plain[:35])
    np.testing.assert_allclose(mine[35:], plain[35:] / 16, rtol=1e-7)
    for theirs in published_frequencies(16.0, 1.0):
        np.testing.assert_allclose(mine, theirs, rtol=3e-7)


def test_the_pretrained_scouts_frequencies_are_blended():
    mine = frequencies(128, 500_000.0, RopeScaling(factor=8.0, high_freq_factor=4.0))
    ratio = frequencies(128, 500_000.0, None) / mine
    assert ((ratio > 1.001) & (ratio < 7.999)).sum() >= 5
    for theirs in published_frequencies(8.0, 4.0):
        np.testing.assert_allclose(mine, theirs, rtol=5e-7)


@pytest.mark.parametrize("case", [SCOUT, MAVERICK], ids=lambda case: case.name)
def test_rotation_turns_neighbouring_dimensions_as_hugging_face_does(case):

    x = np.random.default_rng(0).standard_normal((2, 40, 3, case.head_dim)).astype(np.float32)  # B T N H
    positions = np.tile(np.arange(40) * 7, (2, 1))
    rotary = hf.reference(case).model.model.rotary_emb
    freqs = rotary(torch.from_numpy(x), torch.from_numpy(positions))
    expected, _ = apply_rotary_emb(torch.from_numpy(x), torch.from_numpy(x), freqs)

    config = ours.config(case)
    by = rotation(
        jnp.asarray(positions, jnp.int32), frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    )
    mine = rotate(jnp.asarray(x).swapaxes(1, 2), by).swapaxes(1, 2)
    # angles reach 273 radians, where float32 resolves 3e-5
    np.testing.assert_allclose(np.asarray(mine), expected.numpy(), atol=1e-4)


def test_temperature_is_one_until_the_first_floor_is_full_and_follows_the_published_formula():
    positions = jnp.asarray([[0, 8190, 8191, 16383, 131071, 10_485_759]], jnp.int32)
    scale = np.asarray(temperature(positions, floor=8192, coef=0.1))[0]
    buckets = np.array([0, 0, 1, 2, 16, 1280])
    np.testing.assert_array_equal(scale[:2], 1)
    np.testing.assert_allclose(scale, 1 + 0.1 * np.log(buckets + 1), rtol=1e-6)

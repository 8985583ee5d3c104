"""Whole forward passes against both references, every case, and layer by layer to name the first that differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import hf, meta, numpy_llama4, ours
from oracles.cases import CASES, MAVERICK, SCOUT, tokens

TOLERANCE = 1e-6  # of the logit scale

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def difference(ours, theirs) -> float:
    """Largest difference as a fraction of the largest magnitude."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@every_case
def test_logits_equal_hugging_faces(case):
    assert difference(ours.logits(case), hf.logits(case)) <= TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if case.meta], ids=lambda case: case.name)
def test_logits_equal_metas(case):
    assert difference(ours.logits(case), meta.logits(case)) <= TOLERANCE


@every_case
def test_logits_equal_the_definition_in_float64(case):
    exact = numpy_llama4.logits(case, hf.reference(case).state_dict, tokens(case))
    assert difference(ours.logits(case), exact) <= TOLERANCE


@pytest.mark.parametrize("case", [SCOUT, MAVERICK, CASES[2]], ids=lambda case: case.name)
def test_scanned_layers_equal_hugging_face_too(case):
    model = ours.model(case, scan_layers=True)
    assert model.decoder.repeats >= 2
    logits = jax.jit(lambda ids: model(ids))(jnp.asarray(tokens(case), jnp.int32))
    assert difference(np.asarray(logits), hf.logits(case)) <= TOLERANCE


@every_case
def test_every_layer_leaves_the_residual_stream_as_hugging_face_does_and_chooses_the_same_experts(case):
    model, ids = ours.model(case), jnp.asarray(tokens(case), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    place = model._place(positions, None)
    trace = hf.trace(case)

    @jax.jit
    def walk(ids):
        x, streams, chosen = model.embed(ids, "float32"), [], {}
        for i, layer in enumerate(model.decoder.layers()):
            if layer.spec.moe:
                middle = x + layer.attention(layer.attention_norm(x), place)[0]
                expert, _ = layer.moe.choose(layer.moe.router(layer.mlp_norm(middle)))
                chosen[i] = expert.reshape(-1, case.top_k)
            x = layer(x, place, None)[0]
            streams.append(x)
        return streams, chosen

    streams, chosen = walk(ids)
    for i, stream in enumerate(streams):
        assert difference(np.asarray(stream), trace[f"model.layers.{i}"][1]) <= TOLERANCE, f"layer {i}"
    for i, theirs in hf.reference(case).router_logits(tokens(case)).items():
        experts = np.argsort(-theirs.reshape(-1, case.experts), axis=-1)[:, : case.top_k]
        np.testing.assert_array_equal(np.asarray(chosen[i]), experts, err_msg=f"layer {i}")

"""The three oracles agree, so that what all parity tests lean on is not one code base's accident.

Measured on every case: at most 5.8e-7 of the logit scale between any two.
"""

import dataclasses

import numpy as np
import pytest
import torch

from oracles import hf, meta, numpy_llama4
from oracles.cases import CASES, MAVERICK, SCOUT, tokens

TOLERANCE = 1.2e-6  # of the logit scale

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def difference(ours, theirs) -> float:
    """Largest difference as a fraction of the largest magnitude."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def numpy_logits(case, like=None):
    """The numpy oracle's logits for a case, on the weights and tokens of `like` (the case itself)."""
    like = like or case
    return numpy_llama4.logits(case, hf.reference(like).state_dict, tokens(like))


@every_case
def test_hugging_face_agrees_with_plain_numpy_in_float64(case):
    assert difference(hf.logits(case), numpy_logits(case)) <= TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if case.meta], ids=lambda case: case.name)
def test_meta_agrees_with_hugging_face(case):
    assert difference(meta.logits(case), hf.logits(case)) <= TOLERANCE


@every_case
def test_hugging_face_decodes_what_it_prefills(case):
    assert difference(hf.reference(case).decode_logits(tokens(case)), hf.logits(case)) <= TOLERANCE


def test_meta_decode_is_no_oracle_past_the_first_chunk():
    """Its single-token steps attend to the whole past in every layer: the reason that only prefills are compared."""
    from llama_models.llama4.datatypes import TransformerInput

    model, ids = meta.reference(SCOUT), torch.from_numpy(tokens(SCOUT))
    steps = [model(TransformerInput(tokens=ids[:, p : p + 1], tokens_position=p)) for p in range(SCOUT.chunk + 1)]
    decoded = np.stack([step.logits[:, 0].clone().numpy() for step in steps], axis=1)
    prefilled = meta.logits(SCOUT)[:, : SCOUT.chunk + 1]
    assert difference(decoded[:, :-1], prefilled[:, :-1]) <= TOLERANCE
    assert difference(decoded[:, -1], prefilled[:, -1]) > 0.1


@every_case
def test_no_router_choice_hangs_on_rounding(case):
    """The margin between the last expert chosen and the next is far above any implementation's rounding."""
    for layer, router in hf.reference(case).router_logits(tokens(case)).items():
        ranked = -np.sort(-router, axis=-1)
        assert (ranked[..., case.top_k - 1] - ranked[..., case.top_k]).min() > 1e-4, f"layer {layer}"


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (SCOUT, {"temperature": False}),
        (SCOUT, {"temperature_floor": 5}),
        (SCOUT, {"qk_norm": False}),
        (SCOUT, {"chunk": None}),
        (SCOUT, {"chunk": 9}),
        (SCOUT, {"nope_interval": 2}),
        (SCOUT, {"rope_scaling": None}),
        (SCOUT, {"rope_scaling": dataclasses.replace(SCOUT.rope_scaling, factor=8.0)}),
        (SCOUT, {"top_k": 2}),
        (SCOUT, {"norm_eps": 1e-3}),
        (MAVERICK, {"qk_norm": True}),
        (MAVERICK, {"rope_theta": 20_000.0}),
    ],
    ids=str,
)
def test_one_wrong_setting_shows_a_thousandfold_above_the_tolerance(case, change):
    """Parity on these models means something: nothing that is wrong hides below the tolerance."""
    wrong = numpy_logits(dataclasses.replace(case, **change), like=case)
    assert difference(wrong, hf.logits(case)) > 1000 * TOLERANCE


def test_building_meta_leaves_torch_as_it_was():
    cuda, dtype, scaling = torch.Tensor.cuda, torch.get_default_dtype(), meta.meta_model.apply_scaling
    meta.build(SCOUT, meta.state_dict(SCOUT, hf.reference(SCOUT).state_dict))
    assert torch.Tensor.cuda is cuda
    assert torch.get_default_dtype() is dtype is torch.float32
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert meta.meta_model.apply_scaling is scaling


def test_greedy_generation_is_the_argmax_of_repeated_prefills():
    reference, prompt = hf.reference(MAVERICK), tokens(MAVERICK, length=6)
    ids = prompt
    for _ in range(16):
        ids = np.concatenate([ids, reference.logits(ids)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(reference.greedy(prompt, 16), ids[:, 6:])


def test_training_lowers_the_loss_and_leaves_the_reference_alone():
    reference, ids = hf.reference(MAVERICK), tokens(MAVERICK)
    before = reference.state_dict["lm_head.weight"].copy()
    losses, trained = reference.adamw([ids] * 4, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, decay=0.1)
    assert losses[0] == pytest.approx(hf.step(MAVERICK).loss)
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_array_equal(reference.model.lm_head.weight.detach().numpy(), before)
    assert np.abs(trained["lm_head.weight"] - before).max() > 1e-2

"""Training on pictures: parts that do not learn; beginning from other weights; replies. On meshes: `test_meshes.py`."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from micro_run import finished_run, new_place, train
from oracles import hf, ours
from oracles.cases import MAVERICK
from oracles.pictures import config as model_config
from oracles.pictures import hf_model, state_dict
from small_run import SCOUT, arrays, config, gradients, largest_error, packed_batch, run, trainer
from small_run import start as first_state

import llama4_jax
from llama4_jax.data.config import DataConfig
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.model.config import VisionConfig
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.freeze import FreezeConfig
from llama4_jax.train.loop import Heldout, make_evaluation
from llama4_jax.train.rows import Rows
from llama4_jax.weights.checkpoint import named_leaves
from llama4_jax.weights.load import initial_weights

PATCH = 95
VISION = VisionConfig(
    embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64, image_size=8, patch_size=4, adapter_dim=32, output_dim=32,
    patch_token_id=PATCH,
)  # fmt: skip
MODEL = dataclasses.replace(SCOUT, num_layers=2, vision=VISION)
TILES = 4  # a row, of one token each


def picture_config(**fields):
    return config(MODEL, data=DataConfig(seq_len=32, batch_size=8, tiles_per_row=TILES), **fields)


def picture_batch(small, seed=0):
    """`packed_batch` with up to four patches a row, which are no targets, and tiles of which what follows depends."""
    batch, draw = packed_batch(small, seed), np.random.default_rng(seed)
    tokens, targets, weights = batch.tokens % PATCH, batch.targets % PATCH, batch.weights.copy()
    images = np.zeros((len(tokens), TILES, 8, 8, 3), np.uint8)
    for row in range(len(tokens)):
        places = np.sort(draw.choice(20, int(draw.integers(0, TILES + 1)), replace=False))
        images[row, : len(places)] = draw.integers(0, 256, (len(places), 8, 8, 3))
        tokens[row, places] = PATCH
        before = places[places > 0] - 1
        weights[row, before] = 0
        targets[row, places] = images[row, : len(places), 0, 0, 0] % 7
    return batch._replace(tokens=tokens, targets=targets, weights=weights, images=images)


def test_accumulation_and_remat_change_nothing_but_rounding():
    found = []
    for how in ({}, {"grad_accumulation": 2, "remat": "full"}):
        small = picture_config(balance=BalanceConfig(), **how)  # balance losses are of each micro-batch
        state, figures = run(trainer(small), [picture_batch(small)])
        found.append((gradients(state), figures[0].loss))
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=2e-6)
    assert largest_error(found[1][0], found[0][0]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Freezing


def test_the_published_two_stages_first_encoder_and_projector_then_everything():
    text = ("embed", "decoder", "final_norm", "lm_head")
    small = picture_config(freeze=(FreezeConfig(paths=text, until=2),))
    made, batches = trainer(small), [picture_batch(small, seed) for seed in range(3)]
    with jax.set_mesh(made.mesh):
        state = first_state(made)
        seen = [arrays(state.params)]
        moments = []
        for step, batch in enumerate(batches):
            state, _ = made.step_at(step)(state, batch, None)
            seen.append(arrays(state.params))
            moments.append(gradients(state))
    for name in seen[0]:
        moved = [bool(np.abs(after[name] - before[name]).max()) for before, after in itertools.pairwise(seen)]
        is_text = name.split(".")[0] in text
        assert moved == ([False, False, True] if is_text else [True, True, True]), name
        assert bool(np.abs(moments[1][name]).max()) != is_text  # nor does the optimizer keep anything of them
    assert made.step_at(0) is made.step_at(1) and made.step_at(2) is made.step_at(100) is not made.step_at(0)


def test_what_is_frozen_costs_no_gradient():
    small = picture_config()
    frozen = picture_config(freeze=(FreezeConfig(paths=("decoder", "embed")),))

    def flops(small):
        made = trainer(small)
        with jax.set_mesh(made.mesh):
            return made.step.lower(made.abstract, picture_batch(small), None).cost_analysis()["flops"]

    assert flops(frozen) < 0.95 * flops(small)


def test_patterns_name_parameters_and_wrong_ones_are_errors():
    only_routers = picture_config(freeze=(FreezeConfig(paths=("*.router.*",)),))
    made = trainer(only_routers)
    before = arrays(first_state(made).params)
    state, _ = run(made, [picture_batch(only_routers)])
    still = {name for name, x in arrays(state.params).items() if not np.abs(x - before[name]).max()}
    assert still == {name for name in before if "router" in name} != set()
    with pytest.raises(ValueError, match=r"'visoin' fits no parameter. .*projector, vision"):
        trainer(picture_config(freeze=(FreezeConfig(paths=("visoin",)),)))
    with pytest.raises(ValueError, match="no parameter is left to learn at step 0"):
        trainer(picture_config(freeze=(FreezeConfig(paths=("*",), until=5),)))
    with pytest.raises(ValueError, match="until must be at least 1"):
        FreezeConfig(paths=("vision",), until=0)


# ---------------------------------------------------------------------------------------------------------------------
# Beginning from other weights


def leaves_of(model):
    return {f"params.{name}": leaf for name, leaf in named_leaves(nnx.state(model, nnx.Param)).items()}


@pytest.mark.parametrize("scan", [False, True])
def test_a_run_begins_with_the_weights_of_a_directory(tmp_path, scan):

    hf_model(MAVERICK).save_pretrained(tmp_path)
    expected = ours.filled(model_config(MAVERICK), state_dict(MAVERICK), scan_layers=scan)
    fresh = jax.tree.map(lambda x: x + 1.0, leaves_of(expected))
    got = initial_weights(tmp_path, model_config(MAVERICK), fresh)
    for name, leaf in leaves_of(expected).items():
        np.testing.assert_array_equal(got[name], leaf)


def test_a_language_model_without_an_encoder_gets_a_new_one(tmp_path):
    hf.reference(MAVERICK).save_pretrained(tmp_path)
    fresh = leaves_of(ours.filled(model_config(MAVERICK), state_dict(MAVERICK)))
    got = initial_weights(tmp_path, model_config(MAVERICK), fresh)
    expected = leaves_of(ours.model(MAVERICK))
    for name, leaf in got.items():
        np.testing.assert_array_equal(leaf, expected.get(name, fresh[name]))
    wider = dataclasses.replace(model_config(MAVERICK), mlp_dim=64)
    made = jax.jit(lambda: nnx.state(llama4_jax.Llama4(wider, scan_layers=False), nnx.Param))()
    with pytest.raises(ValueError, match=r"(?s)init_from: .*layers.0.mlp.gate_up.kernel has the shape \(64, 2, 48\)"):
        initial_weights(tmp_path, wider, {f"params.{name}": leaf for name, leaf in named_leaves(made).items()})


def test_train_begins_where_another_run_ended_and_goes_on_by_the_same_command(tmp_path_factory):
    first, place = finished_run(tmp_path_factory), new_place(tmp_path_factory, "init_from")
    command = ("--init-from", str(first), "--name", "second", "--optimizer.peak-lr", "1e-9", "--sample-tokens", "1")
    assert train(place, *command, "--steps", "1").returncode == 0
    ends = [llama4_jax.from_pretrained(run, dtype="float32") for run in (first, place / "second")]
    for mine, theirs in zip(*(jax.tree.leaves(nnx.state(end, nnx.Param)) for end in ends), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    again = train(place, *command, "--steps", "2")
    assert again.returncode == 0 and "resumed at step 1" in again.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Replies


def test_a_reply_is_exact_if_greedy_decoding_would_write_it():
    """Against the obvious count, document by document."""
    small = picture_config()
    made = trainer(small)
    batch = picture_batch(small)
    with jax.set_mesh(made.mesh):
        state = first_state(made)
        model = nnx.merge(made.graphdef, state.params, state.bias)
        logits = jax.jit(lambda b: model(b.tokens, images=b.images, positions=b.positions, segment_ids=b.segment_ids))(
            batch
        )
        likeliest = np.asarray(logits.argmax(-1))
        # Make some of them right.
        right = np.random.default_rng(0).random(batch.targets.shape) < 0.9
        batch = batch._replace(targets=np.where(right, likeliest, batch.targets).astype(np.int32))
        measured = make_evaluation(made, Rows(made.mesh, len(batch.tokens)))(state, [batch])
    exact = replies = 0
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            own = batch.segment_ids[row] == segment
            counts = own & (batch.weights[row] > 0)
            if counts.any() and (own & (batch.weights[row] == 0)).any():
                replies += 1
                exact += bool((likeliest[row] == batch.targets[row])[counts].all())
    assert 0 < exact < replies
    assert (measured.exact, measured.replies) == (exact, replies)
    assert str(Heldout(1.0, 1, 4)) == "1.0000 bits per byte, 25.0% of 4 replies exact"
    assert "heldout_exact_replies" not in Heldout(1.0, 0, 0).figures()
    assert str(Heldout(None, 0, 0)) == "no bytes to measure" and Heldout(None, 0, 0).figures() == {}


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def test_a_run_whose_parts_do_not_fit_is_refused(tmp_path_factory):
    with pytest.raises(ValueError, match="data.tiles_per_row is 4, but the model reads text alone"):
        config(SCOUT, data=DataConfig(seq_len=32, batch_size=8, tiles_per_row=4))
    place = new_place(tmp_path_factory, "misfit")
    result = train(place, "--model.vision.patch-token-id", "5")
    patch = ByteTokenizer().special_tokens["<|patch|>"]
    assert result.returncode == 2 and f"patch_token_id is 5, but <|patch|> is {patch}" in result.stderr

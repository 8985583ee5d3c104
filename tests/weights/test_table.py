"""The table is total, invertible, and agrees with what the references themselves load and save."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import hf, meta
from oracles.cases import CASES, MAVERICK, SCOUT, tokens

from llama4_jax.model.config import ModelConfig
from llama4_jax.model.presets import preset
from llama4_jax.weights.hf_config import model_config
from llama4_jax.weights.table import InMemory, from_hf, from_meta, plan, rows, to_hf, to_meta

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
meta_cases = pytest.mark.parametrize("case", [case for case in CASES if case.meta], ids=lambda case: case.name)


def config_of(case) -> ModelConfig:
    return model_config(hf.config(case).to_dict())


def hf_weights(case) -> dict[str, np.ndarray]:
    return hf.reference(case).state_dict


def ours(case) -> dict[str, np.ndarray]:
    return dict(from_hf(config_of(case), InMemory(hf_weights(case))))


def assert_same(actual: dict, expected: dict) -> None:
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def bfloat16(tensors: dict) -> dict[str, np.ndarray]:
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


@every_case
def test_hugging_face_to_ours_and_back_is_bit_exact(case):
    assert_same(dict(to_hf(config_of(case), ours(case))), hf_weights(case))


@meta_cases
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ours_to_meta_and_back_is_bit_exact(case, ranks):
    if case.kv_heads % ranks or case.heads % ranks or case.vocab % ranks:
        case = dataclasses.replace(case, vocab=96, kv_heads=4, heads=4, embed=4 * case.head_dim)
    config, weights = config_of(case), ours(case)
    shards = [InMemory(dict(to_meta(config, weights, rank=rank, ranks=ranks))) for rank in range(ranks)]
    assert_same(dict(from_meta(config, *shards)), weights)


def test_a_round_trip_keeps_bfloat16():
    weights = bfloat16(hf_weights(MAVERICK))
    there = dict(from_hf(config_of(MAVERICK), InMemory(weights)))
    assert all(array.dtype == ml_dtypes.bfloat16 for array in there.values())
    assert_same(dict(to_hf(config_of(MAVERICK), there)), weights)


def test_jax_arrays_are_written_like_numpy_ones():
    weights = {name: jnp.asarray(array) for name, array in ours(SCOUT).items()}
    assert_same(dict(to_hf(config_of(SCOUT), weights)), hf_weights(SCOUT))


def test_every_shape_is_what_the_table_says():
    for case in CASES:
        shapes = {row.ours: row.shape for row in rows(config_of(case))}
        assert {name: array.shape for name, array in ours(case).items()} == shapes


def test_the_first_expert_and_the_first_head_land_where_they_should():
    """Against the layouts written out by hand, so that an inverse cannot hide a wrong transposition."""
    theirs, mine = hf_weights(MAVERICK), ours(MAVERICK)
    head = MAVERICK.head_dim
    q = theirs["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(mine["layers.0.attention.q.kernel"][:, 1], q[head : 2 * head].T)
    o = theirs["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(mine["layers.0.attention.o.kernel"][1], o[:, head : 2 * head].T)
    up = theirs["model.layers.0.feed_forward.up_proj.weight"]
    np.testing.assert_array_equal(mine["layers.0.mlp.gate_up.kernel"][:, 1], up.T)
    fused = theirs["model.layers.1.feed_forward.experts.gate_up_proj"]
    np.testing.assert_array_equal(mine["layers.1.moe.gate_up"][3, 1], fused[3, :, MAVERICK.expert_mlp :])
    np.testing.assert_array_equal(mine["lm_head.kernel"], theirs["lm_head.weight"].T)


# ---------------------------------------------------------------------------------------------------------------------
# Meta's own code as the judge of its formats


@meta_cases
def test_meta_keys_and_values_are_those_of_its_published_checkpoints(case):
    expected = {name: tensor.numpy() for name, tensor in meta.state_dict(case, hf_weights(case)).items()}
    assert_same(dict(to_meta(config_of(case), ours(case))), expected)


@meta_cases
def test_the_keys_of_metas_own_modules_are_read_too(case):
    state = {name: tensor.numpy() for name, tensor in meta.reference(case).state_dict().items()}
    assert_same(dict(from_meta(config_of(case), InMemory(state))), ours(case))


def test_weights_written_for_meta_compute_the_same_in_metas_code():
    import torch

    written = {name: torch.from_numpy(array) for name, array in to_meta(config_of(SCOUT), ours(SCOUT))}
    np.testing.assert_array_equal(meta.prefill(meta.build(SCOUT, written), tokens(SCOUT)), meta.logits(SCOUT))


def test_model_parallel_ranks_hold_their_own_heads_and_widths():
    """Rank r of a fused tensor holds [q_r; k_r; v_r] and [gate_r; up_r], not a slice of [q; k; v] or [gate; up]."""
    theirs, head, half = hf_weights(MAVERICK), MAVERICK.head_dim, MAVERICK.mlp // 2
    config = config_of(MAVERICK)
    with pytest.raises(ValueError, match=r"tok_embeddings.weight: 2 ranks do not divide its axis V of 97"):
        dict(to_meta(config, ours(MAVERICK), rank=1, ranks=2))
    config = dataclasses.replace(config, vocab_size=96)
    weights = ours(MAVERICK)
    weights["embed.embedding"], weights["lm_head.kernel"] = (
        weights["embed.embedding"][:96],
        weights["lm_head.kernel"][:, :96],
    )
    second = dict(to_meta(config, weights, rank=1, ranks=2))
    attention = "model.layers.0.self_attn."
    np.testing.assert_array_equal(
        second["layers.0.attention.wqkv.weight"],
        np.concatenate(
            [
                theirs[attention + "q_proj.weight"][2 * head :],
                theirs[attention + "k_proj.weight"][head:],
                theirs[attention + "v_proj.weight"][head:],
            ]
        ),
    )
    np.testing.assert_array_equal(
        second["layers.0.feed_forward.mlp.fc1_weight"],
        np.concatenate([theirs[f"model.layers.0.feed_forward.{name}_proj.weight"][half:] for name in ("gate", "up")]),
    )
    experts = theirs["model.layers.1.feed_forward.experts.down_proj"]
    np.testing.assert_array_equal(
        second["layers.1.feed_forward.experts.moe_w_out_eF_D"],
        experts[:, MAVERICK.expert_mlp // 2 :].reshape(-1, MAVERICK.embed),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Totality


def shapes_of(case) -> dict[str, tuple[int, ...]]:
    return InMemory(hf_weights(case)).shapes()


def test_published_shapes_are_the_tables():
    shapes = {}
    for row in rows(preset("scout")):
        for name in row.hf[0].names:
            shapes[name] = row.file_shape(row.hf[0])
    layer = "model.layers.7."
    assert shapes["model.embed_tokens.weight"] == (202048, 5120)
    assert shapes[layer + "self_attn.q_proj.weight"] == (5120, 5120)
    assert shapes[layer + "self_attn.k_proj.weight"] == (1024, 5120)
    assert shapes[layer + "feed_forward.router.weight"] == (16, 5120)
    assert shapes[layer + "feed_forward.experts.gate_up_proj"] == (16, 5120, 16384)
    assert shapes[layer + "feed_forward.experts.down_proj"] == (16, 8192, 5120)
    assert shapes[layer + "feed_forward.shared_expert.down_proj.weight"] == (5120, 8192)
    # what one of Meta's eight ranks holds
    ranks = {row.meta[0].names[0]: row.file_shape(row.meta[0], 8) for row in rows(preset("maverick"))}
    assert ranks["tok_embeddings.weight"] == (25256, 5120)
    assert ranks["layers.0.attention.wqkv.weight"] == (896, 5120)
    assert ranks["layers.0.attention.wo.weight"] == (5120, 640)
    assert ranks["layers.0.feed_forward.mlp.fc1_weight"] == (4096, 5120)
    assert ranks["layers.1.feed_forward.experts.moe_w_in_eD_F"] == (128 * 5120, 1024)
    assert ranks["layers.1.feed_forward.experts.moe_w_out_eF_D"] == (128 * 1024, 5120)
    assert ranks["layers.1.feed_forward.router_DE"] == (5120, 128)


@pytest.mark.parametrize(("name", "total"), [("scout", 107_769_861_120), ("maverick", 400_711_848_960)])
def test_the_rows_add_up_to_the_published_parameter_counts(name, total):
    table = rows(preset(name))
    assert sum(int(np.prod(row.shape)) for row in table) == total
    for row in table:
        for layout in (*row.hf, *row.meta):
            if layout.rows is None:
                assert len(layout.names) * np.prod(row.file_shape(layout)) == np.prod(row.shape), layout


def test_a_conditional_generation_checkpoint_is_read_and_its_vision_tensors_are_reported():
    shapes = {"language_model." + name: shape for name, shape in shapes_of(SCOUT).items()}
    vision = {
        "vision_model.class_embedding": (8,),
        "vision_model.model.layers.0.self_attn.q_proj.weight": (8, 8),
        "multi_modal_projector.linear_1.weight": (64, 8),
    }
    found = plan(config_of(SCOUT), "hf", {**shapes, **vision})
    assert found.vision == tuple(vision)
    weights = {"language_model." + name: array for name, array in hf_weights(SCOUT).items()}
    assert_same(dict(from_hf(config_of(SCOUT), InMemory(weights))), ours(SCOUT))


def test_every_problem_is_named_at_once_and_nothing_is_read():
    weights = dict(hf_weights(MAVERICK))
    weights["model.layers.9.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"]
    weights["language_model.model.norm.weight"] = weights["model.norm.weight"]
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1]
    del weights["model.layers.3.feed_forward.experts.down_proj"]
    del weights["model.layers.2.feed_forward.up_proj.weight"]

    class Unreadable(InMemory):
        def read(self, name):
            raise AssertionError(f"{name} was read")

    with pytest.raises(ValueError) as error:
        from_hf(config_of(MAVERICK), Unreadable(weights))
    lines = str(error.value).split("\n")
    assert "in 5 point(s)" in lines[0]
    assert {line.strip() for line in lines[1:6]} == {
        "unknown: model.layers.9.self_attn.q_proj.weight",
        "the same weights twice, as model.norm.weight, language_model.model.norm.weight",
        "wrong shape: lm_head.weight is [96, 64], but the config makes it [97, 64]",
        "missing: model.layers.3.feed_forward.experts.down_proj",
        "missing: model.layers.2.feed_forward.up_proj.weight",
    }


def test_a_dense_layer_where_the_config_wants_experts_is_an_error():
    config = dataclasses.replace(config_of(MAVERICK), moe_layers=(True,) * MAVERICK.layers)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.feed_forward\.router\.weight"):
        plan(config, "hf", shapes_of(MAVERICK))


def test_meta_weights_under_two_of_their_keys_are_an_error():
    state = {name: tensor.numpy() for name, tensor in meta.state_dict(SCOUT, hf_weights(SCOUT)).items()}
    state["layers.2.attention.wk.weight"] = hf_weights(SCOUT)["model.layers.2.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"twice, as layers\.2\.attention\.wqkv\.weight, layers\.2\.attention\.wk"):
        from_meta(config_of(SCOUT), InMemory(state))


def test_what_meta_keeps_beside_weights_is_passed_over_and_nothing_else():
    state = {name: tensor.numpy() for name, tensor in meta.state_dict(SCOUT, hf_weights(SCOUT)).items()}
    state["rope.freqs"] = np.zeros(4, np.float32)
    state["layers.0.feed_forward.running_gate_stats_3E"] = np.zeros((3, 4), np.float32)
    state["layers.0.attention.wo._extra_state"] = np.zeros(1, np.uint8)
    assert_same(dict(from_meta(config_of(SCOUT), InMemory(state))), ours(SCOUT))
    state["layers.0.feed_forward.gate_stats"] = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"unknown: layers\.0\.feed_forward\.gate_stats"):
        from_meta(config_of(SCOUT), InMemory(state))


def test_writing_names_what_is_missing_unknown_or_misshapen():
    weights = ours(SCOUT)
    del weights["final_norm.scale"]
    weights["layers.3.attention.ssmax.s"] = np.ones(SCOUT.heads, np.float32)
    weights["embed.embedding"] = weights["embed.embedding"].T
    for write in (to_hf, to_meta):
        with pytest.raises(ValueError) as error:
            write(config_of(SCOUT), weights)
        assert "missing: final_norm.scale" in str(error.value)
        assert "no counterpart in published Llama 4 checkpoints: layers.3.attention.ssmax.s" in str(error.value)
        assert "wrong shape: embed.embedding is [64, 97], expected [97, 64]" in str(error.value)


def test_tensors_are_read_one_row_at_a_time():
    reads = []

    class Recorded(InMemory):
        def read(self, name):
            reads.append(name)
            return super().read(name)

    stream = from_hf(config_of(SCOUT), Recorded(hf_weights(SCOUT)))
    assert reads == []
    next(stream)
    assert reads == ["model.embed_tokens.weight"]


# ---------------------------------------------------------------------------------------------------------------------
# Scales of quantized tensors


@every_case
def test_every_matrix_says_what_its_products_sum_over_and_nothing_else_does(case):
    by_name = {row.ours: row for row in rows(config_of(case))}
    for name, row in by_name.items():
        matrix = name.endswith((".kernel", ".gate_up", ".down"))
        assert bool(row.contracted) == matrix, name
    assert by_name["layers.0.attention.o.kernel"].num_inputs == case.heads * case.head_dim
    assert by_name["layers.0.attention.q.kernel"].num_inputs == case.embed


def test_rows_of_scales_follow_from_those_of_their_tensors():
    table = {row.ours: row for row in rows(config_of(MAVERICK))}
    shapes = {
        "layers.0.attention.q.kernel": (4, MAVERICK.heads, MAVERICK.head_dim),
        "layers.0.attention.o.kernel": (4, MAVERICK.embed),
        "layers.0.mlp.gate_up.kernel": (4, 2, MAVERICK.mlp),
        "layers.1.moe.gate_up": (MAVERICK.experts, 2, 4, MAVERICK.expert_mlp),
        "layers.1.moe.down": (MAVERICK.experts, 4, MAVERICK.embed),
    }
    for name, shape in shapes.items():
        scale = table[name].scale(4)
        assert (scale.ours, scale.shape) == (name + "_scale", shape)
        for layout, of_values in zip(scale.hf + scale.meta, table[name].hf + table[name].meta, strict=True):
            assert layout.names == tuple(f"{theirs}_scale" for theirs in of_values.names)
    o, down = (table[name].scale(4) for name in ("layers.0.attention.o.kernel", "layers.1.moe.down"))
    assert (o.hf[0].axes, o.meta[0].axes, o.meta[0].split) == ("D G", "D G", "G")  # ranks have inputs of their own
    assert (down.hf[0].axes, down.hf[1].axes, down.meta[1].axes) == ("E D G", "E D G", "E G D")
    gate_up = table["layers.1.moe.gate_up"].scale(1)
    assert (gate_up.hf[0].axes, gate_up.hf[1].axes, gate_up.meta[1].split) == ("E G (P F)", "(E P) F G", "F")


def test_two_numbers_a_byte_halve_the_last_of_the_contracted_axes():
    for row in rows(config_of(MAVERICK)):
        if row.contracted and not row.sizes[row.contracted.split()[-1]] % 2:
            packed, last = row.packed(), row.axes.split().index(row.contracted.split()[-1])
            assert packed.shape == (*row.shape[:last], row.shape[last] // 2, *row.shape[last + 1 :])
            assert packed.packed() == packed and packed.unpacked() == row and packed.num_inputs == row.num_inputs

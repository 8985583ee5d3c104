"""The layer pattern, the presets' sizes, and what happens to sizes that do not fit together."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from llama4_jax.model.config import FieldError, LayerSpec, ModelConfig, RopeScaling, VisionConfig, difference
from llama4_jax.model.flops import count_parameters, forward_flops_per_token, mean_visible_keys
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import PRESETS, preset

SIZES = {
    "vocab_size": 97,
    "embed_dim": 32,
    "num_layers": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
    "expert_mlp_dim": 24,
    "num_experts": 4,
}
TWO_EACH = ModelConfig(**SIZES, moe_interval=2)


def test_scout_has_experts_everywhere_and_no_positions_in_every_fourth_layer():
    layers = preset("scout").layers
    assert [i for i, spec in enumerate(layers) if not spec.rope] == list(range(3, 48, 4))
    local = LayerSpec(rope=True, chunk=8192, moe=True, qk_norm=True, query_scale="none")
    world = LayerSpec(rope=False, chunk=None, moe=True, qk_norm=False, query_scale="temperature")
    assert layers[:4] == (local, local, local, world)


def test_maverick_alternates_dense_and_expert_layers_without_qk_norm():
    layers = preset("maverick").layers
    assert [spec.moe for spec in layers[:4]] == [False, True, False, True]
    assert not any(spec.qk_norm for spec in layers)
    assert preset("maverick").rope_scaling is None


def test_scout_scales_its_rope_by_16_with_an_empty_blend():
    assert preset("scout").rope_scaling == RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_context=8192
    )


@pytest.mark.parametrize(
    ("name", "total"),
    [("scout", 107_769_861_120), ("maverick", 400_711_848_960), ("scout_vision", 108_641_793_536),
     ("maverick_vision", 401_583_781_376)],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, total):
    assert count_parameters(preset(name)).total == total


def test_the_behemoth_like_preset_has_the_published_totals():
    count = count_parameters(preset("behemoth_like"))
    assert count.active / 1e9 == pytest.approx(288, abs=1)
    assert count.total / 1e12 == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_a_described_model_has_exactly_the_counted_parameters_without_being_allocated(name):
    model = nnx.eval_shape(lambda: Llama4(preset(name)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == count_parameters(preset(name)).total


def test_ssmax_parameters_are_counted():
    config = ModelConfig(**SIZES, query_scale="ssmax_bias", query_scale_layers="all")
    model = nnx.eval_shape(lambda: Llama4(config))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == count_parameters(config).total


@pytest.mark.parametrize(
    ("intervals", "period"),
    [((1, 4), 4), ((2, 4), 4), ((2, 3), 6), ((0, 0), 1), ((3, 0), 3)],
)
def test_the_period_is_the_shortest_group_that_repeats(intervals, period):
    moe, nope = intervals
    config = ModelConfig(**{**SIZES, "num_layers": 13}, moe_interval=moe, nope_interval=nope)
    assert config.period == period


def test_an_explicit_pattern_wins_over_intervals():
    rope = (True, False, True, True, True, True, True, True)
    config = ModelConfig(**SIZES, rope_layers=rope)
    assert tuple(spec.rope for spec in config.layers) == rope
    assert config.period == 7  # six RoPE layers after the one without, and the pattern would go on


def test_a_chunked_layer_never_pays_for_more_than_a_chunk():
    chunked, world = preset("scout").layers[0], preset("scout").layers[3]
    assert mean_visible_keys(chunked, 8192) == mean_visible_keys(world, 8192) == 8193 / 2
    assert mean_visible_keys(chunked, 10 * 8192) == 8193 / 2
    assert mean_visible_keys(world, 10 * 8192) == (10 * 8192 + 1) / 2
    by_hand = sum(t % 8192 + 1 for t in range(10_000)) / 10_000
    assert mean_visible_keys(chunked, 10_000) == pytest.approx(by_hand)


def test_forward_flops_are_two_for_each_active_weight_plus_the_scores():
    config = preset("scout")
    weights = count_parameters(config).active - config.vocab_size * config.embed_dim  # the table is only read
    norms = config.embed_dim * (2 * config.num_layers + 1)
    scores = 4 * config.num_heads * config.head_dim * 48 * 8193 / 2
    assert forward_flops_per_token(config, 8192) == pytest.approx(2 * (weights - norms) + scores, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, r"model.num_heads \(5\) must be a multiple of model.num_kv_heads \(2\)"),
        ({"head_dim": 7}, "model.head_dim must be even"),
        ({"top_k": 5}, r"model.top_k \(5\) must not exceed model.num_experts \(4\)"),
        ({"embed_dim": 0}, "model.embed_dim must be at least 1, got 0"),
        ({"moe_layers": (True,)}, "one entry for each of the 8 layers, got 1"),
        ({"attention_chunk": 0}, "model.attention_chunk must be at least 1 or None, got 0"),
        ({"nope_interval": -1}, "model.nope_interval must be at least 0 .never., got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SIZES, **change})


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown model preset 'scuot': expected one of scout, scout_vision, maverick"):
        preset("scuot")


def test_a_difference_names_the_field_and_both_values():
    ours, theirs = ModelConfig(**SIZES), ModelConfig(**{**SIZES, "num_experts": 2})
    assert difference(ours, theirs) == ["num_experts: 4 != 2"]
    assert difference(ours, ours) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": -1.0}, "model.norm_eps must be positive"),
        ({"norm_eps": 0.0}, "model.norm_eps must be positive"),
        ({"norm_eps": 1e-50}, "model.norm_eps must be positive .in float32, from 1.2e-38 on., got 1e-50"),
        ({"norm_eps": math.nan}, "model.norm_eps must be a finite number"),
        ({"rope_theta": math.inf}, "model.rope_theta must be a finite number"),
        ({"rope_theta": 1e39}, "model.rope_theta must be a finite number, at most 3.4e"),
        ({"init_std": -0.1}, "model.init_std must be a finite number of 0 or more"),
        ({"temperature_coef": -math.inf}, "model.temperature_coef must be a finite number"),
        ({"num_layers": 2**31}, "model.num_layers must be at most 4,096, got 2147483648"),
        ({"num_layers": 10**4000}, "model.num_layers must be at most 4,096, got an integer of more than 30 digits"),
        ({"vocab_size": 2**31}, "model.vocab_size must be at most 2,147,483,647"),
        ({"num_experts": 0}, "model.num_experts must be at least 1, got 0"),
        (
            {"num_experts": 2**16, "moe_interval": 1},
            "model.num_experts x the layers that have them must be at most 262,144",
        ),
        ({"mlp_dim": -1}, "model.mlp_dim must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused_at_once_by_field(change, message):
    with pytest.raises(FieldError, match=message) as caught:
        dataclasses.replace(TWO_EACH, **change)
    assert len(str(caught.value)) < 300 and caught.value.field == next(iter(change))


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_rope_scaling_is_positive_and_finite(field, value):
    with pytest.raises(ValueError, match=f"rope_scaling.{field} must be"):
        RopeScaling(**{field: value})


@pytest.mark.parametrize("change", [{"norm_eps": 0.0}, {"rope_theta": math.nan}, {"pixel_shuffle_ratio": 1e-320},
                                    {"num_layers": 2**31}, {"patch_token_id": -1}, {"image_size": 0}])  # fmt: skip
def test_the_vision_encoder_has_ranges_too(change):
    [field] = change
    with pytest.raises(ValueError, match=f"model.vision.{field} must be"):
        VisionConfig(**change)


def test_what_no_layer_has_may_be_nothing():
    dense = dataclasses.replace(TWO_EACH, moe_interval=0, num_experts=0, top_k=0, expert_mlp_dim=0)
    assert dense.num_moe_layers == 0
    assert dataclasses.replace(TWO_EACH, moe_interval=1, mlp_dim=0).num_moe_layers == 8
    with pytest.raises(ValueError, match="mlp_dim must be at least 1"):
        dataclasses.replace(TWO_EACH, moe_interval=2, mlp_dim=0)


def test_the_period_of_thousands_of_layers_is_found_at_once():
    layers = (*(i % 2 == 0 for i in range(4095)), True)
    assert dataclasses.replace(TWO_EACH, num_layers=4096, moe_layers=layers, nope_interval=0).period == 4095

"""The layer pattern, the presets' sizes, and what happens to sizes that do not fit together."""

import jax
import pytest
from flax import nnx

from llama4_jax.model.config import LayerSpec, ModelConfig, RopeScaling, difference
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

"""config.json in every spelling: what `transformers` makes of it decides, field by field and in logits."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hf
from transformers import AutoConfig, Llama4Config, Llama4ForCausalLM, Llama4TextConfig

import llama4_jax
from llama4_jax.model.config import ModelConfig
from llama4_jax.weights.convert import convert, export
from llama4_jax.weights.hf_config import model_config, to_hf_config
from llama4_jax.weights.source import open_config

TINY = {
    "model_type": "llama4_text", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24,
    "intermediate_size_mlp": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8, "max_position_embeddings": 256, "floor_scale": 8,
}  # fmt: skip
VISION = {"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096}


def theirs(config_json: dict, directory) -> Llama4TextConfig | Llama4Config:
    (directory / "config.json").write_text(json.dumps(config_json))
    return AutoConfig.from_pretrained(directory)


def assert_the_same(config: ModelConfig, theirs: Llama4TextConfig) -> None:
    """Ours has what their model takes from their config when it is built."""
    theirs.standardize_rope_params()  # as the model does, for the last time
    rope, scaling = theirs.rope_parameters, config.rope_scaling
    assert config.rope_theta == rope["rope_theta"]
    assert (scaling is not None) == (rope["rope_type"] == "llama3")
    if scaling is not None:
        assert scaling.factor == rope["factor"]
        assert scaling.low_freq_factor == rope["low_freq_factor"]
        assert scaling.high_freq_factor == rope["high_freq_factor"]
        assert scaling.original_context == rope["original_max_position_embeddings"]
    for ours, key in {
        "vocab_size": "vocab_size", "embed_dim": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
        "mlp_dim": "intermediate_size_mlp", "expert_mlp_dim": "intermediate_size", "num_experts": "num_local_experts",
        "top_k": "num_experts_per_tok", "qk_norm": "use_qk_norm", "temperature_floor": "floor_scale",
        "temperature_coef": "attn_scale", "norm_eps": "rms_norm_eps", "context_length": "max_position_embeddings",
        "init_std": "initializer_range",
    }.items():  # fmt: skip
        assert getattr(config, ours) == getattr(theirs, key), key
    assert (config.query_scale == "temperature") == theirs.attn_temperature_tuning
    for i, spec in enumerate(config.layers):
        assert spec.rope == bool(theirs.no_rope_layers[i])
        assert spec.moe == (i in theirs.moe_layers)
        chunked = theirs.layer_types[i] == "chunked_attention"
        assert spec.chunk == (theirs.attention_chunk_size if chunked else None)


def maybe(values: st.SearchStrategy) -> st.SearchStrategy:
    """A value, or no such key."""
    return st.one_of(st.just(...), values)


THETA = st.sampled_from([1e4, 5e5, 7.0])
LENGTH = st.sampled_from([16, 64, 8192])
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope_dict(of: st.SearchStrategy) -> st.SearchStrategy:
    """A dictionary of RoPE; with the kind under either name, or both, of which one may say something else."""
    keys = {
        "rope_type": of, "type": of, "rope_theta": maybe(THETA), "original_max_position_embeddings": maybe(LENGTH),
        "partial_rotary_factor": maybe(st.sampled_from([None, 1.0])), "unknown": maybe(st.just(3)),
    }  # fmt: skip
    return st.fixed_dictionaries(keys).map(lambda d: LLAMA3 | {k: v for k, v in d.items() if v is not ...})


KIND = maybe(st.sampled_from(["default", "llama3"]))
SPELLINGS = st.fixed_dictionaries(
    {
        "rope_scaling": maybe(st.one_of(st.none(), st.just({}), rope_dict(KIND))),
        "rope_parameters": maybe(st.one_of(st.none(), st.just({}), rope_dict(KIND))),
        "rope_theta": maybe(THETA),
        "original_max_position_embeddings": maybe(LENGTH),
        "partial_rotary_factor": maybe(st.sampled_from([None, 1.0])),
        "moe_layers": maybe(st.sampled_from([None, [], [1, 3], [0]])),
        "interleave_moe_layer_step": maybe(st.sampled_from([1, 2, 9])),
        "no_rope_layers": maybe(st.sampled_from([None, [], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]])),
        "no_rope_layer_interval": maybe(st.sampled_from([1, 2, 4])),
        "layer_types": maybe(st.sampled_from([None, ["full_attention"] * 4, ["attention"] * 4])),
        "num_local_experts": maybe(st.sampled_from([2, 16])),
        "use_qk_norm": maybe(st.booleans()),
        "attn_temperature_tuning": maybe(st.booleans()),
        "floor_scale": maybe(st.just(4)),
        "torch_dtype": maybe(st.just("bfloat16")),
        "temperature": maybe(st.just(0.5)),  # of generation
        "tie_word_embeddings": maybe(st.just(False)),
        "sliding_window": maybe(st.none()),
    }
)


@settings(max_examples=60, deadline=None)
@given(SPELLINGS, st.sampled_from(["text", "nested", "nested without model_type", "no text_config"]))
def test_whatever_the_spelling_we_read_what_transformers_reads(tmp_path_factory, spelling, form):
    text = {**TINY, **{key: value for key, value in spelling.items() if value is not ...}}
    nested = {"model_type": "llama4", "text_config": text, "hidden_size": 7, "rope_theta": 3.0}  # which are passed over
    if form == "text":
        config_json = text
    elif form == "no text_config":
        config_json = {"model_type": "llama4", "text_config": None}
    else:
        config_json = nested
        if form == "nested without model_type":
            text.pop("model_type")
    read = theirs(config_json, tmp_path_factory.getbasetemp())
    assert_the_same(model_config(config_json), read if form == "text" else read.text_config)


@settings(max_examples=20, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "image_token_index": maybe(st.just(90)),
            "image_token_id": maybe(st.just(91)),
            "rope_theta": maybe(THETA),
            "rope_scaling": maybe(st.sampled_from([None, {}, {"rope_theta": 50.0}, {"type": "default"}])),
            "rope_parameters": maybe(st.sampled_from([None, {}, {"rope_theta": 60.0}])),
        }
    )
)
def test_a_vision_encoder_and_the_id_of_its_tokens_are_what_transformers_reads(tmp_path_factory, spelling):
    said = {key: value for key, value in spelling.items() if value is not ...}
    of_vision = {key: value for key, value in said.items() if "rope" in key}
    beside = {key: value for key, value in said.items() if "image" in key}
    config_json = {
        "model_type": "llama4", "text_config": TINY, "vision_config": {**VISION, **of_vision}, **beside,
    }  # fmt: skip
    read = theirs(config_json, tmp_path_factory.getbasetemp())
    vision = model_config(config_json).vision
    assert vision.patch_token_id == read.image_token_index
    assert vision.rope_theta == read.vision_config.rope_parameters["rope_theta"]


LOGITS = {
    "the original length beside the dictionary": {
        "rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 16,
    },
    "no experts at all": {
        "num_local_experts": 0, "num_experts_per_tok": 0, "moe_layers": [], "interleave_moe_layer_step": 0,
        "intermediate_size": 0,
    },
    "a flat file of the other type": {"model_type": "llama4", "rope_theta": 1e4},
}  # fmt: skip


@pytest.mark.parametrize("case", LOGITS)
def test_logits_are_those_of_transformers(case, tmp_path):
    said = {**TINY, "num_hidden_layers": 2, "no_rope_layer_interval": 2, **LOGITS[case]}
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = Llama4TextConfig.from_pretrained(tmp_path)
    model = Llama4ForCausalLM(config)
    hf.random_weights(model, seed=3)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(said))  # as it was
    model = Llama4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, 96, (1, 40)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    ours = llama4_jax.from_pretrained(tmp_path, dtype="float32")
    assert np.abs(np.asarray(ours(jnp.asarray(tokens))) - expected).max() < 3e-6 * np.abs(expected).max()
    again = to_hf_config(ours.config)
    assert model_config(again) == ours.config
    assert_the_same(ours.config, theirs(again, tmp_path))


def test_a_dense_model_goes_to_our_format_and_back_without_experts(tmp_path):
    model = Llama4ForCausalLM(Llama4TextConfig(**TINY | LOGITS["no experts at all"]))
    hf.random_weights(model, seed=3)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run")
    config = open_config(tmp_path / "run")
    assert (config.num_experts, config.top_k, config.expert_mlp_dim, config.num_moe_layers) == (0, 0, 0, 0)
    export(tmp_path / "run", tmp_path / "again", format="hf")
    again = Llama4ForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert again.config.num_local_experts == 0
    expected = model.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"chunked_attention": {"rope_type": "default"}}}, "rope_parameters.*chunked_attention"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": None}}, "rope_scaling: rope_type: expected `str`, got `null`"),
        ({"rope_scaling": "llama3"}, "rope_scaling: expected `object`, got `str`"),
        ({"rope_theta": None}, "rope_theta: expected `float`, got `null`"),
        ({"sliding_window": 512}, "sliding_window is 512"),
        ({"is_causal": False}, "is_causal is False"),
        ({"per_layer_config": {"0": {"intermediate_size": 3}}}, "per_layer_config is an object"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types must be chunked_attention .* 'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, but there are 4 layers"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step must be at least 1, got 0"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval: expected `int` >= 1"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers: expected `int` <= 4096"),
        ({"num_local_experts": 0}, "num_local_experts: model.num_experts must be at least 1, got 0"),
        ({"num_local_experts": 2**20}, "num_local_experts: model.num_experts must be at most 65,536"),
        ({"rms_norm_eps": -1}, r"config.json: rms_norm_eps: model.norm_eps must be positive .* got -1.0"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps: model.norm_eps must be positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: model.norm_eps must be a finite number"),
        ({"attn_scale": float("inf")}, "attn_scale: model.temperature_coef must be a finite number"),
        ({"hidden_size": 2**40}, "hidden_size: model.embed_dim must be at most 16,777,216"),
        ({"num_attention_heads": 0}, "num_attention_heads: model.num_heads must be at least 1, got 0"),
        ({"moe_layers": 3}, "moe_layers: expected `array | null`, got `int`"),
        ({"floor_scale": 0.5}, "floor_scale must be a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_by_key(said, message):
    with pytest.raises(ValueError, match=message) as caught:
        model_config({**TINY, **said})
    assert str(caught.value).startswith("config.json: ") and len(str(caught.value)) < 500


def test_norms_of_the_vision_encoder_are_what_transformers_makes_them():
    config_json = {"model_type": "llama4", "text_config": TINY, "vision_config": {**VISION, "norm_eps": 1e-6}}
    with pytest.raises(ValueError, match="vision_config.norm_eps is 1e-06, but only 1e-05 is supported"):
        model_config(config_json)
    config = model_config({**config_json, "vision_config": VISION})
    object.__setattr__(config.vision, "norm_eps", 1e-6)
    with pytest.raises(ValueError, match="vision.norm_eps cannot be 1e-06"):
        to_hf_config(config)

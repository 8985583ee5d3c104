"""config.json ↔ ModelConfig, judged by `transformers`: what it writes, what it loads, and what it computes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from oracles import hf
from oracles.cases import CASES, SCOUT, tokens
from transformers import AutoConfig, Llama4Config, Llama4ForCausalLM, Llama4TextConfig, Llama4VisionConfig

from llama4_jax.model.config import ModelConfig, RopeScaling, VisionConfig
from llama4_jax.model.presets import preset
from llama4_jax.weights.hf_config import model_config, model_config_fields, provenance, to_hf_config


def shortly(value) -> str:
    """A readable test id: the keys of a dictionary, the beginning of anything else."""
    return "-".join(value) if isinstance(value, dict) else str(value)[:24]


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_a_config_written_by_transformers_says_what_the_case_is(case, tmp_path):
    hf.config(case).save_pretrained(tmp_path)
    config = model_config(json.loads((tmp_path / "config.json").read_text()))
    rope = case.rope_scaling
    assert config == ModelConfig(
        vocab_size=case.vocab,
        embed_dim=case.embed,
        num_layers=case.layers,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        mlp_dim=case.mlp,
        expert_mlp_dim=case.expert_mlp,
        num_experts=case.experts,
        top_k=case.top_k,
        moe_layers=case.moe,
        rope_layers=case.rope,
        attention_chunk=case.chunk,
        qk_norm=case.qk_norm,
        rope_theta=case.rope_theta,
        rope_scaling=rope
        and RopeScaling(
            factor=rope.factor,
            low_freq_factor=rope.low,
            high_freq_factor=rope.high,
            original_context=rope.original,
        ),
        query_scale="temperature" if case.temperature else "none",
        temperature_floor=case.temperature_floor,
        temperature_coef=case.temperature_coef,
        norm_eps=case.norm_eps,
        context_length=1024,
    )


@every_case
def test_our_config_json_loads_in_transformers_and_computes_the_same(case, tmp_path):
    exported = to_hf_config(model_config(hf.config(case).to_dict()))
    (tmp_path / "config.json").write_text(json.dumps(exported))
    theirs = AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    assert isinstance(theirs, Llama4TextConfig)
    model = Llama4ForCausalLM(theirs).eval()
    model.load_state_dict(hf.reference(case).model.state_dict())
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens(case)), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(logits, hf.logits(case))


@every_case
def test_our_config_survives_the_round_trip(case):
    config = model_config(hf.config(case).to_dict())
    assert model_config(to_hf_config(config)) == config


@pytest.mark.parametrize("name", ["scout", "maverick", "dense_1b", "behemoth_like"])
def test_a_preset_survives_the_round_trip_layer_by_layer(name):
    config = preset(name)
    again = model_config(to_hf_config(config))
    assert again.layers == config.layers
    patterns = {"moe_interval", "moe_layers", "nope_interval", "rope_layers"}
    for field in dataclasses.fields(ModelConfig):
        if field.name not in patterns:
            assert getattr(again, field.name) == getattr(config, field.name), field.name


def published(**changes) -> dict:
    """The old-style keys of the released files, as far as they matter here."""
    text = {
        "model_type": "llama4_text",
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "use_qk_norm": True,
        "vocab_size": 202048,
    }
    return {"model_type": "llama4", "text_config": {**text, **changes}, "tie_word_embeddings": False}


def test_the_published_scout_is_the_scout_preset():
    config, scout = model_config(published()), preset("scout")
    assert config.layers == scout.layers
    same = {"moe_layers": None, "rope_layers": None}
    assert dataclasses.replace(config, **same) == dataclasses.replace(scout, **same)


def test_the_published_maverick_is_the_maverick_preset():
    config = model_config(
        published(
            interleave_moe_layer_step=2,
            num_local_experts=128,
            use_qk_norm=False,
            rope_scaling=None,
            max_position_embeddings=1048576,
        )
    )
    maverick = preset("maverick")
    assert config.layers == maverick.layers
    assert config.rope_scaling is None
    assert config.num_experts == 128
    assert config.context_length == maverick.context_length


def test_defaults_are_those_of_the_hugging_face_class():
    """A file that says nothing means what `Llama4TextConfig()` means."""
    assert model_config({"model_type": "llama4_text"}) == model_config(Llama4TextConfig().to_dict())


def test_a_nested_config_written_by_transformers_is_read(tmp_path):
    published = {"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096}
    vision = Llama4VisionConfig(**published)
    Llama4Config(text_config=hf.config(SCOUT), vision_config=vision).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert nested["model_type"] == "llama4"
    text = model_config(hf.config(SCOUT).to_dict())
    assert model_config(nested) == dataclasses.replace(text, vision=VisionConfig())
    assert model_config(to_hf_config(model_config(nested))) == model_config(nested)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_output_dim": 7680}, r"vision_output_dim is 7680, but .* projector_output_dim, 4096"),
        ({"hidden_size": 768}, r"intermediate_size is 5632, but the pixel shuffle makes vectors of .* = 3072"),
        ({"image_size": [336, 448]}, r"image_size must be square, got \[336, 448\]"),
        ({"hidden_act": "relu"}, r"vision_config\.hidden_act is 'relu', but only 'gelu'"),
    ],
)
def test_a_vision_encoder_that_cannot_run_is_refused_by_field(changes, said):
    vision = {"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096, **changes}
    with pytest.raises(ValueError, match=said):
        model_config({**published(), "vision_config": vision})


def test_every_field_says_where_it_comes_from():
    found = provenance({**published(), "vision_config": {"hidden_size": 1408}})
    assert set(found) == {field.name for field in dataclasses.fields(ModelConfig)}
    assert found["rope_scaling"] == "config.json: text_config.rope_scaling"
    assert found["rope_layers"] == "default of transformers' Llama4TextConfig"  # the file's list is empty
    assert found["moe_layers"] == "config.json: text_config.interleave_moe_layer_step"
    assert found["query_scale"] == "default of transformers' Llama4TextConfig"
    assert found["vision"] == "config.json: vision_config"


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"no_rope_layers": None}, "rope_layers", ((True, True, True, False) * 12)),
        ({"no_rope_layers": [], "no_rope_layer_interval": 3}, "rope_layers", ((True, True, False) * 16)),
        ({"moe_layers": []}, "moe_layers", (False,) * 48),
        ({"moe_layers": [0, 47]}, "moe_layers", (True, *[False] * 46, True)),
        ({"attn_temperature_tuning": False}, "query_scale", "none"),
        ({"attn_temperature_tuning": 4}, "query_scale", "temperature"),
        ({"floor_scale": 4096.0}, "temperature_floor", 4096),
        ({"attention_chunk_size": None}, "attention_chunk", None),
        ({"rope_scaling": None, "rope_theta": 1e4}, "rope_theta", 1e4),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"num_key_value_heads": None}, "num_kv_heads", 40),
    ],
    ids=shortly,
)
def test_one_key_sets_one_field(changes, field, value):
    before, after = model_config_fields(published()), model_config_fields(published(**changes))
    assert after[field] == value
    assert {name for name in before if before[name] != after[name]} <= {field, "rope_scaling"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers has 3 entries, but there are 48 layers"),
        ({"moe_layers": [47, 48]}, r"moe_layers names \[48\]"),
        ({"layer_types": ["chunked_attention"] * 48}, "layer_types must be chunked_attention on the layers with RoPE"),
        ({"floor_scale": 0.5}, "floor_scale must be a whole number"),
    ],
    ids=shortly,
)
def test_what_this_model_cannot_do_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model_config_fields(published(**changes))


def test_tied_embeddings_said_beside_the_text_config_are_refused_too():
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        model_config_fields({**published(), "tie_word_embeddings": True})


@pytest.mark.parametrize("kind", ["llama", "mllama", None])
def test_another_kind_of_model_is_refused(kind):
    with pytest.raises(ValueError, match=f"model_type is {kind!r}"):
        model_config_fields({"model_type": kind})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_scale": "ssmax"}, "query_scale 'ssmax' has no counterpart"),
        ({"query_scale_layers": "all"}, "query_scale_layers must be 'nope'"),
        ({"router_bias": True}, "router_bias must be False"),
    ],
    ids=shortly,
)
def test_what_hugging_face_cannot_do_is_not_exported(changes, message):
    with pytest.raises(ValueError, match=message):
        to_hf_config(dataclasses.replace(preset("scout"), **changes))

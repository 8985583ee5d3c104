"""params.json ↔ ModelConfig, judged by the shapes that Meta's own modules derive from it."""

import dataclasses
import json

import pytest
import torch
from make_checkpoints import META
from oracles import hf, meta
from oracles.cases import CASES

from llama4_jax.model.config import ModelConfig, RopeScaling, VisionConfig
from llama4_jax.model.presets import preset
from llama4_jax.weights.hf_config import model_config as hf_model_config
from llama4_jax.weights.meta_config import model_config, provenance, to_params
from llama4_jax.weights.table import rows

# The released Scout's, as far as is known from the sizes: its widths come from these multipliers.
SCOUT = {
    "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202_048, "ffn_dim_multiplier": 1.2,
    "multiple_of": 2048, "ffn_exp": 4.0, "norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True,
    "nope_layer_interval": 4, "attention_chunk_size": 8192, "use_qk_norm": True,
    "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
    "vision_args": {
        "image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14}, "dim": 1408,
        "n_layers": 34, "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096, "pixel_shuffle_ratio": 0.5,
    },
}  # fmt: skip
PATTERN = {"moe_layers": None, "rope_layers": None, "moe_interval": 1, "nope_interval": 4}


def test_scout_is_the_preset_but_for_the_temperature_that_metas_files_leave_off():
    config = model_config(SCOUT)
    expected = dataclasses.replace(preset("scout"), query_scale="none", vision=VisionConfig())
    assert config == expected
    assert config.rope_scaling == RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_context=8192
    )
    assert model_config({"model": SCOUT, "tokenizer": {}}) == config


def test_maverick_is_the_preset():
    params = {key: value for key, value in SCOUT.items() if key not in ("vision_args", "use_qk_norm")}
    params |= {"use_scaled_rope": False, "attn_temperature_tuning": True}
    params["moe_args"] = {**SCOUT["moe_args"], "num_experts": 128, "interleave_moe_layer_step": 2}
    assert model_config(params) == preset("maverick")


@pytest.mark.parametrize(
    "multipliers",
    [
        {"ffn_dim_multiplier": 1.2, "multiple_of": 32, "ffn_exp": 4.0},
        {"ffn_dim_multiplier": 0.7, "multiple_of": 1, "ffn_exp": 2.5},
        {"ffn_dim_multiplier": 1.3, "multiple_of": 7, "ffn_exp": 3.0},
    ],
)
@pytest.mark.parametrize("auto_scale", [True, False])
@pytest.mark.parametrize("capacity", [1.0, 2.0])
def test_widths_are_those_that_metas_modules_derive(multipliers, auto_scale, capacity):
    args = meta.args(META).model_copy(update=multipliers)
    args.moe_args = args.moe_args.model_copy(update={"auto_scale_F": auto_scale, "capacity_factor": capacity})
    shapes = {name: tuple(tensor.shape) for name, tensor in meta.empty(args).state_dict().items()}
    config = model_config(json.loads(args.model_dump_json()))
    expected = {}
    for row in rows(config):
        layout = row.meta[-1]  # the keys of Meta's own modules
        expected |= dict.fromkeys(layout.names, row.file_shape(layout))
    assert shapes == expected


@pytest.mark.parametrize("case", [case for case in CASES if case.meta], ids=lambda case: case.name)
def test_a_config_survives_the_round_trip(case):
    config = hf_model_config(hf.config(case).to_dict())
    if config.rope_scaling is not None:
        config = dataclasses.replace(
            config, rope_scaling=dataclasses.replace(config.rope_scaling, original_context=8192)
        )
    config = dataclasses.replace(config, vision=VisionConfig(embed_dim=32, num_heads=4, mlp_dim=96))
    again = model_config(to_params(config))
    assert again.layers == config.layers
    loose = {"moe_layers", "rope_layers", "moe_interval", "nope_interval", "context_length"}
    if not any(spec.moe for spec in config.layers):
        loose |= {"num_experts", "top_k", "expert_mlp_dim"}
    if all(spec.moe for spec in config.layers):
        loose |= {"mlp_dim"}  # no layer has it
    for field in dataclasses.fields(ModelConfig):
        if field.name not in loose:
            assert getattr(again, field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_the_released_models_are_written_with_the_released_multipliers(name):
    params = to_params(preset(name))
    assert (params["ffn_dim_multiplier"], params["multiple_of"], params["ffn_exp"]) == (1.2, 2048, 4.0)
    assert params["moe_args"]["auto_scale_F"]
    assert model_config(params) == preset(name)


def test_every_field_says_where_it_comes_from():
    found = provenance(SCOUT)
    assert set(found) == {field.name for field in dataclasses.fields(ModelConfig)}
    assert found["rope_scaling"] == "params.json: use_scaled_rope"
    assert found["query_scale"] == "default of llama-models' ModelArgs"
    assert found["mlp_dim"] == "derived from params.json: dim, ffn_dim_multiplier, multiple_of"
    assert found["context_length"] == "preset 'scout', whose sizes these are"
    assert provenance({"model": SCOUT})["vocab_size"] == "params.json: model.vocab_size"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": ...}, "params.json: dim missing"),
        ({"vocab_size": -1}, "vocab_size is missing"),
        ({"head_dim": 64}, "head_dim is 64, but Meta's attention has dim / n_heads"),
        ({"ffn_exp": None}, "ffn_exp is missing"),
        ({"lora_args": {"rank": 8, "scale": 2.0}}, "lora_args are not supported"),
        (
            {"vision_args": {**SCOUT["vision_args"], "patch_size": {"height": 14, "width": 7}}},
            r"vision_args\.patch_size must be square",
        ),
    ],
)
def test_what_cannot_be_read_is_said_by_key(changes, said):
    params = {key: value for key, value in {**SCOUT, **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=said):
        model_config(params)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 64}, r"head_dim \(64\) must be embed_dim / num_heads"),
        ({"moe_layers": (True, *[False] * 47)}, "its layers must follow a moe_interval"),
        ({"query_scale": "ssmax"}, "query_scale must be 'none' or 'temperature', got 'ssmax'"),
        ({"rope_scaling": RopeScaling(low_freq_factor=0.5)}, "rope_scaling must have a low_freq_factor of 1"),
        ({"router_bias": True}, "router_bias must be False"),
        ({"vision": VisionConfig(adapter_dim=8)}, r"vision\.adapter_dim must equal vision\.output_dim"),
    ],
)
def test_a_model_that_metas_code_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        to_params(dataclasses.replace(preset("scout"), **changes))


def test_vision_rows_have_the_published_shapes():
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {"num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 8, "num_local_experts": 2}
    vision = {"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096}
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))
    expected = {
        name.removeprefix("model."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if "vision" in name or "multi_modal" in name
    }
    config = dataclasses.replace(preset("scout"), vision=VisionConfig())
    written = {}
    for row in rows(config):
        if row.ours.startswith(("vision.", "projector.")):
            written[row.hf[0].names[0]] = row.file_shape(row.hf[0])
    assert written == expected
    # of one of Meta's eight ranks
    shards = {row.meta[0].names[0]: row.file_shape(row.meta[0], 8) for row in rows(config)}
    encoder = "vision_embeddings.vision_encoder."
    assert shards[encoder + "conv1._linear.weight"] == (176, 588)
    assert shards[encoder + "transformer.resblocks.33.attn.wq.weight"] == (176, 1408)
    assert shards[encoder + "transformer.resblocks.33.attn.wo.weight"] == (1408, 176)
    assert shards[encoder + "transformer.resblocks.33.mlp.c_fc.bias"] == (704,)
    assert shards[encoder + "positional_embedding_vlm"] == (577, 1408)
    assert shards["vision_embeddings.vision_adapter.mlp.c_fc.weight"] == (512, 5632)
    assert shards["vision_embeddings.vision_adapter.mlp.c_proj.weight"] == (4096, 512)
    assert shards["vision_projection.weight"] == (640, 4096)

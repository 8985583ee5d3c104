"""A run begins from any directory: its model and tokenizer are taken unless a flag says otherwise."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import llama4_jax
from llama4_jax import Llama4
from llama4_jax.config import from_json
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.model.config import ModelConfig, VisionConfig
from llama4_jax.model.presets import preset
from llama4_jax.train.begin import check_fits, given_fields, other_tensors
from llama4_jax.train.loop import train
from llama4_jax.train_cli import read_config

MODEL = ModelConfig(
    vocab_size=320, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, expert_mlp_dim=16,
    num_experts=2, nope_interval=2, attention_chunk=16, temperature_floor=16, context_length=64, init_std=0.1,
    rope_theta=10_000.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face directory whose sizes no config has."""
    path = tmp_path_factory.mktemp("hf") / "source"
    return llama4_jax.save(Llama4(MODEL, seed=7), path, tokenizer=ByteTokenizer(), format="hf")


def read(source, *flags):
    return read_config(["tiny", "--init-from", str(source), "--data.seq-len", "32", *flags], "train.py")


def test_model_and_tokenizer_are_those_of_the_directory_and_it_is_said(source, capsys):
    config = read(source)
    sizes = ("vocab_size", "embed_dim", "num_heads", "expert_mlp_dim", "num_experts", "rope_theta", "context_length")
    assert [getattr(config.model, name) for name in sizes] == [getattr(MODEL, name) for name in sizes]
    assert config.model.layers == MODEL.layers
    assert config.data.tokenizer == str(source) and config.name.startswith("tiny,data.seq_len=32,init_from=")
    said = capsys.readouterr().err
    assert f"the model is that of {source}, in place of the config's, which has another embed_dim" in said
    assert f"the tokenizer is that of {source}" in said


def test_flags_win_and_those_that_change_shapes_are_refused_by_name(source, capsys):
    config = read(source, "--model.query-scale", "none", "--model.attention-chunk", "8", "--data.tokenizer", "bytes")
    assert config.model.embed_dim == 16 and config.model.query_scale == "none" and config.model.attention_chunk == 8
    assert config.data.tokenizer == "bytes" and "but for attention_chunk=8, query_scale='none'" in " ".join(
        sorted(capsys.readouterr().err.split("init_from: "))
    ).replace("query_scale='none', attention_chunk=8", "attention_chunk=8, query_scale='none'")
    with pytest.raises(ValueError, match=r"model.embed_dim is 16 there and 24 here; .*Leave these flags out") as error:
        read(source, "--model.embed-dim", "24", "--model.num-experts", "3")
    assert "model.num_experts is 2 there and 3 here" in str(error.value) and len(str(error.value)) < 500


def test_a_run_trains_the_directorys_model_and_the_same_command_resumes_it(source, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(16):
        (tmp_path / "data" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x\n" * 20)

    def trained_run():
        sources = ["--data.sources", f"text:{tmp_path}/data/*.txt", "--data.heldout-fraction", "0"]
        how = ["--optimizer.peak-lr", "1e-9", "--steps", "1", "--sample-tokens", "1", "--sample-prompt", "d"]
        return train(read(source, *sources, *how, "--run-dir", str(tmp_path)))

    run = trained_run()
    capsys.readouterr()
    assert trained_run() == run
    said = " ".join(capsys.readouterr().out.split())
    assert "resumed at step 1 of 1" in said, said
    saved = from_json((run / "config.json").read_text())
    assert saved.model.embed_dim == 16 and saved.model.rope_theta == 10_000.0
    trained, begun = (llama4_jax.from_pretrained(path, dtype="float32") for path in (run, source))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained, begun)


def test_a_model_that_does_not_fit_is_named_by_its_fields_where_no_flags_are(source):
    config = dataclasses.replace(read(source), model=preset("tiny"))
    with pytest.raises(ValueError, match=r"of another model: model.embed_dim is 16 there and 192 here; .*begun_from"):
        check_fits(config)


def test_fields_that_make_other_tensors_are_told_from_those_that_do_not():
    change = lambda **fields: other_tensors(dataclasses.replace(MODEL, **fields), MODEL)  # noqa: E731
    assert change(rope_theta=1.0, qk_norm=False, attention_chunk=4, top_k=2, context_length=9, mlp_dim=7) == []
    assert change(router_bias=True, vision=VisionConfig()) == []  # begin anew
    assert other_tensors(MODEL, dataclasses.replace(MODEL, router_bias=True)) == ["router_bias"]
    assert change(num_experts=3) == ["num_experts"] and change(query_scale="ssmax") == ["query_scale"]
    assert change(moe_interval=2) == ["moe_interval"]
    assert change(moe_interval=2, mlp_dim=7) == ["moe_interval", "mlp_dim"]


def test_flags_name_their_fields():
    flags = ["tiny", "--model.no-router-bias", "--model.rope-scaling.factor=2", "--data.tokenizer", "x", "--steps", "3"]
    assert given_fields(flags) == {"model.router_bias", "model.rope_scaling", "data.tokenizer", "steps"}
    assert json.dumps(sorted(given_fields(["--model.num_layers", "2"]))) == '["model.num_layers"]'

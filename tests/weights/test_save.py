"""What was trained in one's own loop is a directory that everything reads, transformers too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llama4_jax
from llama4_jax import Llama4
from llama4_jax.inputs.tokenizer import ByteTokenizer, load_tokenizer
from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.weights.load import named_variables

CONFIG = ModelConfig(
    vocab_size=320, embed_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, expert_mlp_dim=24,
    num_experts=3, moe_interval=2, nope_interval=2, attention_chunk=16, temperature_floor=8, context_length=64,
    init_std=0.08,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (2, 40), 0, 256)


@pytest.fixture(scope="module")
def model():
    return Llama4(CONFIG, seed=3)


@pytest.mark.parametrize("format", ["orbax", "hf", "meta"])
def test_a_model_comes_back_bit_for_bit_from_every_format(model, tmp_path, format):
    path = llama4_jax.save(model, tmp_path / "deep" / "model", tokenizer=ByteTokenizer(), format=format)
    back = llama4_jax.from_pretrained(path, dtype="float32")
    mine, theirs = (named_variables(m) for m in (model.unscanned(), back))
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name][...], theirs[name][...], err_msg=name)
    assert load_tokenizer(path).vocab_size == 320
    assert [file.name for file in path.parent.iterdir()] == ["model"]


def test_transformers_reads_what_is_saved_and_computes_the_same(model, tmp_path):
    path = llama4_jax.save(model, tmp_path / "hf", format="hf")
    theirs = transformers.Llama4ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = theirs(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    np.testing.assert_allclose(model(TOKENS), logits, atol=2e-5 * np.abs(logits).max())


def test_biases_dtypes_and_companions_are_kept_and_a_killed_save_is_begun_anew(tmp_path):
    config = dataclasses.replace(CONFIG, router_bias=True, num_layers=2)
    biased = Llama4(config, precision=Precision(params="bfloat16"))
    for layer in biased.layers[1:]:
        layer.moe.bias[...] = jnp.array([0.5, -0.25, -0.25])
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    ByteTokenizer().save(tokenizer)
    (tokenizer / "generation_config.json").write_text("{}")
    left = tmp_path / "model.unfinished"
    left.mkdir()
    (left / "finished.jsonl").write_text('{"saved": "before"}\nembed.embedding\n')
    path = llama4_jax.save(biased, tmp_path / "model", tokenizer=tokenizer)
    back = llama4_jax.from_pretrained(path)
    np.testing.assert_array_equal(back.layers[1].moe.bias[...], biased.layers[1].moe.bias[...])
    assert (path / "generation_config.json").is_file() and not left.exists()
    with pytest.raises(ValueError, match="router_bias must be False"):
        llama4_jax.save(biased, tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()


def test_what_cannot_be_saved_is_said_and_leaves_nothing(model, tmp_path):
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ({"destination": tmp_path / "there"}, "exists already"),
        ({"tokenizer": tmp_path / "there"}, "no directory with a tokenizer"),
        ({"tokenizer": 3}, "tokenizer must be a tokenizer, a Processor or a directory, got 3"),
        ({"shards": 2}, "shards is of the formats hf and meta"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            llama4_jax.save(model, **{"destination": tmp_path / "model", **arguments})
    broken = Llama4(CONFIG)
    broken.lm_head.kernel[...] = broken.lm_head.kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"lm_head.kernel holds a value that is not finite"):
        llama4_jax.save(broken, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["there"]

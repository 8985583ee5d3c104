"""LoRA runs as users have them: checkpoints of adapters, their base, resuming, generating, merging, few bits."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from lora_cases import base, logits, run_config

import llama4_jax
from llama4_jax import cli, infer_cli
from llama4_jax.config import from_json, to_json
from llama4_jax.configs import load_config
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.model.config import LoraConfig
from llama4_jax.ops.quantization import Scheme
from llama4_jax.train.loop import train
from llama4_jax.train_cli import read_config
from llama4_jax.weights.orbax_arrays import stored_arrays
from llama4_jax.weights.quantize import quantize
from llama4_jax.weights.source import newest_weights, open_weights

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 24))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and a finished run of four steps with checkpoints after two and four."""
    place = tmp_path_factory.mktemp("lora")
    base(place / "base")
    train(run_config(place, place / "base"))
    return place


@pytest.fixture
def copy(place, tmp_path):
    """The model of the run; the base stays where it is."""
    return shutil.copytree(place / "lora", tmp_path / "lora")


def arrays(run, step: int) -> dict[str, np.ndarray]:
    found = {item: stored_arrays(run / "checkpoints" / str(step), item) for item in ("model", "training")}
    return {f"{item} {name}": np.asarray(x.read().result()) for item, all in found.items() for name, x in all.items()}


def test_a_checkpoint_holds_factors_and_their_moments_alone(place):
    found = arrays(place / "lora", 4)
    factors = {name for name in found if "lora." in name}
    assert len(factors) == 3 * 32, "of each its value and two moments"
    assert all(found[name].ndim == 0 for name in found.keys() - factors), "counters"


def test_a_resumed_run_is_the_same_bit_for_bit(place, copy, tmp_path, capsys):
    expected = arrays(copy, 4)
    shutil.rmtree(copy / "checkpoints" / "4")
    train(run_config(place, place / "base", run_dir=str(tmp_path)))
    assert "resumed at step 2 of 4" in " ".join(capsys.readouterr().out.split())
    found = arrays(copy, 4)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_another_base_is_refused_when_it_resumes_loads_and_merges(place, copy, tmp_path, capsys):
    other = base(tmp_path / "other", seed=8)
    file = copy / "base.json"
    file.write_text(file.read_text().replace(str(place / "base"), str(other)))
    said = "other holds other weights than those that the adapters in .* belong on"
    with pytest.raises(ValueError, match=said):
        train(run_config(place, place / "base", run_dir=str(tmp_path), steps=5))
    with pytest.raises(ValueError, match=said):
        llama4_jax.from_pretrained(copy)
    assert cli.main(["merge", str(copy), str(tmp_path / "out")]) == 2
    assert "holds other weights" in capsys.readouterr().err and not (tmp_path / "out").exists()
    file.write_text(file.read_text().replace(str(other), str(tmp_path / "gone")))
    with pytest.raises(
        FileNotFoundError, match="base is not there: no such directory: .*gone.*or write where it is into"
    ):
        llama4_jax.from_pretrained(copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no base.json that says which weights they belong on"):
        llama4_jax.from_pretrained(copy)


def test_a_base_that_was_trained_on_is_taken_at_the_step_of_then(place, copy, tmp_path):
    of_then = shutil.copytree(place / "base", tmp_path / "base")
    file = copy / "base.json"
    file.write_text(file.read_text().replace(str(place / "base"), str(of_then)))
    expected = logits(llama4_jax.from_pretrained(place / "lora", dtype="float32"), TOKENS)
    other = base(tmp_path / "other", seed=8)
    (other / "checkpoints" / "0").rename(of_then / "checkpoints" / "7")
    np.testing.assert_array_equal(logits(llama4_jax.from_pretrained(copy, dtype="float32"), TOKENS), expected)
    shutil.rmtree(of_then / "checkpoints" / "0")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 0 any more: it has those of 7"):
        llama4_jax.from_pretrained(copy)


def test_damaged_adapters_give_way_to_the_checkpoint_before(copy, capsys):
    for step in (4, 2):
        files = (copy / "checkpoints" / str(step) / "model").rglob("d/*")
        file = max(files, key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(bytes(content))
        if step == 4:
            assert llama4_jax.from_pretrained(copy) is not None
            assert "checkpoints/4 is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the checkpoints"):
        llama4_jax.from_pretrained(copy)


def test_a_merged_run_gives_what_the_run_gives_and_quantizes_and_exports(place, tmp_path, capsys):
    assert cli.main(["merge", str(place / "lora"), str(tmp_path / "merged"), "--verify"]) == 0
    ours, merged, before = (
        logits(llama4_jax.from_pretrained(path, dtype="float32"), TOKENS)
        for path in (place / "lora", tmp_path / "merged", place / "base")
    )
    np.testing.assert_allclose(merged, ours, atol=3e-6 * np.abs(ours).max())
    assert np.abs(ours - before).max() > 0.1
    weights, expected = open_weights(tmp_path / "merged"), open_weights(place / "lora")
    assert weights.names == expected.names
    part = (slice(1, 3), slice(0, 2), slice(5, 9), slice(0, 16))
    whole = expected.read("layers.1.moe.gate_up")
    np.testing.assert_array_equal(expected.read("layers.1.moe.gate_up", part), whole[part])
    np.testing.assert_array_equal(weights.read("layers.1.moe.gate_up"), whole)
    assert cli.main(["merge", str(tmp_path / "merged"), str(tmp_path / "no")]) == 2
    assert "holds no adapters: there is nothing to merge" in capsys.readouterr().err
    assert cli.main(["inspect", str(place / "lora")]) == 0
    said = capsys.readouterr().out
    assert "adapters of rank 4, scale 2, for" in said and "layers.*.moe.gate_up_lora.a" in said


def test_generating_with_a_run_gives_what_its_logits_say(place, capsys):
    run = str(place / "lora")
    how = ["--dtype", "float32", "--max-new-tokens", "4", "--temperature", "0"]
    assert infer_cli.main(["generate", run, "--prompt", "def ", *how]) == 0
    written = capsys.readouterr().out
    model, tokenizer = llama4_jax.from_pretrained(run, dtype="float32"), ByteTokenizer()
    tokens = tokenizer.encode("def ", bos=True)
    for _ in range(4):
        tokens = [*tokens, int(logits(model, [tokens + [0] * (24 - len(tokens))])[0, len(tokens) - 1].argmax())]
    assert tokenizer.decode(tokens, skip_special=True).strip() in written


def test_training_beside_few_bits_leaves_their_bytes_as_they_are_and_is_loaded_so(place, tmp_path):
    few = tmp_path / "int4"
    quantize(place / "base", few, Scheme("int4", 8))
    files = {file: file.read_bytes() for file in few.rglob("*") if file.is_file()}
    run = train(run_config(tmp_path, few, lora=LoraConfig(rank=4), steps=2))
    assert files == {file: file.read_bytes() for file in few.rglob("*") if file.is_file()}
    model = llama4_jax.from_pretrained(run, dtype="float32")
    assert model.layers[1].moe.gate_up[...].dtype == jnp.int4 and model.layers[0].attention.q.lora is not None
    small, merged = open_weights(few), open_weights(run)
    assert merged.dtype("layers.1.moe.gate_up").name == "bfloat16" and "int4" not in merged.names
    assert set(merged.names) == {name for name in small.names if not name.endswith("_scale")}
    factors = newest_weights(run)
    a, b = (factors.read(f"layers.1.moe.down_lora.{each}").astype(np.float64) for each in "ab")
    assert np.abs(b).max() > 0
    values = np.asarray(model.layers[1].moe.down[...].astype(jnp.float32), np.float64)
    scale = np.repeat(np.asarray(model.layers[1].moe.down_scale[...], np.float64), 8, axis=1)
    expected = values * scale + np.einsum("efr,erd->efd", a, b) * 8
    np.testing.assert_allclose(merged.read("layers.1.moe.down").astype(np.float64), expected, rtol=2**-8, atol=1e-6)


def test_what_is_wrong_is_said_before_any_work(place, tmp_path):
    flags = ["tiny_lora", "--init-from", str(place / "base"), "--run-dir", str(tmp_path), "--data.seq-len", "32",
             "--data.sources", f"text:{place / 'text.txt'}"]  # fmt: skip

    def refused(match: str, *more: str):
        with pytest.raises(ValueError, match=match):
            train(read_config([*flags, *more], "train.py"))

    refused(r"'layers.\*.moe.expert' chooses no layer. Did you mean layers.\*.moe.experts", "--lora.targets",
            "layers.*.moe.expert")  # fmt: skip
    refused("rank is 40, but layers.0.attention.k has 32 inputs and 8 outputs", "--lora.rank", "40")
    with pytest.raises(ValueError, match="there are no weights that adapters could learn beside"):
        train(dataclasses.replace(read_config(flags, "train.py"), init_from=None))
    assert not list(tmp_path.iterdir())


def test_a_run_config_of_before_is_read_as_one_without_adapters():
    config = load_config("tiny")
    tree = json.loads(to_json(config))
    del tree["lora"]
    assert from_json(json.dumps(tree)) == config
    moved = dataclasses.replace(config.balance, bias_rate=1e-3)
    with pytest.raises(ValueError, match="biases are the base's and stay"):
        dataclasses.replace(config, lora=LoraConfig(rank=2), balance=moved)

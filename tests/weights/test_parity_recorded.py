"""`llama4 parity --against-activations`: another program's activations, recorded from transformers as docs/parity.md
says, and files that are none."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from oracles import hf
from oracles.cases import SCOUT

from llama4_jax.cli import main

TWO = dataclasses.replace(SCOUT, name="two", layers=2)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The directory of a model, and what passed through transformers' with it."""
    path = tmp_path_factory.mktemp("two")
    model = hf.reference(TWO).model.eval()
    model.save_pretrained(path)
    tokens = torch.randint(0, TWO.vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    acts = {"tokens": tokens.numpy()}

    def keep(name):
        def hook(module, inputs, output):
            acts[name] = (output[0] if isinstance(output, tuple) else output).detach().float().numpy()

        return hook

    model.model.embed_tokens.register_forward_hook(keep("embed"))
    for i, layer in enumerate(model.model.layers):
        for name, part in (("hidden", layer), ("attention", layer.self_attn), ("feed_forward", layer.feed_forward)):
            part.register_forward_hook(keep(f"layers.{i}.{name}"))
    acts["logits"] = model(tokens).logits.detach().float().numpy()
    return path, acts


def parity(capsys, tmp_path, path, acts, *flags) -> tuple[int, str, str]:
    np.savez(tmp_path / "acts.npz", **acts)
    code = main(["parity", str(path), "--against-activations", str(tmp_path / "acts.npz"), "--decode", "0", *flags])
    return code, *capsys.readouterr()


def test_what_transformers_recorded_is_what_we_compute(capsys, tmp_path, recorded):
    code, out, _ = parity(capsys, tmp_path, *recorded)
    assert code == 0 and "SAME within 1e-05" in out and "recorded in" in out


def test_the_mistake_of_another_program_is_named(capsys, tmp_path, recorded):
    """It computes with a RoPE factor of 16, and the directory says 8: as if it had read the config wrongly."""
    path, acts = recorded
    other = shutil.copytree(path, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["factor"] = 8.0
    (other / "config.json").write_text(json.dumps(config))
    code, out, _ = parity(capsys, tmp_path, other, acts)
    assert code == 1 and "DIFFERENT, first in layer " in out
    assert "the reference with a RoPE factor of 16" in out and "the reference does not compute what its config" in out


def test_the_first_layer_that_differs_is_found_in_hidden_states_alone(capsys, tmp_path, recorded):
    path, acts = recorded
    few = {name: x for name, x in acts.items() if "attention" not in name and "feed_forward" not in name}
    few["layers.1.hidden"] = few["layers.1.hidden"] * np.float32(1.01)
    code, out, _ = parity(capsys, tmp_path, path, few)
    assert code == 1 and "DIFFERENT, first in layer 1 (" in out
    assert "with attention and feed_forward of this layer" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.1.hidden": None}, "lacks the arrays layers.1.hidden"),
        ({"tokens": np.zeros((2, 40))}, "tokens must be integers"),
        ({"tokens": np.full((2, 40), 10**6)}, "tokens has ids from 1000000"),
        ({"embed": np.zeros((2, 40, 3))}, "embed must be floats [2, 40, "),
        ({"logits": np.zeros((2, 40, TWO.vocab), int)}, "logits must be floats"),
        ({"layers.0.hiden": np.zeros((2, 40, 64))}, "no array of the name 'layers.0.hiden'"),
        ({"layers.9.hidden": np.zeros((2, 40, 64))}, "no array of the name 'layers.9.hidden'"),
    ],
)
def test_a_recording_that_does_not_fit_is_one_clear_error(capsys, tmp_path, recorded, change, words):
    path, acts = recorded
    acts = {name: x for name, x in {**acts, **change}.items() if x is not None}
    code, out, err = parity(capsys, tmp_path, path, acts)
    assert code == 2 and not out and words in err and len(err) <= 500


def test_what_is_no_recording_is_one_clear_error(capsys, tmp_path, recorded):
    path, _ = recorded
    file = tmp_path / "bad.npz"
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, tokens=np.array([{}], object))
    whole = tmp_path / "whole.npz"
    np.savez(whole, tokens=np.zeros((2, 40), int), embed=np.zeros((2, 40, 64)))
    for made in (b"", b"PK\x03\x04 no zip", whole.read_bytes()[:-200], pickled.read_bytes()):
        file.write_bytes(made)
        assert main(["parity", str(path), "--against-activations", str(file)]) == 2
        assert len(capsys.readouterr().err) <= 500
    assert main(["parity", str(path), "--against-activations", str(file), "--tokens", "3"]) == 2
    assert "leave out --tokens" in capsys.readouterr().err

"""PEFT reads what we write of adapters, and we read what it writes: logits and merged weights are the same."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from lora_cases import EVERYTHING, MODEL, base, logits, new_model, random_factors
from peft import LoraConfig as TheirConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import llama4_jax
from llama4_jax import cli
from llama4_jax.config import converted_to_json
from llama4_jax.model.lora import adapted
from llama4_jax.weights.adapters import base_of, write_base
from llama4_jax.weights.checkpoint import Checkpoints
from llama4_jax.weights.convert import convert, export
from llama4_jax.weights.load import named_variables
from llama4_jax.weights.source import open_weights

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 24))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base of ours, and at Hugging Face."""
    place = tmp_path_factory.mktemp("peft")
    export(base(place / "base"), place / "hf", format="hf")
    return place


def theirs(place) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32)


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def their_adapters(place, out, **config):
    """A PEFT directory as others make it, with numbers in every factor; and the model that it was made of."""
    torch.manual_seed(0)
    model = get_peft_model(theirs(place), TheirConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(out)
    return model


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, atol=3e-6 * np.abs(expected).max())


EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
CASES = {
    "attention, dense, shared and routed": {
        "r": 4, "lora_alpha": 6, "target_parameters": EXPERTS,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "rank 1, rslora": {"r": 1, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"],
                       "target_parameters": EXPERTS},
    "down of the experts alone": {"r": 3, "target_modules": ["o_proj"], "target_parameters": EXPERTS[1:]},
    "gate_up of the experts alone": {"r": 3, "target_modules": [], "target_parameters": EXPERTS[:1]},
    "up without gate": {"r": 2, "target_modules": ["up_proj"]},
    "several ranks and scales": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"],
                                 "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 7}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_peft_wrote_gives_the_same_logits_and_merged_weights(case, place, tmp_path):
    model = their_adapters(place, tmp_path / "peft", **CASES[case])
    expected = their_logits(model)
    assert cli.main(["convert", str(tmp_path / "peft"), str(tmp_path / "ours"), "--base", str(place / "base")]) == 0
    close(logits(llama4_jax.from_pretrained(tmp_path / "ours", dtype="float32"), TOKENS), expected)
    export(tmp_path / "ours", tmp_path / "merged", format="hf")
    merged, own = load_file(tmp_path / "merged" / "model.safetensors"), model.merge_and_unload().state_dict()
    assert merged.keys() == own.keys()
    for name, values in own.items():
        np.testing.assert_allclose(merged[name], values.numpy(), atol=1e-6, err_msg=name)


def test_peft_gives_the_same_logits_with_what_we_wrote_which_reads_back_as_it_was(place, tmp_path):
    """Router and output head too: every layer that can have adapters."""
    first = their_adapters(place, tmp_path / "first", **CASES["attention, dense, shared and routed"])
    del first
    convert(tmp_path / "first", tmp_path / "run", base=place / "hf")
    tree = json.loads((tmp_path / "run" / "config.json").read_text())
    assert tree["lora"]["rank"] == 4 and "layers.1.moe.experts" in tree["lora"]["targets"]
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "again"), "--format", "peft"]) == 0
    again, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "first"))
    assert again.keys() == before.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
    ours = logits(llama4_jax.from_pretrained(tmp_path / "run", dtype="float32"), TOKENS)
    close(their_logits(PeftModel.from_pretrained(theirs(place), tmp_path / "again")), ours)


def test_the_layout_of_fused_experts_is_the_published_one(place, tmp_path):
    """A of PEFT is on the side of outputs, expert by expert; B on that of inputs, rank by rank."""
    their_adapters(place, tmp_path / "peft", **CASES["attention, dense, shared and routed"])
    convert(tmp_path / "peft", tmp_path / "run", base=place / "base")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    where = "base_model.model.model.layers.1.feed_forward.experts."
    a, b = (tensors[f"{where}base_layer.lora_{each}.weight"] for each in "AB")
    weights, before = open_weights(tmp_path / "run"), open_weights(place / "base")
    delta = weights.read("layers.1.moe.gate_up") - before.read("layers.1.moe.gate_up")
    experts, rank = 5, 4
    for e in range(experts):
        own = b[:, e::experts] @ a[e * rank : (e + 1) * rank] * (6 / rank)  # [D, 2 F]
        np.testing.assert_allclose(delta[e], own.reshape(32, 2, 16).swapaxes(0, 1), atol=1e-6)


def test_adapters_that_are_no_plain_lora_or_damaged_are_refused(place, tmp_path):
    good = tmp_path / "good"
    their_adapters(place, good, r=2, target_modules=["q_proj"])
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format

    def refused(match: str, kind: type = ValueError, fields=(), base=place / "base", **changed):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        bad.mkdir()
        (bad / "adapter_config.json").write_text(json.dumps({**config, **dict(fields)}))
        save_file({n: x for n, x in {**tensors, **changed}.items() if x is not None}, bad / "adapter_model.safetensors")
        with pytest.raises(kind, match=match):
            convert(bad, tmp_path / "out", base=base)
        assert not (tmp_path / "out").exists()

    refused("use_dora is True, and False is all that is read", fields={"use_dora": True})
    refused("peft_type is 'IA3'", fields={"peft_type": "IA3"})
    refused("modules_to_save", fields={"modules_to_save": ["lm_head"]})
    refused("a rank must be between 1", fields={"r": 0})
    refused("adapter_config.json", fields={"r": "4"})
    refused("has no tensor .*q_proj.lora_B", **{q("B"): None})
    refused(
        "1 tensors that the base has no matrix for, such as model.layers.9",
        **{q("A").replace("0", "9"): tensors[q("A")]},
    )
    refused(r"lora_A \[2, 31\]", **{q("A"): np.ascontiguousarray(tensors[q("A")][:, 1:])})
    refused("not finite", **{q("A"): np.full_like(tensors[q("A")], np.nan)})
    refused("does not say which model", fields={"base_model_name_or_path": None}, base=None)
    refused("base of .* is not there", FileNotFoundError, base=tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds adapters of PEFT, without the model .*llama4 convert"):
        llama4_jax.from_pretrained(good)
    with pytest.raises(ValueError, match="holds no adapters. To write whole weights"):
        export(place / "base", tmp_path / "out", format="peft")


def test_every_kind_of_layer_goes_to_peft(place, tmp_path):
    """The router and the output head, too, which PEFT adapts as a parameter and as a module."""
    model = adapted(new_model(), EVERYTHING)
    random_factors(model)
    factors = {name: v[...] for name, v in named_variables(model).items() if "lora" in name}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(converted_to_json(MODEL, {}, lora=EVERYTHING))
    write_base(run, base_of(place / "base", open_weights(place / "base")))
    checkpoints = Checkpoints(run)
    checkpoints.save(
        1,
        {f"params.{n.replace('layers.', 'decoder.rest.')}": x for n, x in factors.items()},
        {"step": jnp.zeros(())},
        {},
    )
    checkpoints.close()
    export(run, tmp_path / "peft", format="peft")
    with torch.no_grad():
        found = their_logits(PeftModel.from_pretrained(theirs(place), tmp_path / "peft"))
    close(found, logits(model, TOKENS))

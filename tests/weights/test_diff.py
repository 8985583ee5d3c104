"""`llama4 diff`: two directories of any formats, as somebody finds out what a conversion has done."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from oracles import hf
from oracles.cases import MAVERICK, SCOUT
from safetensors.numpy import load_file, save_file

from llama4_jax.cli import main
from llama4_jax.weights.parity import ParityOptions, run

FOUR = dataclasses.replace(SCOUT, name="four", layers=2)
LAYER = "model.layers.{}."


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("four")
    hf.reference(FOUR).save_pretrained(path)
    return path


def copy(directory, to, change):
    """A copy whose tensors `change` has been at."""
    shutil.copytree(directory, to)
    tensors = {name: array.copy() for name, array in load_file(to / "model.safetensors").items()}
    change(tensors)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def diff(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["diff", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def exchange(tensors, a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def layers_exchanged(tensors):
    for name in list(tensors):
        if ".layers.0." in name:
            exchange(tensors, name, name.replace(".layers.0.", ".layers.1."))


def keys_and_values(tensors):
    exchange(tensors, LAYER.format(0) + "self_attn.k_proj.weight", LAYER.format(0) + "self_attn.v_proj.weight")


def tied(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]


def experts_alike(tensors):
    for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight"):
        name = LAYER.format(1) + "feed_forward." + name
        tensors[name] = np.roll(tensors[name], 1, axis=0)


def another_seed(tensors):
    name = LAYER.format(1) + "self_attn.q_proj.weight"
    tensors[name] = np.random.default_rng(7).normal(0, 0.1, tensors[name].shape).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (layers_exchanged, ["layer 0 ", ": it is the reference's of layer 1", ": it is the reference's of layer 0"]),
        (keys_and_values, ["layers.0.attention.k.kernel: it is the reference's attention.v.kernel"]),
        (tied, ["lm_head.kernel: ours is our embedding (tied)"]),
        (experts_alike, ["layer 1: the experts are in another order in all tensors alike", "it is the same model"]),
        (another_seed, ["1 of ", "layers.1.attention.q.kernel: no cause is known: other numbers altogether"]),
    ],
)
def test_what_was_done_to_tensors_is_said(capsys, hf_dir, tmp_path, change, words):
    code, out, _ = diff(capsys, copy(hf_dir, tmp_path / "b", change), hf_dir)
    assert code == 1 and "DIFFERENT." in out
    assert all(word in out for word in words), out


def test_a_conversion_and_its_export_are_equal_though_fields_that_no_layer_uses_differ(capsys, hf_dir, tmp_path):
    run_dir, meta = tmp_path / "run", tmp_path / "meta"
    hf_dir = copy(hf_dir, tmp_path / "hf", lambda tensors: None)
    config = json.loads((hf_dir / "config.json").read_text())  # what Meta's params.json can say
    config["rope_parameters"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 8192}  # fmt: skip
    (hf_dir / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(hf_dir), str(run_dir)]) == 0
    assert main(["export", str(run_dir), str(meta), "--format", "meta"]) == 0
    capsys.readouterr()
    for a, b in ((hf_dir, meta), (run_dir, hf_dir), (meta, run_dir)):
        code, out, _ = diff(capsys, a, b)
        assert code == 0 and "SAME: all " in out and "DIFFERENT" not in out
    report = run(ParityOptions(path=hf_dir, against=meta, reference="ours", decode=0, tokens=4, batch=1))
    assert report.passed and report.weights.equal


def test_all_that_differs_is_in_the_file_and_few_lines_on_the_screen(capsys, hf_dir, tmp_path):
    def all_of_them(tensors):
        for i, name in enumerate(tensors):
            tensors[name] = tensors[name] * np.float32(2 + i)

    file = tmp_path / "some" / "diff.json"
    code, out, _ = diff(capsys, copy(hf_dir, tmp_path / "b", all_of_them), hf_dir, "--json", file)
    found = json.loads(file.read_text())
    assert code == 1 and not found["equal"] and len(found["different"]) == found["tensors"]
    assert len(out.splitlines()) < 50 and max(map(len, out.splitlines())) < 500
    factors = {d["name"]: d["cause"]["text"] for d in found["different"]}
    assert factors["lm_head.kernel"].startswith("ours is the reference's times ")


def test_the_tolerance_decides_what_is_equal(capsys, hf_dir, tmp_path):
    def a_little(tensors):
        tensors["lm_head.weight"][3, 4] += 1e-4 * np.abs(tensors["lm_head.weight"]).max()

    other = copy(hf_dir, tmp_path / "b", a_little)
    assert diff(capsys, other, hf_dir)[0] == 1
    assert diff(capsys, other, hf_dir, "--tolerance", "1e-3")[0] == 0
    code, _, err = diff(capsys, other, hf_dir, "--tolerance", "-1")
    assert code == 2 and "--tolerance must be 0 or more, got -1.0" in err


def test_weights_that_are_equal_with_another_config_are_said_to_be_so(capsys, hf_dir, tmp_path):
    other = copy(hf_dir, tmp_path / "b", lambda tensors: None)
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    code, out, _ = diff(capsys, other, hf_dir)
    assert code == 0 and "The configs differ in norm_eps" in out


def test_what_cannot_be_compared_is_one_line_and_code_2(capsys, hf_dir, tmp_path):
    other = tmp_path / "other"
    hf.reference(dataclasses.replace(MAVERICK, layers=2)).save_pretrained(other)
    for a, b, words in ((other, hf_dir, "cannot be compared"), (hf_dir, tmp_path / "nowhere", "no such directory")):
        code, out, err = diff(capsys, a, b)
        assert code == 2 and not out and words in err and len(err) <= 600


def test_the_report_of_parity_lists_every_tensor_that_differs(hf_dir, tmp_path):
    def rounded(tensors):
        for name, array in tensors.items():
            tensors[name] = torch.from_numpy(array).bfloat16().float().numpy()

    against = copy(hf_dir, tmp_path / "b", rounded)
    report = run(ParityOptions(path=hf_dir, against=against, reference="ours", decode=0, tokens=16, batch=1))
    assert not report.passed and report.divergence.where == "the embedding"
    assert "likely cause: the weights differ: embed.embedding (ours is the reference's, rounded to" in report.text()
    assert f"{len(report.weights.different)} of {report.weights.tensors} tensors differ" in report.text()
    assert {d.cause.kind for d in report.weights.different} == {"rounded"}

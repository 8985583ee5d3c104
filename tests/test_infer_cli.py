"""infer.py as a user runs it: on a run of train.py, in a process of its own."""

import json
import re
import shlex

import jax.numpy as jnp
import numpy as np
import pytest
from micro_run import WORDS, finished_run, infer

import llama4_jax
from llama4_jax.inputs.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def model(run):
    return llama4_jax.from_pretrained(run, dtype="float32")


def test_generate_continues_the_prompt_as_the_library_does(run, model):
    result = infer(run.parent, "generate", str(run), "--prompt", "the model ", "--max-new-tokens", "30",
                   "--temperature", "0")  # fmt: skip
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(run)
    (reply,) = llama4_jax.generate(
        model, [tokenizer.encode("the model ", bos=True)], max_new_tokens=30, stop_ids=tokenizer.stop_ids
    )
    assert result.stdout == "the model " + tokenizer.decode(reply, skip_special=True) + "\n"
    assert re.fullmatch(rf"\[{len(reply)} tokens; the first after [\d.]+ s, then [\d.,]+ tokens/s\]\n", result.stderr)


def test_the_command_that_training_ends_with_works(run):
    said = (run.parent / "stdout.txt").read_text()
    (command,) = re.findall(r"^  python infer\.py (.*)$", said, re.MULTILINE)
    result = infer(run.parent, *shlex.split(command))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def ")


def test_samples_differ_from_one_another_and_repeat_with_the_seed(run):
    options = ("generate", str(run), "--prompt", "a", "--max-new-tokens", "20", "--temperature", "1.0",
               "--num-samples", "3", "--seed")  # fmt: skip
    first, again = infer(run.parent, *options, "7"), infer(run.parent, *options, "7")
    assert first.returncode == 0, first.stderr
    samples = re.split(r"--- sample \d of 3\n", first.stdout)[1:]
    assert len(set(samples)) == 3 and all(sample.startswith("a") for sample in samples)
    assert again.stdout == first.stdout


def test_score_gives_bits_per_byte_and_nats_by_position(run, model, tmp_path):
    text = (" ".join(WORDS.split()[:9]) + "\n") * 5  # more than the context of 64
    (tmp_path / "some.txt").write_text(text)
    result = infer(run.parent, "score", str(run), "--file", str(tmp_path / "some.txt"), "--json")
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout)
    tokens = np.array(load_tokenizer(run).encode(text, bos=True), np.int32)
    nll = []
    for start in range(0, len(tokens) - 1, 64):
        piece = tokens[start : start + 65]
        logits = np.asarray(model(jnp.asarray(piece[None, :-1]))[0], np.float64)
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nll += list(log_sum - logits[np.arange(len(piece) - 1), piece[1:]])
    assert (got["bytes"], got["tokens"]) == (len(text.encode()), len(nll))
    assert got["nats_per_token"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(np.sum(nll) / np.log(2) / len(text), rel=1e-5)
    assert got["by_position"][0]["nats"] == pytest.approx(np.mean(nll[::64]), rel=1e-4)
    assert "scored as 4 documents" in result.stderr
    shown = infer(run.parent, "score", str(run), "--file", str(tmp_path / "some.txt"))
    assert f"{got['bits_per_byte']:.4f} bits per byte" in shown.stdout
    assert got["bits_per_byte"] < 5  # of 8: it has learnt something


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["generate", "NOWHERE", "--prompt", "x"], ["no such directory: ", "nowhere"]),
        (["generate", "RUN", "--prompt", "x" * 70], ["71 tokens", "64"]),
        (["generate", "RUN", "--prompt", "x", "--max-new-tokens", "100"], ["64", "max_new_tokens"]),
        (["generate", "RUN", "--prompt", "x", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["generate", "RUN", "--prompt", "x", "--temprature", "1"], ["--temprature", "--temperature"]),
        (["generate", "EMPTY", "--prompt", "x"], ["config.json"]),
        (["score", "RUN", "--file", "NOWHERE"], ["no such file: ", "nowhere"]),
        (["score", "RUN", "--file", "EMPTY/void.txt"], ["void.txt is empty"]),
        (["score", "RUN", "--file", "EMPTY/latin.txt"], ["latin.txt is not UTF-8", "at byte 3"]),
    ],
    ids=lambda value: " ".join(value)[:60] if value[0] in ("generate", "score") else "",
)
def test_a_mistake_is_one_clear_error(run, tmp_path, options, says):
    (tmp_path / "void.txt").touch()
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    places = {"RUN": str(run), "NOWHERE": str(tmp_path / "nowhere"), "EMPTY": str(tmp_path)}
    filled = [re.sub("RUN|NOWHERE|EMPTY", lambda match: places[match[0]], option) for option in options]
    result = infer(run.parent, *filled)
    assert result.returncode == 2
    assert result.stdout == ""
    for words in says:
        assert words in result.stderr
    assert "Traceback" not in result.stderr

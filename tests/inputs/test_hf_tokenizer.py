"""Hugging Face's `tokenizers` reads what is written, and gives the same ids."""

import json
import pathlib
import sysconfig

import llama_models.llama4
import pytest
from transformers import AutoTokenizer

from llama4_jax.inputs.hf_tokenizer import tokenizer_config, tokenizer_json
from llama4_jax.inputs.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

MODEL = pathlib.Path(llama_models.llama4.__file__).parent / "tokenizer.model"
TEXTS = (
    "The quick brown fox can't jump over 1234567 lazy dogs.",
    "  \n\n\tdef f(x):\r\n    return x**2  # ünïcödé",
    "日本語 العربية हिन्दी 👩🏽‍🚀 ﷽",
    "",
    " ",
    "a" * 300,
)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def pair(request, tmp_path_factory) -> tuple[Tokenizer, AutoTokenizer]:
    ours = ByteTokenizer() if request.param == "bytes" else BPETokenizer(MODEL)
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(ours)))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(ours, 8192)))
    return ours, AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS, ids=[f"text {i}" for i in range(len(TEXTS))])
def test_every_text_has_the_same_ids_after_begin_of_text(pair, text):
    ours, theirs = pair
    assert theirs(text)["input_ids"] == ours.encode(text, bos=True)
    assert theirs.decode(ours.encode(text)) == text


def test_real_files_have_the_same_ids(pair):
    ours, theirs = pair
    for name in ("argparse.py", "this.py", "idlelib/NEWS.txt"):
        text = (pathlib.Path(sysconfig.get_paths()["stdlib"]) / name).read_text(encoding="utf-8")[:50_000]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def test_special_tokens_have_the_same_ids(pair):
    ours, theirs = pair
    names = list(ours.special_tokens)
    assert theirs.convert_tokens_to_ids(names) == list(ours.special_tokens.values())
    assert theirs.vocab_size + len(names) == len(theirs) == ours.vocab_size
    assert theirs.bos_token_id == ours.bos_id and theirs.pad_token_id == ours.pad_id
    assert theirs.eos_token_id in ours.stop_ids

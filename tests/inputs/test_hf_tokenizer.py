"""Hugging Face's `tokenizers` reads what is written, and what it writes is read: with the same ids for every text."""

import copy
import json
import pathlib
import re
import sysconfig
import unicodedata

import llama_models.llama4
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama4_jax.inputs.hf_tokenizer import read_tokenizer_json, tokenizer_config, tokenizer_json
from llama4_jax.inputs.other_tokenizer import OtherTokenizer
from llama4_jax.inputs.tokenizer import LLAMA4_SPECIAL, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

MODEL = pathlib.Path(llama_models.llama4.__file__).parent / "tokenizer.model"
SMALL = tokenizer_json(ByteTokenizer())
TEXTS = (
    "The quick brown fox can't jump over 1234567 lazy dogs.",
    "  \n\n\tdef f(x):\r\n    return x**2  # ünïcödé",
    "日本語 العربية हिन्दी 👩🏽‍🚀 ﷽",
    "",
    " ",
    "a" * 300,
)


@pytest.fixture(scope="module")
def llama4() -> dict:
    return tokenizer_json(BPETokenizer(MODEL))


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def pair(request, llama4, tmp_path_factory) -> tuple[Tokenizer, AutoTokenizer]:
    ours, written = (ByteTokenizer(), SMALL) if request.param == "bytes" else (BPETokenizer(MODEL), llama4)
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "tokenizer.json").write_text(json.dumps(written))
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


def test_what_is_written_is_read_back_as_the_same_tokenizer(pair, tmp_path):
    ours, theirs = pair
    again = load_tokenizer(pathlib.Path(theirs.name_or_path) / "tokenizer.json")
    assert again.special_tokens == ours.special_tokens
    assert again.stop_ids == ours.stop_ids
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    again.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == again.fingerprint == ours.fingerprint


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
    """A directory as transformers' conversion script for Llama 4 writes it, by the same classes."""
    directory = tmp_path_factory.mktemp("published")
    names = [name for name in LLAMA4_SPECIAL if not name.startswith(("<|reasoning", "<|reserved"))]
    converter = TikTokenConverter(str(MODEL), pattern=BPETokenizer.pattern, extra_special_tokens=names)
    PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad_id|>",
    ).save_pretrained(directory)
    assert not (directory / "tokenizer.model").exists()
    return directory


def test_a_published_directory_is_read_with_the_ids_of_tokenizer_model(published, tmp_path):
    theirs, metas, ours = AutoTokenizer.from_pretrained(published), BPETokenizer(MODEL), load_tokenizer(published)
    assert len(theirs) == 201_135
    for text in (*TEXTS, every_script(), "<|eot|> " + "x" * 60_000):
        assert ours.encode(text) == metas.encode(text)
    assert ours.encode(every_script()) == theirs(every_script(), add_special_tokens=False)["input_ids"]
    for name, i in theirs.get_added_vocab().items():
        assert ours.special_tokens[name] == i
    assert ours.vocab_size == metas.vocab_size == len(ours.special_tokens) + len(ours.pieces)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.stop_ids) == (
        *(metas.bos_id, metas.eos_id, metas.pad_id),
        metas.stop_ids,
    )
    differing = {name for name in ours.special_tokens if metas.special_tokens.get(name) != ours.special_tokens[name]}
    assert differing == {"<|finetune_right_pad_id|>"}
    assert ours.special_tokens["<|finetune_right_pad_id|>"] == 201_134
    assert ours.fingerprint != metas.fingerprint  # an id stands for something else
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()


def every_script() -> str:
    """A few letters of each script, by the first word of their names: 200 and more."""
    letters = {}
    for code in range(0x20, 0x30000):
        char = chr(code)
        if unicodedata.category(char)[0] in "LMNS":
            letters.setdefault(unicodedata.name(char, "-").split()[0], []).append(char)
    assert len(letters) > 200
    return " ".join("".join(chars[:: max(1, len(chars) // 8)]) for chars in letters.values())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_script_is_decoded_as_it_was_encoded(kind):
    ours = ByteTokenizer() if kind == "bytes" else BPETokenizer(MODEL)
    assert ours.decode(ours.encode(every_script())) == every_script()


def edited(*path, **changes):
    """The file of the byte tokenizer with changes in the dict at this path."""
    said = copy.deepcopy(SMALL)
    inner = said
    for key in path:
        inner = inner[key]
    inner.update(changes)
    return json.dumps(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no valid JSON"),
        (json.dumps(SMALL)[:5000], "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON: it is nested too deeply"),
        ("\x80", "is no valid JSON"),
        ("[]", "expected `object`, got `array`"),
        ("{}", "missing required field `model`"),
        (edited("model", vocab=["a"]), "model.vocab"),
        (edited("model", vocab={"a": "b"}), "model.vocab"),
        (edited("model", vocab={"a": 2**40}), "should be 0, 1, 2"),
        (edited("model", type="WordPiece"), "cannot be used by the package `tokenizers`"),
        (edited("model", dropout=0.1), "model.dropout is 0.1, which makes ids random"),
        (edited("model", merges=[["a", "€€"]]), "cannot be used by the package `tokenizers`"),
        (edited(added_tokens=3), "added_tokens: expected `array | null`, got `int`"),
        (edited(added_tokens=[{"id": 256}]), "added_tokens[0]: object missing required field `content`"),
        (edited("added_tokens", 0, id=257), "two of its tokens have one id"),
        (edited("added_tokens", 0, id=3), "two of its tokens have one id"),
        (edited("added_tokens", 0, id=999), "reads as"),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(content, said, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))  # JSON is written in ASCII here
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path)
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "content",
    [
        edited(normalizer={"type": "NFC"}),
        edited("model", ignore_merges=False),
        edited("pre_tokenizer", pretokenizers=[{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False,
                                                "trim_offsets": True}]),
        edited("added_tokens", 20, special=False),
    ],
    ids=["normalizer", "no whole pieces", "expression", "an ordinary added token"],
)  # fmt: skip
def test_bytes_by_other_rules_are_another_tokenizer(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    other = load_tokenizer(tmp_path)
    assert isinstance(other, OtherTokenizer) and other.fingerprint != ByteTokenizer().fingerprint
    assert other.decode(other.encode("e\u0301 x", bos=True)) in (
        "<|begin_of_text|>\xe9 x",
        "<|begin_of_text|>e\u0301 x",
    )


def swapped_merges(said):
    merges = said["model"]["merges"]
    said["model"]["merges"] = [merges[1], merges[0], *merges[2:]]


def strange_merge(said):
    said["model"]["merges"] = [*said["model"]["merges"][:-1], ("a", 3)]


def another_expression(said):
    said["pre_tokenizer"]["pretokenizers"][0] = {
        **said["pre_tokenizer"]["pretokenizers"][0],
        "pattern": {"Regex": r"\p{N}{1,3}|.+"},
    }


def no_eot(said):
    said["added_tokens"] = [one for one in said["added_tokens"] if one["content"] != "<|eot|>"]


def far_token(said):
    said["added_tokens"] = [*said["added_tokens"], {"id": 2**40, "content": "<|far|>", "special": True}]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (swapped_merges, "merges are not the [0-9]+ that the ids of its pieces imply, in their order"),
        (strange_merge, "its merges should be pairs of pieces"),
        (another_expression, r"its pre_tokenizer is .*and should be .*\\p\{Lu\}"),
        (no_eot, re.escape("it lacks the special token <|eot|>")),
        (far_token, "its special tokens go up to the id 1099511627776, far above Llama 4's"),
    ],
)
def test_another_bpe_is_refused_with_what_differs(change, why, llama4, tmp_path):
    said = {**llama4, "model": dict(llama4["model"]), "pre_tokenizer": copy.deepcopy(llama4["pre_tokenizer"])}
    change(said)
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=why):
        read_tokenizer_json(tmp_path / "tokenizer.json")


def test_merges_may_be_written_as_strings_and_added_tokens_may_go_on(llama4, tmp_path):
    own = {"id": 202_050, "content": "<mine>", "special": True}
    model = {**llama4["model"], "merges": [f"{left} {right}" for left, right in llama4["model"]["merges"]]}
    said = {**llama4, "model": model, "added_tokens": [*llama4["added_tokens"], own]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 202_051
    assert ours.special_tokens["<mine>"] == 202_050
    assert ours.decode([202_049, 202_050]) == "<|unused_202049|><mine>"
    assert max(ours.encode("a <mine>")) < 200_000


def test_a_missing_tokenizer_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such tokenizer file: .*nowhere"):
        read_tokenizer_json(tmp_path / "nowhere")

"""Both tokenizers against Meta's, and against what text, bytes and streams must do whatever the vocabulary."""

import importlib.util
import pathlib
import sysconfig

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama4.tokenizer import Tokenizer as MetaTokenizer

from llama4_jax.inputs.tokenizer import BPETokenizer, ByteTokenizer, StreamDecoder, load_tokenizer

MODEL = pathlib.Path(importlib.util.find_spec("llama_models").origin).parent / "llama4" / "tokenizer.model"

KINDS = ["bytes", "bpe"]
TOKENIZERS = {}


def tokenizer(kind):
    if kind not in TOKENIZERS:
        TOKENIZERS[kind] = {
            "bytes": ByteTokenizer,
            "bpe": lambda: BPETokenizer(MODEL),
            "meta": lambda: MetaTokenizer(MODEL),
        }[kind]()
    return TOKENIZERS[kind]


SCRIPTS = "".join(chr(c) for c in range(0x20, 0x30000, 97) if not 0xD800 <= c < 0xE000)
TEXTS = {
    "empty": "",
    "prose": "The quick brown fox doesn't jump; it WALKS, they'll say. 1234567 times!\n\n\n\tThen\r\nit   stops.   ",
    "code": pathlib.Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(),
    "a character of every script": SCRIPTS,
    "emoji, joined": "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 \u202eabc\u202c \x00\x1f\u2028\u3000\ufeff",
    "every special token, spelled": " ".join(MetaTokenizer.get_instance().special_tokens),
    "a turn, spelled": "<|eot|><|header_start|>system<|header_end|>\n\nObey.<|eot|>",
    "no space": "ab1-" * 125_000,
    "no space, just past the limits": "x" * 25_001 + " " + "y" * 25_000 + " " + "日" * 50_001,
    "a long run that begins anywhere": "a b " * 2_000 + "remembers" * 3_000 + " c" * 3_000 + "\n  " * 9_000,
    "long spaces": "a" + " " * 60_000 + "b" + "\n" * 25_001 + "\t \u3000" * 20_000,
    "above the limit of a text": ("word " * 79_999 + "日本") * 2 + "z" * 30_000,
    "a run over the limit of a text": "word " * 78_000 + "q" * 40_000,
    "lone surrogates": "a\ud800b\udfff \ud83d\ude00",
}


@pytest.mark.parametrize("name", TEXTS)
def test_bpe_gives_the_ids_of_metas_tokenizer(name):
    assert tokenizer("bpe").encode(TEXTS[name]) == tokenizer("meta").encode(TEXTS[name], bos=False, eos=False)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=[])) | st.text("aA'slt 1\n\r\t./<|>é日\u0301", min_size=20))
def test_bpe_gives_the_ids_of_metas_tokenizer_for_any_text(text):
    expected = tokenizer("meta").encode(text, bos=True, eos=True)
    assert tokenizer("bpe").encode(text, bos=True, eos=True) == expected
    assert tokenizer("bpe").decode(expected) == tokenizer("meta").decode(expected)


def test_bpe_has_metas_special_tokens_and_roles():
    ours, metas = tokenizer("bpe"), tokenizer("meta")
    assert ours.special_tokens == metas.special_tokens
    assert len(ours.special_tokens) == 2048
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (202_048, 200_000, 200_001, 200_018)
    assert (metas.n_words, metas.bos_id, metas.eos_id, metas.pad_id) == (202_048, 200_000, 200_001, 200_018)
    assert list(ours.stop_ids) == metas.stop_tokens
    assert ours.special_tokens["<|patch|>"] == 200_092
    assert ours.special_tokens["<|reserved_special_token_903|>"] == 202_047


def test_byte_ids_are_bytes_and_then_llama4s_named_tokens_in_its_order():
    ours = tokenizer("bytes")
    assert ours.encode("é\n") == [0xC3, 0xA9, 0x0A]
    named = [name for name in tokenizer("meta").special_tokens if "reserved" not in name]
    assert list(ours.special_tokens)[: len(named)] == named
    assert list(ours.special_tokens.values()) == list(range(256, 320))
    assert ours.vocab_size == 320
    assert ours.stop_ids == tuple(ours.special_tokens[name] for name in ("<|end_of_text|>", "<|eom|>", "<|eot|>"))


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_special_token_stays_text(kind):
    ours = tokenizer(kind)
    for name in ours.special_tokens:
        ids = ours.encode(f"a{name}b")
        assert max(ids) < min(ours.special_tokens.values())
        assert ours.decode(ids, skip_special=True) == f"a{name}b"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in TEXTS if name != "lone surrogates"])
def test_decoding_gives_the_text_again_and_the_byte_counts_add_up(kind, name):
    ours, text = tokenizer(kind), TEXTS[name]
    ids = ours.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (ours.bos_id, ours.eos_id)
    assert ours.decode(ids[1:-1]) == ours.decode(ids, skip_special=True) == text
    assert ours.decode(ids) == f"<|begin_of_text|>{text}<|end_of_text|>"
    counts = ours.token_bytes(np.array(ids, np.int32).reshape(-1, 1))
    assert counts.dtype == np.int32
    assert counts.shape == (len(ids), 1)
    assert counts[0] == counts[-1] == 0
    assert counts.sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_becomes_the_replacement_character(kind):
    ours = tokenizer(kind)
    assert ours.decode(ours.encode(TEXTS["lone surrogates"])) == "a\ufffdb\ufffd \U0001f600"


@settings(max_examples=200, deadline=None)
@given(st.binary())
def test_bytes_that_are_no_utf8_are_kept_as_bytes_and_replaced_in_text(data):
    ours = tokenizer("bytes")
    assert ours.decode_bytes(data) == data
    assert ours.decode(data) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_gives_what_decoding_all_at_once_gives(kind, data, skip):
    ours = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1)) | st.lists(st.integers(100, 270)))
    stream = StreamDecoder(ours, skip_special=skip)
    for _ in range(2):  # and once more, since flushing makes it new
        said = "".join([*(stream.feed(i) for i in ids), stream.flush()])
        assert said == ours.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text("aé日👩\u200d\u0301 \ufffd"))
def test_a_stream_never_gives_half_a_character(kind, text):
    ours = tokenizer(kind)
    stream, said = StreamDecoder(ours), ""
    for i in ours.encode(text):
        said += stream.feed(i)
        assert text.startswith(said)
    assert said == text
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [-1, 202_048])
def test_an_id_out_of_range_is_named(kind, wrong):
    ours = tokenizer(kind)
    stream = StreamDecoder(ours)
    said = rf"token id {wrong} is out of range: this tokenizer has {ours.vocab_size} ids"
    for call in (ours.decode, ours.token_bytes, lambda ids: stream.feed(*ids)):
        with pytest.raises(ValueError, match=said):
            call(np.array([1, wrong]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_directory_carries_its_tokenizer(kind, tmp_path):
    tokenizer(kind).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    again = load_tokenizer(str(tmp_path))
    assert type(again) is type(tokenizer(kind))
    assert again.fingerprint == tokenizer(kind).fingerprint
    assert again.encode(TEXTS["prose"]) == tokenizer(kind).encode(TEXTS["prose"])
    again.save(tmp_path)  # a resumed run saves it once more
    assert load_tokenizer(tmp_path).fingerprint == again.fingerprint


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    other = tmp_path / "tokenizer.model"
    other.write_bytes(swapped(MODEL.read_bytes()))
    prints = {tokenizer("bytes").fingerprint, tokenizer("bpe").fingerprint, BPETokenizer(other).fingerprint}
    assert len(prints) == 3
    assert load_tokenizer("bytes").fingerprint in prints
    assert load_tokenizer(str(MODEL)).fingerprint in prints


def swapped(model: bytes) -> bytes:
    """Two pieces have changed places."""
    lines = model.splitlines()
    first, second = lines[1000].split()[0], lines[1001].split()[0]
    lines[1000], lines[1001] = second + b" 1000", first + b" 1001"
    return b"\n".join(lines)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no such tokenizer: .*nowhere.* Give "bytes", or the path'):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such tokenizer file: .*nowhere"):
        BPETokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="none of byte_tokenizer.json, tokenizer.model, tokenizer.json is"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda model: model[: len(model) // 2] + b"!", "line 1.* should be a base64 string and a number"),
        (lambda model: b"\n".join(model.splitlines()[:128_000]), "holds 128000 tokens and Llama 4's .* 200000"),
        (lambda model: b"", "holds 0 tokens|every byte be there"),
        (lambda model: b"\x80\x00 version https://git-lfs", "line 1 should be a base64 string"),
        (lambda model: model.replace(b" 77\n", b" 78\n", 1), "should be 0 to 199999, each once"),
    ],
    ids=["cut inside a line", "another model's", "empty", "not of this kind", "a number twice"],
)
def test_a_damaged_tokenizer_model_is_refused(damage, said, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(damage(MODEL.read_bytes()))
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is no valid JSON"), ('{"type": "bytes", "vocab_size": 999}', "describes another tokenizer")],
)
def test_a_damaged_byte_tokenizer_is_refused(content, said, tmp_path):
    (tmp_path / "byte_tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path)

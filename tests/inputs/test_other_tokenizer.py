"""Any tokenizer.json gives the ids that transformers gives, text stays text, and a hostile file is refused."""

import copy
import functools
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama4_jax.data.config import DataConfig
from llama4_jax.data.loader import make_loader
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.other_tokenizer import OtherTokenizer, _parts
from llama4_jax.inputs.tokenizer import ByteTokenizer, StreamDecoder, load_tokenizer

PROSE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
SCRIPTS = "日本語 العربية हिन्दी 👩🏽‍🚀 ﷽ ünïcödé"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
NAMES = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
BERT = {"eos_token": "[SEP]", "bos_token": "[CLS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}


def byte_level(special: list[str], corpus=PROSE) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [corpus],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def own() -> tuple[Tokenizer, dict[str, str]]:
    return byte_level([]), {"eos_token": "<|endoftext|>"}


def like_gpt2() -> tuple[Tokenizer, dict[str, str]]:
    return byte_level(["<|endoftext|>"]), dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|endoftext|>")


def like_llama2() -> tuple[Tokenizer, dict[str, str]]:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *BYTES]
    made.train_from_iterator([PROSE], trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    return made, NAMES


def like_t5() -> tuple[Tokenizer, dict[str, str]]:
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        [PROSE],
        trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return made, NAMES


def like_bert() -> tuple[Tokenizer, dict[str, str]]:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        [PROSE], trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*BERT.values()], show_progress=False)
    )
    return made, BERT


def of_words() -> tuple[Tokenizer, dict[str, str]]:
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(
        [PROSE], trainers.WordLevelTrainer(vocab_size=300, special_tokens=[*BERT.values()], show_progress=False)
    )
    return made, BERT


KINDS = {make.__name__: make for make in (own, like_gpt2, like_llama2, like_t5, like_bert, of_words)}


@functools.cache
def directory(kind: str) -> Path:
    made, names = KINDS[kind]()
    place = Path(tempfile.mkdtemp())
    theirs = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    theirs.add_tokens([AddedToken("  qq", normalized=False)])  # ordinary vocabulary
    theirs.save_pretrained(place)
    return place


@functools.cache
def pair(kind: str) -> tuple[OtherTokenizer, PreTrainedTokenizerFast]:
    ours = load_tokenizer(directory(kind))
    assert isinstance(ours, OtherTokenizer)
    return ours, PreTrainedTokenizerFast.from_pretrained(directory(kind))


def of_theirs(theirs: PreTrainedTokenizerFast, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_have_the_ids_of_transformers(kind):
    ours, theirs = pair(kind)
    for text in ("", " ", "The model  qq reads\n\n lines", PROSE, SCRIPTS, PROSE[:300] * 20):
        assert ours.encode(text) == of_theirs(theirs, text)
        assert ours.encode_array(text).dtype == np.uint16
    assert ours.vocab_size == len(theirs)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.bos_id == (theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id)
    assert ours.pad_id == (theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert ours.eos_id in ours.stop_ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_text_has_the_ids_of_transformers(kind, data):
    ours, theirs = pair(kind)
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"])) | st.text("aA's 1\n\té日<", min_size=9))
    assume(not any(name in text for name in ours.special_tokens))  # which transformers reads as what they spell
    assert ours.encode(text) == of_theirs(theirs, text)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_special_token_is_text(kind):
    ours, theirs = pair(kind)
    begins_or_ends = {ours.bos_id, ours.eos_id, ours.pad_id, *ours.stop_ids}
    for name in ours.special_tokens:
        for text in (name, f"a {name} b{name}{name}", f" {name} ", f"\n{name}\n"):
            ids = ours.encode(text)
            assert ids and not begins_or_ends & set(ids), (name, text, ids)
    assert theirs(theirs.eos_token, add_special_tokens=False)["input_ids"] == [ours.eos_id]  # where they differ


@pytest.mark.parametrize("kind", ["own", "like_gpt2", "like_llama2"])
def test_what_is_encoded_is_decoded_whole_and_while_it_arrives_and_every_byte_is_counted(kind):
    ours, _ = pair(kind)
    for text in (PROSE, SCRIPTS, "a b" if kind == "like_llama2" else "a  qq x"):
        begun = " " if kind == "like_llama2" else ""  # which it puts before every text
        ids = ours.encode(text, bos=True, eos=True)
        assert ours.decode(ids, skip_special=True) == begun + text
        stream = StreamDecoder(ours, skip_special=True)
        assert "".join([stream.feed(i) for i in ids] + [stream.flush()]) == begun + text
        assert ours.token_bytes(np.array(ids)).sum() == len((begun + text).encode())


def test_a_tokenizer_of_words_counts_what_it_kept():
    ours, _ = pair("like_bert")
    assert ours.decode(ours.encode("The  Model")) == " the model"
    assert ours.token_bytes(ours.encode_array("The  Model")).sum() == len(" the model")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_same_tokenizer(kind, tmp_path):
    ours, _ = pair(kind)
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.special_tokens) == (ours.fingerprint, ours.special_tokens)
    assert again.encode(PROSE) == ours.encode(PROSE)
    assert again.stop_ids == ours.stop_ids


def test_a_file_alone_is_read_by_usual_names_or_asks_for_one(tmp_path):
    like_gpt2()[0].save(str(tmp_path / "mine.json"))
    ours = load_tokenizer(tmp_path / "mine.json")
    assert ours.eos_id == ours.bos_id == ours.special_tokens["<|endoftext|>"]
    byte_level([]).save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match=r'bare.json names no token that ends a text.*"eos_token"'):
        load_tokenizer(tmp_path / "bare.json")


def test_a_token_that_ends_a_text_is_special_whatever_the_file_says(tmp_path):
    said = json.loads((directory("own") / "tokenizer.json").read_text())
    for one in said["added_tokens"]:
        one["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    ours = load_tokenizer(tmp_path)
    assert ours.eos_id not in ours.encode("a<|endoftext|>b")


def test_ids_of_a_model_with_more_than_the_tokenizer_stand_for_nothing(tmp_path):
    ours = load_tokenizer(directory("own"))
    size, ids = ours.vocab_size, ours.encode("a b")
    with pytest.raises(ValueError, match=f"token id {size} is out of range"):
        ours.decode([size])
    ours.leave_free(512)
    assert ours.vocab_size == size and ours.decode([ids[0], 511, size, *ids[1:]], skip_special=True) == "a b"
    assert ours.token_bytes(np.array([511])).tolist() == [0]
    with pytest.raises(ValueError, match="token id 512 is out of range"):
        ours.decode([512])


def test_a_long_text_is_cut_between_words():
    text = " ".join(f"word{i}" for i in range(300_000))
    parts = list(_parts(text))
    assert "".join(parts) == text and len(parts) > 2
    assert all(part.startswith(" word") for part in parts[1:]) and max(map(len, parts)) <= 1_000_000
    assert "".join(_parts("x" * 2_500_000)) == "x" * 2_500_000


def test_conversations_and_pictures_need_llama_4s_special_tokens(tmp_path):
    ours, _ = pair("own")
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 9)
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|header_start\|>.*conversations are written with"):
        ChatFormat(ours).encode([{"role": "user", "content": "hi"}])
    config = DataConfig(sources=(f"chat:{tmp_path}/rows.jsonl",), seq_len=8, batch_size=1)
    with pytest.raises(ValueError, match=r"data.sources: chat:.* has conversations, but the tokenizer has no"):
        make_loader(config, ours, split="train")
    names = [name for name in ByteTokenizer().special_tokens if "reserved" not in name]
    byte_level(names).save(str(tmp_path / "tokenizer.json"))
    with_names = load_tokenizer(tmp_path)
    ids = ChatFormat(with_names).encode([{"role": "user", "content": "<|eot|>"}]).tokens
    assert ids.count(with_names.special_tokens["<|eot|>"]) == 1  # of the format alone


def changed(kind: str, *path, **changes) -> str:
    said = json.loads((directory(kind) / "tokenizer.json").read_text())
    inner = functools.reduce(lambda part, key: part[key], path, said)
    inner.update(changes)
    return json.dumps(said)


GROWING = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}] * 40}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "missing required field `model`"),
        ('{"model": 3}', "expected `object`, got `int`"),
        ("[" * 100_000, "nested too deeply"),
        (changed("own", "model", type="Magic"), "cannot be used by the package `tokenizers`"),
        (changed("own", "model", merges=[["zz", "qq"]]), "cannot be used by the package `tokenizers`"),
        (changed("own", "model", dropout=0.5), "model.dropout is 0.5, which makes ids random"),
        (changed("own", "model", vocab={"a": 2**40}), "the ids of its .* tokens should be 0, 1, 2"),
        (changed("own", "added_tokens", 0, id=5), "have one id, and one of them is special"),
        (changed("own", "added_tokens", 0, id=500), "which `tokenizers` reads as"),
        (changed("own", normalizer=GROWING), "its normalizer could make a text more than 1000 times longer"),
        (changed("own", normalizer={"type": "Precompiled", "precompiled_charsmap": "!"}), "`tokenizers`"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_short_error(content, says, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_bytes((directory("own") / "tokenizer_config.json").read_bytes())
    with pytest.raises(ValueError, match=says) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and len(str(error.value)) < 500


def test_an_unknown_character_cannot_end_a_text(tmp_path):
    made, _ = of_words()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its unknown token .*also begins, ends or fills a text"):
        load_tokenizer(tmp_path)


def test_an_expression_without_end_is_an_error_in_bounded_time(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(changed("own", pre_tokenizer=split))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    ours = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="cannot be used by the package `tokenizers`: .*retry-limit"):
        ours.encode("a" * 40 + "!")


VALUES = (None, True, -1, 0, 3.5, 2**31, 2**70, "", "a", "<|endoftext|>", "\ufdd0", [], ["a"], {}, {"type": "Replace"},
          {"Regex": "(a+)+$"}, [["a", "b"]])  # fmt: skip


def mutated(said, draw: random.Random):
    """A deep copy with a few values replaced, removed or doubled, anywhere."""
    said = copy.deepcopy(said)
    for _ in range(draw.randint(1, 3)):
        part, key, above = said, None, None
        while isinstance(part, dict | list) and part and (above is None or draw.random() < 0.75):
            above, key = part, draw.choice(list(part) if isinstance(part, dict) else range(len(part)))
            part = part[key]
        if draw.random() < 0.3:
            del above[key]
        else:
            above[key] = copy.deepcopy(draw.choice(VALUES))
        if not said:
            break
    return said


@pytest.fixture(scope="module")
def smallest():
    """A file of each kind with a small vocabulary, so that mutations meet its other parts."""
    return [json.loads((directory(kind) / "tokenizer.json").read_text()) for kind in KINDS]


@settings(max_examples=1000, deadline=5000)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_file_is_refused_or_keeps_the_promises(seed, smallest, tmp_path_factory):
    draw = random.Random(seed)
    said = mutated(draw.choice(smallest), draw)
    text = json.dumps(said)
    if draw.random() < 0.2:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(["", "\0", "}", "9" * 5000]) + text[at + 1 :]
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(text)
    try:
        ours = load_tokenizer(path)
        ids = ours.encode(f"a text {''.join(ours.special_tokens)} 日 </s>")
    except ValueError as error:
        assert len(str(error)) < 500, error
        return
    assert not {ours.eos_id, ours.bos_id, ours.pad_id} & set(ids)
    assert max(ids, default=0) < ours.vocab_size
    ours.decode(ids)

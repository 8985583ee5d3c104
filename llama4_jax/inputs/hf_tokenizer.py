"""Hugging Face's tokenizer.json: the same tokenizer in another form, written for models that are exported, and read.

A tokenizer.json writes bytes as printable characters (GPT-2's table), and priorities as a list of merges: two pieces
that become a third. A piece's rank in tokenizer.model is the priority of every pair that makes it. Source: the format
of the package `tokenizers`; `TikTokenConverter` of transformers 5.23 for how ranks become merges.

Reading turns the merges back into ranks, and refuses a file that has Llama 4's 200 000 pieces and would give any text
other ids than its tokenizer.model: one with other merges, another expression or a normalizer. A file with any other
vocabulary is another tokenizer, and is read as one. Special tokens have the ids that the file
says. Published files of Llama 4 name fewer than Meta's code, and a padding token `<|finetune_right_pad_id|>` at the
id of Meta's `<|reasoning_reserved_special_token_0|>`; ids that the file leaves free, up to Meta's 202047, keep Meta's
names.
"""

from collections.abc import Sequence
from typing import Any

from etils import epath

from llama4_jax.inputs.other_tokenizer import OtherTokenizer
from llama4_jax.inputs.other_tokenizer import byte_characters as _byte_characters
from llama4_jax.inputs.tokenizer import HF_FILE, LLAMA4_SPECIAL, BPETokenizer, ByteTokenizer, Llama4Names, Tokenizer
from llama4_jax.untrusted_json import read_json

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def read_tokenizer_json(path: str | epath.PathLike) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes: Llama 4's, one of bytes that `tokenizer_json` wrote, or any other
    that the package `tokenizers` reads (`other_tokenizer.py`).

    Raises FileNotFoundError if there is no such file; ValueError if it is damaged, if it has Llama 4's vocabulary and
    would give a text other ids, saying what differs, and as `OtherTokenizer` does.
    """
    path = epath.Path(path)
    said = read_json(path, of=dict[str, Any])
    model = said.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or len(vocab) not in (256, BPETokenizer.BASE_SIZE):
        return OtherTokenizer(path)
    try:
        pieces, special = _pieces(said), _special(said)
        if len(pieces) == 256:
            return _byte_tokenizer(said, pieces, special)
        return _HFTokenizer(said, pieces, special, path.read_bytes())
    except (_Differs, ValueError) as error:
        if len(vocab) == 256:
            return OtherTokenizer(path)
        raise ValueError(f"{path} is not Llama 4's tokenizer: {error}.") from error


class _Differs(Exception):
    """What in a file is not as in Llama 4's."""


class _HFTokenizer(BPETokenizer):
    """Llama 4's BPE as a tokenizer.json has it; saved as the file it was read from."""

    def __init__(self, said: dict[str, Any], pieces: list[bytes], special: dict[str, int], file: bytes):
        if len(pieces) != self.BASE_SIZE:
            raise _Differs(f"its vocabulary has {len(pieces)} pieces and Llama 4's {self.BASE_SIZE}")
        pattern = {"Regex": self.pattern}
        _require(said, [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}])
        names = _filled(special)
        _require_merges(said["model"].get("merges"), said["model"]["vocab"])
        self._build({piece: rank for rank, piece in enumerate(pieces)}, names, HF_FILE, file)


def _byte_tokenizer(said: dict[str, Any], pieces: list[bytes], special: dict[str, int]) -> ByteTokenizer:
    _require(said, [])
    tokenizer = ByteTokenizer()
    if pieces != tokenizer.pieces or special != tokenizer.special_tokens or said["model"].get("merges") != []:
        raise _Differs("its vocabulary is one of bytes, and not that of this project's byte tokenizer")
    return tokenizer


def _pieces(said: Any) -> list[bytes]:
    """What the ids 0, 1, … of the vocabulary stand for."""
    model = said.get("model") if isinstance(said, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
        raise ValueError("it should have a model with a vocab of pieces and ids")
    if model.get("type") != "BPE":
        raise _Differs(f"its model is {model.get('type')!r} and not 'BPE'")
    by_id = sorted(vocab, key=vocab.__getitem__)
    if [vocab[text] for text in by_id] != list(range(len(by_id))):
        raise ValueError(f"the ids of its vocab should be 0 to {len(by_id) - 1}, each once")
    spelled = {char: byte for byte, char in enumerate(_byte_characters())}
    try:
        pieces = [bytes([spelled[char] for char in text]) for text in by_id]
    except KeyError as error:
        raise _Differs(f"its vocabulary has the character {error}, which spells no byte") from error
    if not {bytes([i]) for i in range(256)} <= set(pieces):
        raise ValueError("its vocab should have every byte")
    return pieces


def _special(said: dict[str, Any]) -> dict[str, int]:
    """The special tokens, in the order of their ids."""
    added = said.get("added_tokens")
    if not isinstance(added, list) or not all(
        isinstance(one, dict) and isinstance(one.get("id"), int) and isinstance(one.get("content"), str)
        for one in added
    ):
        raise ValueError("it should have added_tokens, each with an id and a content")
    plain = [one["content"] for one in added if one.get("special") is not True]
    if plain:
        raise _Differs(f"its added token {plain[0]!r} is not special, so that text which spells it would get that id")
    special = {one["content"]: one["id"] for one in sorted(added, key=lambda one: one["id"])}
    first = len(said["model"]["vocab"])
    ids = set(special.values())
    if len(special) != len(added) or len(ids) != len(added) or min(ids, default=first) < first:
        raise ValueError(f"its added tokens should have names and ids of their own, from {first} on")
    return special


def _require(said: dict[str, Any], split: list[dict[str, Any]]) -> None:
    """Raises _Differs unless text becomes pieces as in Llama 4's, by this split and then bytes."""
    if said.get("normalizer") is not None:
        raise _Differs(f"it has the normalizer {str(said['normalizer'])[:80]}")
    before = said.get("pre_tokenizer")
    steps = before.get("pretokenizers") if isinstance(before, dict) and before.get("type") == "Sequence" else [before]
    wanted = [*split, _BYTE_LEVEL]
    alike = isinstance(steps, list) and len(steps) == len(wanted)
    for step, want in zip(steps, wanted, strict=True) if alike else ():
        # trim_offsets is about places in the text, and not about ids.
        alike &= isinstance(step, dict) and all(step.get(key) == want[key] for key in want if key != "trim_offsets")
    if not alike:
        raise _Differs(f"its pre_tokenizer is {str(before)[:400]}, and should be {wanted}")
    for key, want in (("dropout", None), ("byte_fallback", False), ("ignore_merges", True)):
        if (said["model"].get(key) or None) != (want or None):
            raise _Differs(f"its model has {key} {said['model'].get(key)!r}, and should have {want!r}")


def _require_merges(merges: Any, vocab: dict[str, int]) -> None:
    """Raises _Differs unless the merges are those of the ids: all pairs that make a piece, by the piece's id."""
    if not isinstance(merges, list):
        raise ValueError("its model should have a list of merges")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if not all(len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str) for pair in pairs):
        raise ValueError("its merges should be pairs of pieces")
    made = [vocab.get(left + right, -1) for left, right in pairs if left in vocab and right in vocab]
    # As many different and right ones as there are: these are all.
    count = sum(text[:cut] in vocab and text[cut:] in vocab for text in vocab for cut in range(1, len(text)))
    right = len(made) == len(set(pairs)) == len(pairs) == count and -1 not in made
    if not right or made != sorted(made):
        raise _Differs(f"its {len(pairs)} merges are not the {count} that the ids of its pieces imply, in their order")


def _filled(special: dict[str, int]) -> Sequence[str]:
    """Special tokens from the first id after the pieces on, without gaps: those of the file, in between Meta's."""
    first = BPETokenizer.BASE_SIZE
    missing = [name for name in LLAMA4_SPECIAL if name not in special and not _optional(name)]
    if missing:
        raise _Differs(f"it lacks the special token {missing[0]}")
    names = {i: name for name, i in special.items()}
    metas = {first + i: name for i, name in enumerate(LLAMA4_SPECIAL) if name not in special}
    stop = max(*names, first + len(LLAMA4_SPECIAL) - 1) + 1
    if stop - first > 2 * len(LLAMA4_SPECIAL):
        raise _Differs(f"its special tokens go up to the id {stop - 1}, far above Llama 4's")
    return [names.get(i) or metas.get(i) or f"<|unused_{i}|>" for i in range(first, stop)]


def _optional(name: str) -> bool:
    """Nothing is written with it, and published files may lack it."""
    return "reserved" in name or "reasoning" in name


def tokenizer_json(tokenizer: Llama4Names) -> dict[str, Any]:
    """The content of tokenizer.json: gives every text the ids of `tokenizer`, after begin_of_text, as published."""
    pieces = tokenizer.pieces
    spell = _byte_characters()
    spelled = ["".join(spell[b] for b in piece) for piece in pieces]
    ids = {piece: i for i, piece in enumerate(pieces)}
    bos = "<|begin_of_text|>"
    split = []
    if isinstance(tokenizer, BPETokenizer):
        pattern = {"Regex": tokenizer.pattern}
        split = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, i in tokenizer.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, _BYTE_LEVEL]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as tiktoken has it
            "vocab": {text: i for i, text in enumerate(spelled)},
            "merges": [
                (spelled[left], spelled[right]) for i in range(len(pieces)) for left, right in _merges(pieces[i], ids)
            ],
        },
    }


def tokenizer_config(tokenizer: Llama4Names, context_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context_length,
    }


def _merges(piece: bytes, ids: dict[bytes, int]) -> list[tuple[int, int]]:
    """The pairs of pieces that make this one, those of lower ranks first."""
    cuts = ((ids.get(piece[:i]), ids.get(piece[i:])) for i in range(1, len(piece)))
    return sorted((left, right) for left, right in cuts if left is not None and right is not None)

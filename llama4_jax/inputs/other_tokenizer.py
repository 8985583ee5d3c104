"""Any tokenizer.json: the tokenizer of another model, or one of your own, by Hugging Face's package `tokenizers`.

It gives every text the ids that `transformers` gives it, without special tokens, with one difference: text stays text.
`transformers` reads `<|endoftext|>` in a document as that token. Here the special tokens of the file have names that
no text can hold (random ones, drawn when it is read), so text that spells one is cut into ordinary pieces. Special are
the added tokens that the file calls so, and those that begin, end and fill a document; an added token that the file
does not call special, such as a run of spaces, is ordinary vocabulary.

Which tokens begin, end and fill a document stands in `tokenizer_config.json` or `special_tokens_map.json` beside the
file, or else is known by usual names. A vocabulary without a token for the beginning uses that of the end, as GPT-2
does.

What a token stands for, in bytes, for decoding and for bits per byte: of a byte-level vocabulary exactly its bytes; of
others what the file's decoder makes of it inside a text, such as " word" of "▁word", and one byte of "<0xE6>". So a
tokenizer that puts a space before every text counts that space, and one that loses something, by writing all in small
letters, counts what it kept.

A file may be hostile. Whatever it says, it is refused or read, in bounded time and memory: `tokenizers` itself bounds
the search of an expression, and a file whose rules could make a text a thousand times longer is refused.
"""

import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import msgspec
from etils import epath
from numpy.typing import ArrayLike

from llama4_jax.atomic import write_atomically
from llama4_jax.inputs.tokenizer import HF_FILE, Tokenizer, utf8
from llama4_jax.untrusted_json import read_json, shown, typed

CONFIG_FILE, MAP_FILE = "tokenizer_config.json", "special_tokens_map.json"

# Where the files name no token, these do it, the first that is there.
_BEGINS = ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]", "<|bos|>")
_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>")
_FILLS = ("<|finetune_right_pad|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>")
_END_REPLIES = (*_ENDS, "<|eot|>", "<|eom|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|return|>")

_MAX_TEXT = 1_000_000  # characters given to `tokenizers` at a time, which takes a hundred bytes and more for each
_MAX_GROWTH = 1000  # times that the rules of a file may lengthen a text
_MAX_FREE_IDS = 4096  # ids below the highest that no token has
_TABLE_SECONDS = 30.0  # for decoding each token of the vocabulary once

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")

T = TypeVar("T")


class _Added(msgspec.Struct):
    content: str
    id: int
    special: bool = False


class _File(msgspec.Struct):
    """What is read of a tokenizer.json here; `tokenizers` reads the rest."""

    model: dict[str, Any]
    added_tokens: list[_Added] | None = None
    normalizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


class _Content(msgspec.Struct):
    content: str


class _Config(msgspec.Struct):
    """What is read of tokenizer_config.json and special_tokens_map.json."""

    bos_token: str | _Content | None = None
    eos_token: str | _Content | None = None
    pad_token: str | _Content | None = None


class _Roles(NamedTuple):
    """Names of tokens; None where neither the files nor custom name one."""

    bos: str | None
    eos: str | None
    pad: str | None


class OtherTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json.

    Raises FileNotFoundError if there is no such file; ValueError if it or one beside it is damaged, `tokenizers` cannot
    read it, it has no token that ends a text, its ids would be random, or text could forge a special token.
    """

    def __init__(self, path: epath.PathLike):
        path = epath.Path(path)
        said = read_json(path, of=dict[str, Any])
        file = typed(said, _File, where=str(path))
        self._where = str(path)
        self._files = {HF_FILE: path.read_bytes()}
        roles = self._read_roles(path, file)
        vocab = _vocabulary(file, self._where)
        special = _special(file, vocab, roles, self._where)
        _check_growth(file, self._where)
        unknown = _check_model(file, special, roles, self._where)
        self._engine, unsaid = self._build(said, file, special, unknown)
        super().__init__(self._table(file, special, unsaid), special)
        self.eos_id = special[roles.eos]
        self.bos_id = special[roles.bos] if roles.bos else self.eos_id
        self.pad_id = special[roles.pad] if roles.pad else self.eos_id
        ends = (special[name] for name in _END_REPLIES if name in special)
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *ends)))
        content = hashlib.blake2b(self._files[HF_FILE], digest_size=8)
        content.update(repr((self.bos_id, self.eos_id, self.pad_id, sorted(special.items()))).encode())
        self.fingerprint = f"tokenizers-{content.hexdigest()}"

    def save(self, directory: epath.PathLike) -> None:
        for name, content in self._files.items():
            write_atomically(epath.Path(directory) / name, content)

    def _encode(self, text: str) -> Iterator[ArrayLike]:
        for part in _parts(utf8(text).decode()):
            (encoding,) = self._run(lambda part=part: self._engine.encode_batch_fast([part], add_special_tokens=False))
            yield encoding.ids

    def _read_roles(self, path: epath.Path, file: _File) -> _Roles:
        """What the files beside this one name, or what usual names say."""
        said = []
        if path.name == HF_FILE:
            for name in (CONFIG_FILE, MAP_FILE):
                beside = path.parent / name
                if beside.is_file():
                    said.append(read_json(beside, of=_Config))
                    self._files[name] = beside.read_bytes()
        there = {token.content for token in file.added_tokens or ()}

        def named(field: str, usual: tuple[str, ...]) -> str | None:
            given = (getattr(config, field) for config in said)
            token = next((token for token in given if token is not None), None)
            if token is None:
                return next((name for name in usual if name in there), None)
            return token.content if isinstance(token, _Content) else token

        return _Roles(named("bos_token", _BEGINS), named("eos_token", _ENDS), named("pad_token", _FILLS))

    def _build(
        self, said: dict[str, Any], file: _File, special: dict[str, int], unknown: str | None
    ) -> tuple[Any, dict[str, str]]:
        """The engine, in which special tokens have other names; and these names."""
        import tokenizers

        mark = secrets.token_hex(16)
        unsaid = {name: f"\ufdd0{mark}{i}\ufdd0" for name, i in special.items()}
        model = {**file.model, "unk_token": unsaid.get(unknown, unknown)} if "unk_token" in file.model else file.model
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model = {**model, "vocab": {unsaid.get(piece, piece): i for piece, i in vocab.items()}}
        else:
            model = {**model, "vocab": [[unsaid.get(piece, piece), score] for piece, score in vocab]}
        added = [
            {**one, "content": unsaid.get(one["content"], one["content"])} for one in said.get("added_tokens") or ()
        ]
        without = dict.fromkeys(("post_processor", "truncation", "padding"))
        renamed = {**said, **without, "model": model, "added_tokens": added}
        engine = self._run(lambda: tokenizers.Tokenizer.from_str(json.dumps(renamed)))
        engine.encode_special_tokens = True  # those that keep their names, as bytes do, are no tokens in a text either
        for one in file.added_tokens or ():
            got = engine.token_to_id(unsaid.get(one.content, one.content))
            if got != one.id:
                raise ValueError(
                    f"{self._where}: the added token {shown(one.content)} has the id {one.id}, which `tokenizers` "
                    f"reads as {got}: ids of added tokens should follow those of the vocabulary."
                )
        return engine, unsaid

    def _table(self, file: _File, special: dict[str, int], unsaid: dict[str, str]) -> list[bytes]:
        """What each id stands for."""
        pieces: dict[str, int] = self._engine.get_vocab(with_added_tokens=True)
        count = max(pieces.values()) + 1
        if count - len(set(pieces.values())) > _MAX_FREE_IDS:
            raise ValueError(f"{self._where}: its {len(pieces):,} tokens have ids up to {count - 1:,}.")
        added = {one.content for one in file.added_tokens or ()}
        hidden = set(unsaid.values())
        as_bytes = self._bytes_of_piece(file)
        table = [b""] * count
        until = time.monotonic() + _TABLE_SECONDS
        for piece, i in pieces.items():
            if piece not in hidden:
                table[i] = utf8(piece) if piece in added and not _is_byte(piece, file) else as_bytes(piece)
            if time.monotonic() > until:
                raise ValueError(f"{self._where}: its decoder takes too long.")
        for name, i in special.items():
            table[i] = utf8(name)
        return table

    def _bytes_of_piece(self, file: _File) -> Callable[[str], bytes]:
        kinds = [step.get("type") for step in _steps(file.decoder, "decoders")]
        if "ByteLevel" in kinds or _is_byte_level(file):
            spelled = {char: bytes([byte]) for byte, char in enumerate(byte_characters())}
            return lambda piece: b"".join(spelled.get(char) or utf8(char) for char in piece)
        decoder = self._engine.decoder
        falls_back = "ByteFallback" in kinds

        def decoded(tokens: list[str]) -> str:
            return " ".join(tokens) if decoder is None else self._run(lambda: decoder.decode(tokens))

        before = decoded(["a"])

        def as_bytes(piece: str) -> bytes:
            if falls_back and _BYTE.fullmatch(piece):
                return bytes([int(piece[3:5], 16)])
            text = decoded(["a", piece])
            return utf8(text[len(before) :] if text.startswith(before) else piece)

        return as_bytes

    def _run(self, call: Callable[[], T]) -> T:
        """The result of `tokenizers`, whose errors are of no one class: it raises Exception, and Rust's panics."""
        try:
            return call()
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            raise ValueError(
                f"{self._where} cannot be used by the package `tokenizers`: {shown(str(error))}."
            ) from None


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself if it is one in Latin-1, else the next one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _is_byte_level(file: _File) -> bool:
    """Whether every byte has a piece of its own, so that no text is unknown."""
    vocab = file.model.get("vocab")
    return file.model.get("type") == "BPE" and isinstance(vocab, dict) and vocab.keys() >= set(byte_characters())


def _vocabulary(file: _File, where: str) -> dict[str, int]:
    """Pieces and ids of the model, added tokens not included."""
    vocab = file.model.get("vocab")
    if isinstance(vocab, dict):
        pieces = typed(vocab, dict[str, int], where=f"{where}: model.vocab")
    elif isinstance(vocab, list):
        listed = typed(vocab, list[tuple[str, float]], where=f"{where}: model.vocab")
        pieces = {piece: i for i, (piece, _) in enumerate(listed)}
    else:
        raise ValueError(f"{where} is no tokenizer.json: model.vocab should be pieces with ids or scores.")
    ids = [*pieces.values(), *(token.id for token in file.added_tokens or ())]
    if not ids or min(ids) < 0 or max(ids) >= 2 * len(ids) + _MAX_FREE_IDS:
        span = f"{min(ids)} to {max(ids)}" if ids else "none"
        raise ValueError(f"{where}: the ids of its {len(ids):,} tokens should be 0, 1, 2, …, and are {span}.")
    return pieces


def _special(file: _File, vocab: dict[str, int], roles: _Roles, where: str) -> dict[str, int]:
    """Special tokens in the order of their ids."""
    if roles.eos is None:
        raise ValueError(
            f"{where} names no token that ends a text. Put a {CONFIG_FILE} beside it with one of its tokens as "
            f'"eos_token", such as {{"eos_token": "<|endoftext|>"}}.'
        )
    ids = vocab | {one.content: one.id for one in file.added_tokens or ()}
    names = {one.content for one in file.added_tokens or () if one.special and not _is_byte(one.content, file)}
    for role, name in zip(("bos_token", "eos_token", "pad_token"), roles, strict=True):
        if name is not None and name not in ids:
            raise ValueError(f"{where}: {role} is {shown(name)} in the file beside it, which it has no token for.")
    names |= {name for name in roles if name is not None}
    special = {name: ids[name] for name in sorted(names, key=ids.__getitem__)}
    others = {i for name, i in ids.items() if name not in special}
    if len(set(special.values())) < len(special) or not others.isdisjoint(special.values()):
        raise ValueError(f"{where}: two of its tokens have one id, and one of them is special.")
    return special


def _is_byte(piece: str, file: _File) -> bool:
    """Whether it is what the model falls back to for a byte of what it does not know."""
    return bool(file.model.get("byte_fallback")) and _BYTE.fullmatch(piece) is not None


def _check_model(file: _File, special: dict[str, int], roles: _Roles, where: str) -> str | None:
    """The model's token for what it does not know. Raises ValueError if ids are random, or text could forge an end."""
    if file.model.get("dropout"):
        raise ValueError(
            f"{where}: model.dropout is {shown(file.model['dropout'])}, which makes ids random: set it to 0."
        )
    unknown = file.model.get("unk_token")
    unknown = unknown if isinstance(unknown, str) else None
    if isinstance(file.model.get("unk_id"), int) and isinstance(file.model["vocab"], list):
        listed, place = file.model["vocab"], file.model["unk_id"]
        unknown = listed[place][0] if 0 <= place < len(listed) else None
    if unknown is None or unknown not in roles:
        return unknown
    if _is_byte_level(file):
        return None  # GPT-2 names one and never needs it
    raise ValueError(
        f"{where}: its unknown token {shown(unknown)} also begins, ends or fills a text, so that a character that it "
        f"does not know would do so. Give it an unknown token of its own."
    )


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A normalizer or decoder as a flat list of its steps."""
    steps, left = [], [part]
    while left:
        step = left.pop()
        if isinstance(step, dict):
            steps.append(step)
        if isinstance(step, dict) and isinstance(step.get(inner), list):
            left += step[inner][::-1]
    return steps


def _check_growth(file: _File, where: str) -> None:
    for name, steps in (
        ("normalizer", _steps(file.normalizer, "normalizers")),
        ("decoder", _steps(file.decoder, "decoders")),
    ):
        growth = 1.0
        for step in steps:
            content, pattern = step.get("content", step.get("prepend")), step.get("pattern")
            if isinstance(content, str):
                literal = pattern.get("String") if isinstance(pattern, dict) else None
                found = len(literal) if isinstance(literal, str) and literal else 1 / (1 + 1 / max(1, len(content)))
                growth *= max(1.0, len(content) / found)
            charsmap = step.get("precompiled_charsmap")
            if isinstance(charsmap, str):
                growth *= _charsmap_growth(charsmap)
            if growth > _MAX_GROWTH:
                raise ValueError(f"{where}: its {name} could make a text more than {_MAX_GROWTH} times longer.")


def _charsmap_growth(charsmap: str) -> int:
    """The longest text that SentencePiece's table puts for a character: they follow the trie, ended by zeros."""
    try:
        table = base64.b64decode(charsmap)
    except ValueError:
        return 1  # `tokenizers` says what is wrong
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1, max(map(len, texts.split(b"\0"))))


def _parts(text: str) -> Iterator[str]:
    """A long text in parts, cut before a single space: where hardly any tokenizer has a piece across."""
    start = 0
    while len(text) - start > _MAX_TEXT:
        stop = start + _MAX_TEXT
        place = stop
        while (place := text.rfind(" ", start + _MAX_TEXT // 2, place)) > 0:
            if not text[place - 1].isspace() and not text[place + 1].isspace():
                break
        stop = place if place > 0 else stop
        yield text[start:stop]
        start = stop
    yield text[start:]

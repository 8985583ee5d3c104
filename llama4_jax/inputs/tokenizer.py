"""Text ↔ token ids: bytes for small models, Llama 4's own BPE, and any other tokenizer.json (`other_tokenizer.py`).

All speak one language (`Tokenizer`). Bytes and Llama 4's BPE have special tokens of Llama 4's names, so that chat and
pictures are spelled alike in both; what another tokenizer lacks of them it cannot express. `encode` never produces a
special token from text: `<|eot|>` in a user's message, a file or a tool's result is seven harmless characters, and no
input can end a turn or start a role. Special tokens are put in by id, by whoever builds a prompt.

Sources: `tokenizer.model` and `llama4/tokenizer.py` of llama-models 0.3.0 for the ids, the limits and the order of the
special tokens; the o200k expression is published with tiktoken.
"""

import abc
import base64
import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, SupportsIndex

import numpy as np
import tiktoken
from etils import epath
from jaxtyping import Int, Integer
from numpy.typing import ArrayLike

from llama4_jax.atomic import write_atomically
from llama4_jax.untrusted_json import read_json, shown

BPE_FILE = "tokenizer.model"
BYTES_FILE = "byte_tokenizer.json"
HF_FILE = "tokenizer.json"


def _reserved(prefix: str, first: int, last: int) -> list[str]:
    return [f"{prefix}reserved_special_token_{i}" for i in range(first, last + 1)]


def _named(*names: str) -> list[str]:
    return [f"<|{name}|>" for name in names]


# Ids 200000 to 202047, in this order.
LLAMA4_SPECIAL = _named(
    *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
    *("header_start", "header_end", "eom", "eot", "step"),
    *_reserved("text_post_train_", 0, 5),
    *("python_start", "python_end", "finetune_right_pad"),
    *_reserved("text_post_train_", 8, 68),
    *("image_start", "image_end"),
    *_reserved("vision_", 0, 1),
    *("tile_x_separator", "tile_y_separator"),
    *_reserved("vision_", 2, 5),
    "image",
    *_reserved("vision_", 6, 6),
    "patch",
    *_reserved("vision_", 7, 1047),
    *_reserved("reasoning_", 0, 7),
    *("reasoning_thinking_start", "reasoning_thinking_end"),
    *_reserved("", 0, 903),
)


class Tokenizer(abc.ABC):
    """What all tokenizers have in common: a table from id to bytes, and which of the ids are special.

    - vocab_size: ids are 0 … vocab_size - 1
    - id_dtype: the smallest integers that hold every id, uint16 or int32
    - bos_id, eos_id, pad_id: what begins a document, what ends it, and what fills a row
    - stop_ids: where a reply ends
    - special_tokens: full name, as in `<|eot|>`, to id
    - fingerprint: equal for two tokenizers exactly if they give every text and every special token the same ids
    """

    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    fingerprint: str

    def __init__(self, table: Sequence[bytes], special_tokens: Mapping[str, int]):
        """`table`: what each id stands for, special tokens by their names."""
        self._bytes = list(table)
        self.vocab_size = len(self._bytes)
        self.id_dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)
        self.special_tokens: dict[str, int] = dict(special_tokens)
        self._is_special = np.zeros(self.vocab_size, bool)
        self._is_special[list(self.special_tokens.values())] = True
        self._lengths = np.where(self._is_special, 0, [*map(len, self._bytes)]).astype(np.int32)

    def leave_free(self, vocab_size: int) -> None:
        """Ids beyond the tokenizer's own and below `vocab_size`, a model's larger vocabulary, stand for nothing: a
        model may write them until it has learnt that they never come."""
        free = max(0, vocab_size - len(self._bytes))
        self._bytes += [b""] * free
        self._is_special, self._lengths = (np.pad(x, (0, free)) for x in (self._is_special, self._lengths))

    @abc.abstractmethod
    def _encode(self, text: str) -> Iterator[ArrayLike]:
        """Ids of the text, in parts: so that a long text is never a list of as many Python integers."""

    @abc.abstractmethod
    def save(self, directory: str | epath.PathLike) -> None:
        """Write into an existing directory what `load_tokenizer(directory)` needs to give this tokenizer again."""

    def encode_array(self, text: str, *, bos: bool = False, eos: bool = False) -> Integer[np.ndarray, " T"]:
        """Ids of the text alone, of `id_dtype`; `bos` and `eos` put what begins a document before, and what ends it
        after.

        A lone surrogate, which UTF-8 cannot express, becomes U+FFFD.
        """
        parts = [[self.bos_id] if bos else [], *self._encode(text), [self.eos_id] if eos else []]
        return np.concatenate(parts, dtype=self.id_dtype, casting="unsafe")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """As `encode_array`, as a list."""
        return self.encode_array(text, bos=bos, eos=eos).tolist()

    def decode_bytes(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> bytes:
        """The bytes that ids stand for, special tokens as their names. Raises ValueError for an id out of range."""
        array = self._checked(ids)
        if skip_special and array.size:
            array = array[~self._is_special[array]]
        return b"".join([self._bytes[i] for i in array.tolist()])

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> str:
        """As `decode_bytes`, read as UTF-8; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def token_bytes(self, ids: Integer[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """How many bytes of text each id stands for: int32; special tokens stand for none. For bits per byte."""
        return self._lengths[self._checked(ids)]

    def _checked(self, ids: Iterable[SupportsIndex]) -> np.ndarray:
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if array.size and (array.min() < 0 or array.max() >= len(self._bytes)):
            wrong = next(i for i in array.flat if not 0 <= i < len(self._bytes))
            raise ValueError(
                f"token id {wrong} is out of range: this tokenizer has {self.vocab_size} ids, 0 to "
                f"{self.vocab_size - 1}. Is it the one that the model was trained with?"
            )
        return array


class Llama4Names(Tokenizer):
    """A tokenizer whose special tokens have Llama 4's names, and come after all other ids.

    begin_of_text, end_of_text and finetune_right_pad are `bos_id`, `eos_id` and `pad_id`; a reply ends with
    end_of_text, eom or eot.
    """

    def __init__(self, kind: str, pieces: Sequence[bytes], special: Sequence[str]):
        table = [*pieces, *(name.encode() for name in special)]
        super().__init__(table, {name: len(pieces) + i for i, name in enumerate(special)})
        self._first_special = len(pieces)
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.pad_id = self.special_tokens["<|finetune_right_pad|>"]
        self.stop_ids = (self.eos_id, self.special_tokens["<|eom|>"], self.special_tokens["<|eot|>"])
        content = b"".join(len(piece).to_bytes(4, "little") + piece for piece in table)
        self.fingerprint = f"{kind}-{hashlib.blake2b(content, digest_size=8).hexdigest()}"

    @property
    def pieces(self) -> list[bytes]:
        """What each id that is not special stands for."""
        return self._bytes[: self._first_special]


class ByteTokenizer(Llama4Names):
    """Id 0 to 255 is that byte of UTF-8; then Llama 4's 21 named special tokens in its order, from 256 on.

    The vocabulary is filled up to 320 with reserved tokens: a multiple of 64, so that meshes divide the embedding.
    """

    VOCAB_SIZE: ClassVar[int] = 320

    def __init__(self):
        named = [name for name in LLAMA4_SPECIAL if "reserved" not in name]
        free = self.VOCAB_SIZE - 256 - len(named)
        super().__init__("bytes", [bytes([i]) for i in range(256)], named + _named(*_reserved("", 0, free - 1)))

    def _encode(self, text: str) -> Iterator[ArrayLike]:
        yield np.frombuffer(utf8(text), np.uint8)

    def save(self, directory: str | epath.PathLike) -> None:
        write_atomically(
            epath.Path(directory) / BYTES_FILE, json.dumps({"type": "bytes", "vocab_size": self.vocab_size})
        )


class BPETokenizer(Llama4Names):
    """Llama 4's byte-pair encoding: 200 000 pieces from `tokenizer.model`, then 2 048 special tokens.

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged or another model's.
    """

    BASE_SIZE: ClassVar[int] = 200_000

    pattern: ClassVar[str] = "|".join(
        [
            # a word, with the sign or space before it and the English contraction after it: lower case after upper …
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            # … or upper case, where no lower case follows
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )

    def __init__(self, path: str | epath.PathLike):
        path = epath.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such tokenizer file: {path}")
        file = path.read_bytes()
        ranks = _read_ranks(file, path)
        if len(ranks) != self.BASE_SIZE:
            raise ValueError(
                f"{path} holds {len(ranks)} tokens and Llama 4's tokenizer.model {self.BASE_SIZE}: it is truncated, "
                f"or of another model. Meta publishes it with the weights and in the PyPI package llama-models."
            )
        self._build(ranks, LLAMA4_SPECIAL, BPE_FILE, file)

    def _build(self, ranks: dict[bytes, int], special: Sequence[str], file_name: str, file: bytes) -> None:
        """The tokenizer of these ranks, whose special tokens come after them; saved as this file."""
        super().__init__("llama4-bpe", sorted(ranks, key=ranks.__getitem__), special)
        self._file_name, self._file = file_name, file
        self._bpe = tiktoken.Encoding(
            "llama4", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def _encode(self, text: str) -> Iterator[ArrayLike]:
        for piece in _bounded(text):
            yield np.array(self._bpe.encode_ordinary(piece), self.id_dtype)

    def save(self, directory: str | epath.PathLike) -> None:
        write_atomically(epath.Path(directory) / self._file_name, self._file)


class StreamDecoder:
    """Decoding while tokens arrive: text comes out as soon as it is certain, and never half a character.

    All that `feed` and at last `flush` return, joined, is what `decode` gives for all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, *ids: SupportsIndex) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, skip_special=self._skip_special))

    def flush(self) -> str:
        """What is left: U+FFFD if the tokens end inside a character. The decoder is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def load_tokenizer(spec: str | epath.PathLike) -> Tokenizer:
    """The tokenizer that a spec names: "bytes", or a path.

    The path is of Llama 4's `tokenizer.model` or of a Hugging Face `tokenizer.json`, of Llama 4 or any other model; or
    of a directory that holds one, or to which a tokenizer was saved. Raises FileNotFoundError if there is none,
    ValueError if it is damaged, or what it describes cannot be used.
    """
    from llama4_jax.inputs.hf_tokenizer import read_tokenizer_json  # it builds on this file

    if spec == "bytes":
        return ByteTokenizer()
    path = epath.Path(spec)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(
                f'no such tokenizer: {path}. Give "bytes", or the path of a {HF_FILE} or {BPE_FILE}.'
            )
        return read_tokenizer_json(path) if path.suffix == ".json" else BPETokenizer(path)
    readers = {BYTES_FILE: _read_byte_tokenizer, BPE_FILE: BPETokenizer, HF_FILE: read_tokenizer_json}
    for name, read in readers.items():
        if (path / name).is_file():
            return read(path / name)
    raise FileNotFoundError(
        f"no tokenizer in {path}: none of {', '.join(readers)} is there. Meta publishes {BPE_FILE} with the weights "
        f"and in the PyPI package llama-models."
    )


def holds_tokenizer(directory: epath.PathLike) -> bool:
    """Whether `load_tokenizer` finds a file to read there."""
    return any((epath.Path(directory) / name).is_file() for name in (BYTES_FILE, BPE_FILE, HF_FILE))


def utf8(text: str) -> bytes:
    """The text as UTF-8, with U+FFFD for a lone surrogate (and surrogate pairs joined)."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# tiktoken fails on longer texts, and takes quadratic time on longer runs. The numbers are part of the tokenizer: other
# cuts would give other ids.
_MAX_TEXT = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")
_SPACE = re.compile(r"\s")


def _bounded(text: str) -> Iterator[str]:
    """The text in pieces of at most `_MAX_TEXT` characters with no run of space, or of no space, above `_MAX_RUN`."""
    for first in range(0, len(text), _MAX_TEXT):
        part = text[first : first + _MAX_TEXT]
        start = 0
        if _may_have_long_run(part):
            for run in _RUN.finditer(part):
                for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                    yield part[start:cut]
                    start = cut
        yield part[start:]


def _may_have_long_run(text: str) -> bool:
    """False is certain: a run above the limit covers a whole block of half its length. Quick on ordinary text."""
    half = _MAX_RUN // 2
    blocks = (text[i : i + half] for i in range(0, len(text) - half + 1, half))
    return any(block.isspace() or not _SPACE.search(block) for block in blocks)


def _read_ranks(file: bytes, path: epath.Path) -> dict[bytes, int]:
    """The lines `base64 rank` of a tokenizer.model: piece to rank, which is its id and its merge priority."""
    ranks = {}
    for number, line in enumerate(file.splitlines(), 1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged, or no tokenizer.model: line {number} should be a base64 string and a number, "
                f"and is {line[:40]!r}."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([i]) in ranks for i in range(256)):
        raise ValueError(
            f"{path} is damaged: its numbers should be 0 to {len(ranks) - 1}, each once, and every byte be there."
        )
    return ranks


def _read_byte_tokenizer(path: epath.Path) -> ByteTokenizer:
    tokenizer = ByteTokenizer()
    said = read_json(path, of=dict, max_bytes=1 << 16)
    if said != {"type": "bytes", "vocab_size": tokenizer.vocab_size}:
        said = shown(said.get("type")), shown(said.get("vocab_size"))
        raise ValueError(
            f"{path} describes another tokenizer, of type {said[0]} with {said[1]} ids. This version has "
            f"{tokenizer.vocab_size}."
        )
    return tokenizer

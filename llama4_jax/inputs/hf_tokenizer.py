"""The same tokenizer as Hugging Face's tokenizer.json and tokenizer_config.json, for models that are exported.

A tokenizer.json writes bytes as printable characters (GPT-2's table), and priorities as a list of merges: two pieces
that become a third. A piece's rank in tokenizer.model is the priority of every pair that makes it. Source: the format
of the package `tokenizers`; `TikTokenConverter` of transformers 5.23 for how ranks become merges.
"""

from typing import Any

from llama4_jax.inputs.tokenizer import BPETokenizer, Tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
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
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
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
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]},
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
        "decoder": byte_level,
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


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
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


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself if it is one in Latin-1, else the next one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]

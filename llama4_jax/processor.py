"""Messages, pictures and tools → what the model takes, and its reply → a message.

    processor = llama4_jax.Processor.from_pretrained(path)
    inputs = processor(messages, images=["a.png"], tools=tools)
    logits = model(inputs.tokens, images=inputs.images)

All of it is numpy; nothing here touches a device.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from llama4_jax.hub import model_directory
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.image import MOST_TILES, ImageConfig
from llama4_jax.inputs.messages import Message, Picture, Tool, read_messages
from llama4_jax.inputs.pictures import IMAGE, cut_pictures, encode_illustrated
from llama4_jax.inputs.tokenizer import Tokenizer, load_tokenizer
from llama4_jax.model.config import VisionConfig
from llama4_jax.untrusted_json import read_json, shown, typed

if TYPE_CHECKING:
    from llama4_jax.inputs.chat_template import ChatTemplate

Template = Literal["meta", "checkpoint"]


class Prompt(NamedTuple):
    """What `generate` takes for one row."""

    tokens: list[int]
    tiles: UInt8[np.ndarray, "tiles S S 3"] | None


class Inputs(NamedTuple):
    """What the model takes, for a batch of one."""

    tokens: Int32[np.ndarray, "1 T"]
    images: UInt8[np.ndarray, "1 tiles S S 3"] | None


class Processor:
    """The tokenizer, the chat format, and how pictures are cut into tiles.

    - tokenizer
    - pictures: how they are cut; None for a model that reads text alone
    - chat: how messages become tokens
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        pictures: ImageConfig | None = None,
        chat: "ChatFormat | ChatTemplate | None" = None,
    ):
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.chat = ChatFormat(tokenizer) if chat is None else chat

    @classmethod
    def from_pretrained(cls, path: str | Path, *, template: Template = "meta") -> "Processor":
        """The processor for the model in a directory, of any format that `llama4_jax.from_pretrained` takes.

        - template: how messages become tokens: "meta", Meta's format, or "checkpoint", the Jinja template in the
          directory (`inputs.chat_template` says how Hugging Face's differs)

        Raises as `open_config` and `load_tokenizer`, and ValueError if the model's `<|patch|>` is not the tokenizer's,
        or if what the directory says of pictures cannot be.
        """
        from llama4_jax.weights.source import open_config

        path = Path(model_directory(path))
        model, tokenizer = open_config(path), load_tokenizer(path)
        tokenizer.leave_free(model.vocab_size)
        vision = model.vision
        pictures = None if vision is None else image_config(vision, tokenizer, **_cutting(path))
        if template == "meta":
            return cls(tokenizer, pictures)
        from llama4_jax.inputs.chat_template import ChatTemplate  # Jinja is not needed otherwise

        return cls(tokenizer, pictures, ChatTemplate.from_pretrained(path, tokenizer))

    def __call__(
        self,
        messages: Sequence[Message | dict[str, Any]],
        *,
        images: Sequence[Any] = (),
        tools: Sequence[Tool | dict[str, Any]] = (),
        generation_prompt: bool = True,
    ) -> Inputs:
        """The conversation as a batch of one; arguments and errors as those of `prompt`."""
        tokens, tiles = self.prompt(messages, images=images, tools=tools, generation_prompt=generation_prompt)
        return Inputs(np.array([tokens], np.int32), None if tiles is None else tiles[None])

    def prompt(
        self,
        messages: Sequence[Message | dict[str, Any]],
        *,
        images: Sequence[Any] = (),
        tools: Sequence[Tool | dict[str, Any]] = (),
        generation_prompt: bool = True,
    ) -> Prompt:
        """A conversation as tokens and tiles.

        - messages: OpenAI-style dicts, or `Message`. Text in them is text, whatever it spells.
        - images: for the pictures in them that have no source of their own, in order: paths, bytes, PIL images, arrays
        - tools: what the assistant may call, OpenAI-style or `Tool`
        - generation_prompt: whether the assistant is to speak next

        Raises ValueError naming the message or picture that is wrong, for pictures without a place and places without a
        picture, and for pictures if the model reads text alone; FileNotFoundError for one that is not there.
        """
        if not isinstance(images, list | tuple):
            raise ValueError(f"images should be a list of pictures, and is a {type(images).__name__}.")
        said = read_messages(messages)
        places = [
            (part.source, f"messages[{i}].content[{j}]")
            for i, message in enumerate(said)
            for j, part in enumerate(message.content)
            if isinstance(part, Picture)
        ]
        free = [where for source, where in places if source is None]
        if len(free) > len(images):
            raise ValueError(
                f"{free[len(images)]} is the place of a picture, and there is none for it: the messages have "
                f"{len(free)} such places, and images has {len(images)} pictures."
            )
        if len(images) > len(free):
            raise ValueError(
                f'images[{len(free)}] has no place: the messages have {len(free)} ({{"type": "image"}}), and images '
                f"has {len(images)} pictures."
            )
        given = iter(enumerate(images))
        sources = []
        for source, where in places:
            if source is None:
                number, source = next(given)
                where = f"images[{number}]"
            sources.append((source, where))
        tokens, tiles = cut_pictures(sources, self.pictures, self.tokenizer)
        rendered = self.chat.encode(said, tools=tools, pictures=tokens, generation_prompt=generation_prompt)
        return Prompt(rendered.tokens, tiles)

    def text_prompt(self, text: str, *, images: Sequence[Any] = ()) -> Prompt:
        """A text to be continued, as tokens and tiles. Each `<|image|>` in it is the place of a picture, or of a list
        of them.

        Raises ValueError for pictures without a place and places without a picture, and as `prompt`.
        """
        content = illustrated(text, images)
        pictures = [part.source for part in content if isinstance(part, Picture)]
        sources = [(source, f"images[{i}]") for i, source in enumerate(pictures)]
        tokens, tiles = cut_pictures(sources, self.pictures, self.tokenizer)
        return Prompt(encode_illustrated(content, tokens, self.tokenizer), tiles)


def illustrated(text: str, images: Sequence[Any]) -> list[str | Picture]:
    """The text with a picture in the place of each `<|image|>`, or several, where `images` has a list of them.

    Raises ValueError unless there are pictures for each place, and a place for all pictures.
    """
    texts = text.split(IMAGE)
    if len(texts) - 1 != len(images):
        raise ValueError(
            f"the prompt has {len(texts) - 1} places for pictures ({IMAGE}), and {len(images)} pictures were given: "
            f"each picture needs a place, and each place a picture."
        )
    content: list[str | Picture] = [texts[0]]
    for given, after in zip(images, texts[1:], strict=True):
        content += map(Picture, given if isinstance(given, list) else [given])
        content.append(after)
    return content


def image_config(vision: VisionConfig, tokenizer: Tokenizer, **cutting: Any) -> ImageConfig:
    """How pictures are cut for this encoder. Raises ValueError if its `<|patch|>` is not the tokenizer's."""
    patch_id = tokenizer.special_tokens.get("<|patch|>")
    if vision.patch_token_id != patch_id:
        is_it = "not in the tokenizer" if patch_id is None else f"{patch_id} for the tokenizer"
        raise ValueError(
            f"model.vision.patch_token_id is {vision.patch_token_id}, but <|patch|> is {is_it}: set it to that, or use "
            f"the model's own tokenizer."
        )
    return ImageConfig(tile_size=vision.image_size, tokens_per_tile=vision.tokens_per_tile, **cutting)


_MAX_BYTES = 2**22
_OF_HUGGING_FACE = {"max_patches": "max_tiles", "resize_to_max_canvas": "resize_to_max_canvas"}
# A file of the directory, the part of it that says how pictures are cut, and what our names for it are.
_WHERE_IT_IS_SAID = (
    ("config.json", "data", {"max_tiles": "max_tiles"}),  # of a run
    ("processor_config.json", "image_processor", _OF_HUGGING_FACE),  # since transformers 5
    ("preprocessor_config.json", None, _OF_HUGGING_FACE),
)


def _cutting(path: Path) -> dict[str, Any]:
    """What a directory says of how pictures are cut, as arguments of `ImageConfig`; Meta's say nothing."""
    for file, part, names in _WHERE_IT_IS_SAID:
        said = _read_object(path / file, part)
        found = {name: said[key] for key, name in names.items() if said.get(key) is not None}
        tiles, largest = found.get("max_tiles", 1), found.get("resize_to_max_canvas", False)
        if type(tiles) is not int or not 1 <= tiles <= MOST_TILES:
            raise ValueError(
                f"{path / file}: the most tiles of a picture should be a number from 1 to {MOST_TILES}, not "
                f"{shown(tiles)}."
            )
        if not isinstance(largest, bool):
            raise ValueError(f"{path / file}: resize_to_max_canvas should be true or false, and is {shown(largest)}.")
        if found:
            return found
    return {}


def _read_object(file: Path, part: str | None) -> dict[str, Any]:
    """The file's JSON object, or the one that is a part of it; empty if there is none."""
    said = read_json(file, of=dict, max_bytes=_MAX_BYTES) if file.is_file() else {}
    return said if part is None else typed(said.get(part, {}), dict, where=f"{file}: {part}")

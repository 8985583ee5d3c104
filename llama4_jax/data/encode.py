"""From a document to what a row holds of it: inputs, targets, which of them count, and tiles of pictures.

What counts in the loss: every token of a text; of a conversation every token, or what the assistant says alone
(`data.loss_on`); never a token that stands for a picture or a part of one, since nothing in the text foretells it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from llama4_jax.data.config import LossOn
from llama4_jax.data.documents import Conversation, Document, Illustrated
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.image import ImageConfig, picture_tokens
from llama4_jax.inputs.messages import Picture
from llama4_jax.inputs.pictures import cut_pictures, encode_illustrated
from llama4_jax.inputs.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A whole document or a part of one, as inputs and targets."""

    tokens: Int32[np.ndarray, "T"]
    targets: Int32[np.ndarray, "T"]
    target_bytes: Int32[np.ndarray, "T"]
    weights: Float32[np.ndarray, "T"]
    tiles: UInt8[np.ndarray, "tiles S S 3"] | None = None

    @property
    def num_tiles(self) -> int:
        return 0 if self.tiles is None else len(self.tiles)


class Encoder:
    """Documents → pieces.

    - pictures: how they are cut into tiles; None for a model that reads text alone
    - fingerprint: equal for two encoders exactly if they make the same pieces
    """

    def __init__(self, tokenizer: Tokenizer, pictures: ImageConfig | None = None, loss_on: LossOn = "all"):
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.loss_on: LossOn = loss_on
        self.fingerprint = f"{tokenizer.fingerprint} {pictures} {loss_on}"
        self._chat = ChatFormat(tokenizer)
        # A picture of several rows and columns has every kind of token that there is.
        self._picture_ids = np.unique(picture_tokens(2, 2, 1, tokenizer.special_tokens))

    def __call__(self, document: Document) -> Piece:
        """A document of n tokens, begin_of_text the first and end_of_text the last, gives n - 1 inputs and targets. A
        conversation ends with what ends its last message instead.

        Raises ValueError naming the document if it has pictures and the model none, or a picture is damaged;
        FileNotFoundError if one is gone.
        """
        if isinstance(document, str):
            return self._piece(self.tokenizer.encode(document, bos=True, eos=True), None, None)
        if isinstance(document, Conversation):
            return self._conversation(document)
        return self._illustrated(document)

    def _conversation(self, document: Conversation) -> Piece:
        pictures = [
            (part.source, f"{document.where}, messages[{i}].content[{j}]")
            for i, message in enumerate(document.messages)
            for j, part in enumerate(message.content)
            if isinstance(part, Picture)
        ]
        tokens, tiles = cut_pictures(pictures, self.pictures, self.tokenizer)
        rendered = self._chat.encode(document.messages, tools=document.tools, pictures=tokens, generation_prompt=False)
        counts = np.array(rendered.reply) if self.loss_on == "replies" else None
        return self._piece(rendered.tokens, counts, tiles)

    def _illustrated(self, document: Illustrated) -> Piece:
        pictures = [(part.source, document.where) for part in document.content if isinstance(part, Picture)]
        tokens, tiles = cut_pictures(pictures, self.pictures, self.tokenizer)
        ids = encode_illustrated(document.content, tokens, self.tokenizer)
        return self._piece([*ids, self.tokenizer.eos_id], None, tiles)

    def _piece(
        self, ids: list[int], counts: Bool[np.ndarray, "..."] | None, tiles: UInt8[np.ndarray, "tiles S S 3"] | None
    ) -> Piece:
        array = np.array(ids, np.int32)
        targets = array[1:]
        weights = np.ones(len(targets), np.float32) if counts is None else counts[1:].astype(np.float32)
        if tiles is not None:
            weights[np.isin(targets, self._picture_ids)] = 0
        target_bytes = np.where(weights > 0, self.tokenizer.token_bytes(targets), 0).astype(np.int32)
        return Piece(array[:-1], targets, target_bytes, weights, tiles)

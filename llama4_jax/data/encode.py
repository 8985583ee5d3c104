"""From a document to what a row holds of it: inputs, targets, which of them count, and tiles of pictures.

What counts in the loss: every token of a text; of a conversation every token, or what the assistant says alone
(`data.loss_on`); never a token that stands for a picture or a part of one, since nothing in the text foretells it.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer, UInt8
from numpy.typing import ArrayLike

from llama4_jax.data.config import LossOn
from llama4_jax.data.documents import Conversation, Document, Illustrated, Tokens
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.image import ImageConfig, picture_tokens
from llama4_jax.inputs.messages import Picture
from llama4_jax.inputs.pictures import cut_pictures, encode_illustrated
from llama4_jax.inputs.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A whole document or a part of one, of T inputs and as many targets.

    - ids: the inputs and the last target, T + 1, in the tokenizer's small integers: a document may be a whole corpus
    - learnt: which targets count; None: all of them
    """

    ids: Integer[np.ndarray, " ids"]
    learnt: Bool[np.ndarray, " T"] | None
    tokenizer: Tokenizer
    tiles: UInt8[np.ndarray, "tiles S S 3"] | None = None

    def __len__(self) -> int:
        return len(self.ids) - 1

    def part(self, start: int, stop: int) -> "Piece":
        """Its targets from `start` on and before `stop`, without pictures."""
        learnt = None if self.learnt is None else self.learnt[start:stop]
        return Piece(self.ids[start : stop + 1], learnt, self.tokenizer)

    @property
    def tokens(self) -> Int32[np.ndarray, " T"]:
        return self.ids[:-1].astype(np.int32)

    @property
    def targets(self) -> Int32[np.ndarray, " T"]:
        return self.ids[1:].astype(np.int32)

    @property
    def weights(self) -> Float32[np.ndarray, " T"]:
        return np.ones(len(self), np.float32) if self.learnt is None else self.learnt.astype(np.float32)

    @property
    def target_bytes(self) -> Int32[np.ndarray, " T"]:
        length = self.tokenizer.token_bytes(self.ids[1:])
        return length if self.learnt is None else np.where(self.learnt, length, 0).astype(np.int32)

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
        self._picture_ids = np.unique(picture_tokens(2, 2, 1, tokenizer.special_tokens)) if pictures else None

    def __call__(self, document: Document) -> Piece:
        """A document of n tokens, begin_of_text the first and end_of_text the last, gives n - 1 inputs and targets. A
        conversation ends with what ends its last message instead.

        Raises ValueError naming the document if it has pictures and the model none, or a picture is damaged;
        FileNotFoundError if one is gone.
        """
        if isinstance(document, str):
            return self._piece(self.tokenizer.encode_array(document, bos=True, eos=True), None, None)
        if isinstance(document, Tokens):
            return self._piece(
                np.concatenate([[self.tokenizer.bos_id], document.ids, [self.tokenizer.eos_id]]), None, None
            )
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
        self, ids: ArrayLike, counts: Bool[np.ndarray, "..."] | None, tiles: UInt8[np.ndarray, "tiles S S 3"] | None
    ) -> Piece:
        ids = np.asarray(ids, self.tokenizer.id_dtype)
        learnt = None if counts is None else counts[1:]
        if tiles is not None:
            of_text = ~np.isin(ids[1:], self._picture_ids)
            learnt = of_text if learnt is None else learnt & of_text
        return Piece(ids, learnt, self.tokenizer, tiles)

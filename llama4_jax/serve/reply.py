"""The tokens of a reply → what a client is shown of it: text, calls of tools, and where it ends.

All of it is pure: no clock, no network. Text comes out as soon as it is certain that it is neither half a character,
nor the beginning of a stop string, nor that of a call.
"""

import dataclasses
from collections.abc import Sequence

from llama4_jax.infer.engine import Sampled
from llama4_jax.inputs.messages import Tool, ToolCall
from llama4_jax.inputs.tokenizer import StreamDecoder, Tokenizer
from llama4_jax.inputs.tool_calls import ReplyStream

# Special tokens that the parser of calls reads; others are nothing that a client should see.
_MARKS = ("<|python_start|>", "<|python_end|>")


@dataclasses.dataclass
class Piece:
    """What is certain after some tokens: texts and calls in their order, and the tokens whose text begins in what has
    been given so far (their log-probabilities go with it)."""

    events: list[str | ToolCall] = dataclasses.field(default_factory=list)
    tokens: list[Sampled] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event for event in self.events if isinstance(event, str))


class StopStrings:
    """Text up to the first of some strings, which is left out; `found` says that it came.

    Of text that may be the beginning of one, at most as much is held back.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        if self.found or not self.stops:
            return "" if self.found else text
        text = self._held + text
        ends = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if ends:  # the one that was complete first, as if characters came one by one
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        longest = max(map(len, self.stops)) - 1
        keep = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class ReplyReader:
    """Reads one reply while it is written.

    - stops: strings that end it, and are no part of it
    - tools: whose calls are read; None: everything is text

    `stopped`: a stop string came, and what follows is of no interest. `taken`: how many tokens it has read.
    """

    def __init__(self, tokenizer: Tokenizer, *, stops: Sequence[str] = (), tools: Sequence[Tool] | None = None):
        self._decoder = StreamDecoder(tokenizer)
        special = tokenizer.special_tokens
        marks = {special[name] for name in _MARKS if name in special} if tools is not None else set()
        self._unseen = frozenset(special.values()) - marks
        self._stop_ids = frozenset(tokenizer.stop_ids)
        self._stops = StopStrings(stops)
        self._parser = None if tools is None else ReplyStream(tools)
        self._decoded = self._given = 0  # characters
        self._waiting: list[tuple[int, Sampled]] = []  # tokens, with where their text begins
        self.taken = self.calls = 0

    @property
    def stopped(self) -> bool:
        return self._stops.found

    @property
    def problem(self) -> str | None:
        """Why something that looks like a call is none; final after `flush`."""
        return None if self._parser is None else self._parser.problem

    def feed(self, tokens: Sequence[Sampled]) -> Piece:
        piece = Piece()
        for token in tokens:
            if self.stopped:
                break
            self.taken += 1
            if token.id in self._stop_ids:
                continue
            self._waiting.append((self._decoded, token))
            if token.id not in self._unseen:
                self._take(self._decoder.feed(token.id), piece)
        return piece

    def flush(self) -> Piece:
        """The reply is over: what was held back."""
        piece = Piece()
        if not self.stopped:
            self._take(self._decoder.flush(), piece)
        if not self.stopped:
            self._give(self._stops.flush(), piece)
        if self._parser is not None:
            self._events(self._parser.flush(), piece)
        if not self.stopped:  # tokens of no text at the end
            piece.tokens += [token for _, token in self._waiting]
        self._waiting = []
        return piece

    def _take(self, text: str, piece: Piece) -> None:
        self._decoded += len(text)
        self._give(self._stops.feed(text), piece)

    def _give(self, text: str, piece: Piece) -> None:
        self._given += len(text)
        while self._waiting and self._waiting[0][0] < self._given:
            piece.tokens.append(self._waiting.pop(0)[1])
        if text:
            self._events([text] if self._parser is None else self._parser.feed(text), piece)

    def _events(self, events: Sequence[str | ToolCall], piece: Piece) -> None:
        for event in events:
            if isinstance(event, str) and piece.events and isinstance(piece.events[-1], str):
                piece.events[-1] += event
            elif event:
                piece.events.append(event)
        self.calls += sum(isinstance(event, ToolCall) for event in events)

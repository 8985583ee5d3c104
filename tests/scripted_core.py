"""What stands in for the engine where a test says what is written."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from llama4_jax.infer.engine_core import EngineCore, Handle, Sampled


class ScriptedHandle(Handle):
    def __init__(self, prompt: list[int], pieces: Iterable[Any], stop_ids: tuple[int, ...]):
        self.prompt_tokens, self._pieces, self._stop_ids = len(prompt), iter(pieces), stop_ids
        self._written: list[Sampled] = []
        self.finish_reason, self.error = None, None

    def so_far(self) -> list[Sampled]:
        return list(self._written)

    def advance(self) -> None:
        piece = next(self._pieces, None)
        if isinstance(piece, BaseException | type):
            raise piece
        if piece is None:
            self.finish_reason = "stop" if self._written and self._written[-1].id in self._stop_ids else "length"
        else:
            self._written += [Sampled(token, None) for token in piece]


class ScriptedCore(EngineCore):
    """In place of the class `EngineCore`: `write` is given what is submitted, and returns the pieces of the reply, one
    a turn: lists of token ids, or an exception that is raised there."""

    context = 2048

    def __init__(self, write: Callable[..., Iterable[Any]]):
        self.write, self.options, self.open = write, {}, []

    def __call__(self, model, **options) -> "ScriptedCore":
        self.options, self.open = options, []
        return self

    def placed(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def submit(self, prompt: list[int], *, tiles, stop_ids: tuple[int, ...], **how) -> ScriptedHandle:
        handle = ScriptedHandle(prompt, self.write(prompt, tiles=tiles, stop_ids=stop_ids, **how), stop_ids)
        self.open.append(handle)
        return handle

    def turn(self) -> bool:
        self.open = [handle for handle in self.open if not handle.done]
        for handle in self.open:
            handle.advance()
        return bool(self.open)

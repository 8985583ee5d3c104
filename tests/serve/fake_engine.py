"""An engine without a model, for tests of what stands around it: the same interface, one thread, fast.

What it writes is a script, which may depend on the request, or random tokens by the request's seed. Under a grammar it
writes among what is allowed, and rather what closes something, so that it comes to an end.
"""

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama4_jax.infer.engine import Engine, EngineDied, Full, Handle, Sampled, Stats

_CLOSING = tuple(b'"}])')


@dataclass(eq=False)
class FakeHandle(Handle):
    prompt: Sequence[int]
    asked: dict[str, Any]
    writes: Any  # an iterator of ids
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_scores: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    error: BaseException | None = None
    written: list[Any] = field(default_factory=list)
    cancelled: bool = False
    _listener: Callable[..., None] | None = None
    _lock: Any = field(default_factory=threading.Lock)

    def listen(self, callback):
        with self._lock:
            self._listener = callback
            if self.written or self.finish_reason is not None or self.error is not None:
                callback(self, list(self.written))

    def cancel(self):
        self.cancelled = True

    def tell(self, tokens, reason=None, error=None):
        with self._lock:
            self.written += tokens
            self.finish_reason, self.error = reason, error
            if self._listener is not None:
                self._listener(self, tokens)


class FakeEngine(Engine):
    """
    - script: gives the ids that a request's reply consists of, or its text; None: random ones
    - delay: seconds for a token of all slots
    """

    alive = True

    def __init__(self, tokenizer, *, script=None, slots=8, context=8192, max_waiting=256, delay=0.0, tokens_a_call=3):
        self.tokenizer, self.script, self.delay, self.tokens_a_call = tokenizer, script, delay, tokens_a_call
        self.slots, self.context, self.max_waiting = slots, context, max_waiting
        self.requests: list[FakeHandle] = []  # all of them, for tests to look at
        self.keep_requests = True
        self._running: list[FakeHandle] = []
        self._waiting: list[FakeHandle] = []
        self._change = threading.Condition()
        self._closing = False
        self._dies: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, prompt, *, tiles=None, max_new_tokens, temperature=0.0, top_p=1.0, top_k=None, seed=0, stop_ids=(),
               frequency_penalty=0.0, presence_penalty=0.0, logit_bias=None, top_logprobs=0, prompt_scores=False,
               constraint=None):  # fmt: skip
        asked = {name: value for name, value in locals().items() if name not in ("self", "prompt")}
        if not len(prompt) or len(prompt) + max_new_tokens > self.context:
            raise ValueError("prompt is empty or too long")
        with self._change:
            if not self.alive:
                raise EngineDied("it died")
            if len(self._waiting) >= self.max_waiting:
                raise Full(f"{self.max_waiting} requests wait")
            handle = FakeHandle(prompt, asked, None, prompt_tokens=len(prompt))
            handle.writes = self._write(handle)
            self._waiting.append(handle)
            if self.keep_requests:
                self.requests.append(handle)
            self._change.notify()
        return handle

    @property
    def stats(self):
        return Stats(self.slots, self.context, waiting=len(self._waiting), running=len(self._running))

    def close(self):
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    def die(self, error):
        with self._change:
            self._dies = error
            self._change.notify()

    def _write(self, handle):
        draw = random.Random(handle.asked["seed"])
        grammar = handle.asked["constraint"]
        if self.script is not None and grammar is None:
            said = self.script(handle) if callable(self.script) else self.script
            ids = self.tokenizer.encode(said) if isinstance(said, str) else list(said)
            yield from ids
            yield self.tokenizer.stop_ids[-1]
        while True:
            if grammar is None:
                yield draw.randrange(32, 127)
                continue
            bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits).tolist()
            ends = [i for i in allowed if i in _CLOSING or i in self.tokenizer.stop_ids]
            token = draw.choice(ends if ends and draw.random() < 0.5 else allowed)
            grammar.accept(token)
            yield token

    def _sampled(self, token, top):
        return Sampled(token, -0.5, tuple((token + i if i else token, -0.5 - i) for i in range(top)))

    def _run(self):
        while True:
            with self._change:
                self._change.wait_for(
                    lambda: self._closing or self._dies or self._running or self._waiting, timeout=0.5
                )
                if self._dies is not None:
                    self.alive = False
                    pending, self._running, self._waiting = self._running + self._waiting, [], []
                elif self._closing and not self._running and not self._waiting:
                    return
                else:
                    pending = []
                    while self._waiting and len(self._running) < self.slots:
                        self._running.append(self._waiting.pop(0))
                waiting_gone = [one for one in self._waiting if one.cancelled]
                self._waiting = [one for one in self._waiting if not one.cancelled]
            for handle in waiting_gone:
                handle.tell([], "cancelled")
            if self._dies is not None:
                for handle in pending:
                    handle.tell([], error=self._dies)
                return
            if self.delay:
                time.sleep(self.delay)
            for handle in list(self._running):
                try:
                    self._step(handle)
                except Exception as error:
                    self._running = [one for one in self._running if one is not handle]
                    handle.tell([], error=error)

    def _step(self, handle):
        asked = handle.asked
        reason, tokens = None, []
        if asked["prompt_scores"] and not handle.prompt_scores:
            handle.prompt_scores = [None, *(self._sampled(t, asked["top_logprobs"]) for t in handle.prompt[1:])]
        if handle.cancelled:
            reason = "cancelled"
        else:
            left = asked["max_new_tokens"] - len(handle.written)
            for token in itertools.islice(handle.writes, min(self.tokens_a_call, left)):
                tokens.append(self._sampled(token, asked["top_logprobs"]))
                if token in asked["stop_ids"]:
                    reason = "stop"
                    break
            if reason is None and len(handle.written) + len(tokens) >= asked["max_new_tokens"]:
                reason = "length"
        if reason is not None:
            self._running.remove(handle)
        handle.tell(tokens, reason)

"""Many requests at once, each as if it were alone: continuous batching over fixed slots of a cache.

    engine = Engine(model, processor, slots=8, context=8192)
    handle = engine.submit(messages, max_new_tokens=64, temperature=0.7, seed=3)
    for token in handle.tokens(): …

Three compiled programs do the work, with the cache and the rows donated: one reads a piece of *one* slot's prompt, one
decodes all rows for some tokens, and one copies a slot. Everything that distinguishes requests is an array, so that
after the start nothing is compiled. `scheduler.step` says what runs next, `prefix` what need not be read.

What a request gets depends on nothing beside it: its tokens and log-probabilities are the same bit for bit alone, among
others, in any slot, and whether its prompt was found in the cache. Decoding always has the shape of all slots, in which
a row does not feel the others; a prompt is read by itself, in pieces that are cut at multiples of their size.

A thread owns the device. It reads what one call gave while the next one runs.
"""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from llama4_jax.infer.generate import CACHES, Tiles, check_cache, check_images, check_prompt
from llama4_jax.infer.prefix import Held, keys_of, usable
from llama4_jax.infer.rows import (
    BIASES,
    NOTHING,
    STOPS,
    TOPS,
    Choice,
    Row,
    Settings,
    advanced,
    choose,
    empty_rows,
    scored,
)
from llama4_jax.infer.sampling import LEAST_TEMPERATURE, check_sampling, check_whole
from llama4_jax.infer.scheduler import Arrived, Gone, Limits, Piece, Request, Running, State, step
from llama4_jax.model.cache import Cache
from llama4_jax.model.llama4 import Images, Llama4
from llama4_jax.processor import Processor
from llama4_jax.sharding import SERVING, constrain, use_rules

TOKENS_PER_CALL = 8  # decoded before the host looks: it is told of a new request, or of the end of one, that late
_SMALL_PIECE = 32  # what is left of a prompt may be this short
_TILES = 8  # encoded at once


class Full(RuntimeError):
    """As many requests wait as may wait: ask again later."""


class EngineDied(RuntimeError):
    """The engine's thread has ended by an error, which is the cause of this one; no request is answered any more."""


class Sampled(NamedTuple):
    """A token, and the model's own opinion of it: at temperature 1, before filters, penalties and biases.

    - logprob: the natural logarithm of its probability
    - top: the likeliest tokens with theirs, as many as were asked for
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@runtime_checkable
class Constraint(Protocol):
    """What may come next in a reply, by a grammar. It has state, so each request needs its own."""

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """Bit i % 32 of word i // 32: token i may come next. One at least must be allowed."""

    def accept(self, token: int) -> None:
        """This token came."""


class Handle:
    """A request on its way.

    - prompt_tokens: of its prompt; cached_tokens: those that were found in the cache, known when the first token comes
    - prompt_scores: if they were asked for, of each token of the prompt; None of the first
    - finish_reason: "stop", "length" or "cancelled"; None while it runs. `error` is set instead if the engine died
    """

    def __init__(self, engine: "Engine", id: int, prompt: Int[np.ndarray, " T"], settings: Settings):
        self._engine, self.id, self._prompt, self._settings = engine, id, prompt, settings
        self.prompt_tokens, self.cached_tokens = len(prompt), 0
        self.prompt_scores: list[Sampled | None] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self._sampled: list[Sampled] = []
        self._changed = threading.Condition()
        self._listeners: list[Callable[[Handle, list[Sampled]], None]] = []
        self._constraint: Constraint | None = None
        self._stops: frozenset[int] = frozenset()
        self._tops = 0
        self._tiles: Tiles | None = None
        self._features: np.ndarray | None = None
        self._feature_index: Int[np.ndarray, " T"] | None = None
        self._keys: Int[np.ndarray, " T"] | None = None
        self._wants_scores = False
        self._most = 0

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def listen(self, callback: "Callable[[Handle, list[Sampled]], None]") -> None:
        """Calls back with new tokens, those that came already first, and when the request is done: from the engine's
        thread, which waits meanwhile. What a callback raises is dropped."""
        with self._changed:
            self._listeners.append(callback)
            if self._sampled or self.done:
                callback(self, list(self._sampled))

    def tokens(self) -> Iterator[Sampled]:
        """Waits for one after another. Raises EngineDied."""
        at = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._sampled) > at or self.done)  # noqa: B023
                new, done = self._sampled[at:], self.done
            yield from new
            at += len(new)
            if done and not new:
                if self.error is not None:
                    raise EngineDied("the engine died before this request was answered.") from self.error
                return

    def result(self) -> list[Sampled]:
        """All tokens, when they have come; the last is the stop id, if one ended the reply. Raises EngineDied."""
        return list(self.tokens())

    def cancel(self) -> None:
        """Wants no more of it. Its slot is free at once."""
        self._engine._inbox.put(("cancel", self))

    def _deliver(self, new: list[Sampled], finish: str | None = None, error: BaseException | None = None) -> None:
        with self._changed:
            if self.done:
                return
            self._sampled += new
            self.finish_reason, self.error = finish, error
            self._changed.notify_all()
            for callback in self._listeners:
                with contextlib.suppress(Exception):  # of whoever listens: the others go on
                    callback(self, new)


@dataclass
class Stats:
    """- waiting, running: requests now; slots, context: of the engine
    - prompt_tokens: of requests admitted so far; cached_tokens: those of them that were found in the cache
    - generated_tokens, requests: so far
    - misses: requests that found nothing, by the reason
    """

    slots: int
    context: int
    waiting: int = 0
    running: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    misses: dict[str, int] = field(default_factory=dict)


class Engine:
    """- slots: requests that run at the same time, each with a place in the cache for `context` tokens
    - cache: of keys and values: "float", in the dtype of computation, or "int8"
    - max_waiting: requests that wait for a slot, at most
    - piece: tokens of a prompt that are read at once; read_budget: between two calls that decode
    - report: is told how many programs of how many are compiled

    Compiles all that it needs before it returns. On a mesh when the model's parameters are on one. Raises ValueError
    for arguments out of range.
    """

    def __init__(
        self,
        model: Llama4,
        processor: Processor | None = None,
        *,
        slots: int = 8,
        context: int = 8192,
        cache: str = "float",
        max_waiting: int = 256,
        piece: int = 128,
        read_budget: int = 512,
        report: Callable[[int, int], None] = lambda done, total: None,
    ):
        check_cache(cache)
        check_whole("slots", slots, 1)
        check_whole("context", context, 2)
        check_whole("max_waiting", max_waiting, 0)
        check_whole("piece", piece, 1)
        check_whole("read_budget", read_budget, 1)
        if context > model.config.context_length:
            raise ValueError(
                f"context is {context}, but the model is meant for {model.config.context_length} tokens at most."
            )
        self.config, self.processor = model.config, processor
        self._compute = model.precision.compute
        self._graphdef, self._state = nnx.split(model.unscanned())
        self._limits = Limits(slots, context, min(piece, context), read_budget, max_waiting)
        self._sizes = tuple(sorted({min(_SMALL_PIECE, self._limits.piece), self._limits.piece}))
        chunks = [spec.chunk for spec in model.config.layers if spec.chunk is not None and spec.chunk < context]
        self._chunk = min(chunks, default=None)
        self._mesh = _mesh_of(self._state)
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ids, self._open, self._closing = 0, 0, False
        self._died: BaseException | None = None
        self._handles: dict[int, Handle] = {}  # that are not done
        self._of_slot: list[Handle | None] = [None] * slots
        self._held: list[Held | None] = [None] * slots
        self._used: list[int] = [0] * slots  # when, for the least recently used
        self._copies: dict[int, int] = {}  # request → the slot that its beginning is copied from
        self._pending: list[_Call] = []
        self._schedule = State()
        self._gone: list[Gone] = []
        self.stats = Stats(slots, context)
        with self._placed():
            self._cache, self._rows = _start(self._graphdef, self._state, slots, context, CACHES[cache])
            self._compile(report)
        self._thread = threading.Thread(target=self._run, name="llama4-engine", daemon=True)
        self._thread.start()

    # ---- what others call

    @property
    def alive(self) -> bool:
        return self._died is None and self._thread.is_alive()

    def submit(
        self,
        prompt: Sequence[int] | Sequence[Mapping[str, Any]],
        *,
        tiles: Tiles | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        top_logprobs: int = 0,
        prompt_scores: bool = False,
        constraint: Constraint | None = None,
        tools: Sequence[Any] = (),
    ) -> Handle:
        """A request. It is answered from the engine's thread, beside the others.

        - prompt: token ids, or a conversation, if the engine has a processor
        - tiles: of the pictures of a prompt of token ids, for its `<|patch|>` tokens in order
        - max_new_tokens: 0, with prompt_scores, writes nothing
        - stop_ids: that end the reply, 8 at most; the tokenizer's, if the engine has a processor, or none
        - frequency_penalty, presence_penalty: taken off the logit of a token for each time that the reply has it, and
          if it has it at all
        - logit_bias: added to the logits of tokens, 300 at most
        - top_logprobs: of how many of the likeliest tokens, 20 at most
        - prompt_scores: of each token of the prompt, too; nothing of it is then taken from the cache
        - constraint: what may come next
        - tools: of a conversation

        Raises ValueError for arguments out of range and a prompt that does not fit; Full; EngineDied.
        """
        if len(prompt) and not _is_id(prompt[0]):
            if self.processor is None:
                raise ValueError("the prompt is a conversation, and the engine has no processor: give token ids.")
            made = self.processor.prompt(prompt, tools=tools)
            prompt, tiles = made.tokens, made.tiles
        if stop_ids is None:
            stop_ids = () if self.processor is None else tuple(self.processor.tokenizer.stop_ids)
        ids, settings = self._checked(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
            stop_ids=tuple(stop_ids), frequency_penalty=frequency_penalty, presence_penalty=presence_penalty,
            logit_bias=logit_bias or {}, top_logprobs=top_logprobs, empty=prompt_scores,
        )  # fmt: skip
        (tiles,) = check_images(self.config.vision, [prompt], [tiles]) or (None,)
        with self._lock:
            if self._died is not None:
                raise EngineDied("the engine has died.") from self._died
            if self._closing:
                raise Full("the engine is closing.")
            if self._open >= self._limits.slots + self._limits.waiting:
                raise Full(f"{self._limits.slots} requests run and {self._limits.waiting} wait, which is all that may.")
            self._open += 1
            handle = Handle(self, self._ids, ids, settings)
            self._ids += 1
        handle._constraint, handle._stops, handle._tops = constraint, frozenset(map(int, stop_ids)), int(top_logprobs)
        handle._wants_scores, handle._tiles, handle._most = prompt_scores, tiles, int(max_new_tokens)
        patch_id = None if self.config.vision is None else self.config.vision.patch_token_id
        handle._keys = keys_of(ids, tiles, patch_id)
        self._inbox.put(("submit", handle))
        return handle

    def close(self) -> None:
        """Answers what was submitted, and ends."""
        with self._lock:
            self._closing = True
        self._inbox.put(("close", None))
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _checked(
        self, prompt, *, max_new_tokens, stop_ids, frequency_penalty, presence_penalty, logit_bias, top_logprobs, empty,
        **sampling,
    ) -> tuple[Int[np.ndarray, " T"], Settings]:  # fmt: skip
        check_whole("max_new_tokens", max_new_tokens, 0 if empty else 1)
        check_sampling(**sampling)
        check_whole("top_logprobs", top_logprobs, 0, TOPS)
        for name, value in (("frequency_penalty", frequency_penalty), ("presence_penalty", presence_penalty)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise ValueError(f"{name} must be a number from -100 to 100, got {value!r:.60}.")
        if len(stop_ids) > STOPS:
            raise ValueError(f"stop_ids has {len(stop_ids)} ids, and {STOPS} are the most.")
        if len(logit_bias) > BIASES:
            raise ValueError(f"logit_bias has {len(logit_bias)} tokens, and {BIASES} are the most.")
        size = self.config.vocab_size
        for name, given in (("stop_ids", stop_ids), ("logit_bias", logit_bias)):
            for token in given:
                if not _is_id(token) or not 0 <= token < size:
                    raise ValueError(f"{name} has {token!r:.60}, but the vocabulary has the ids 0 to {size - 1}.")
        for token, value in logit_bias.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not -1000 <= value <= 1000:
                raise ValueError(f"logit_bias[{token}] must be a number from -1000 to 1000, got {value!r:.60}.")
        check_prompt(prompt, size)
        if len(prompt) + max_new_tokens > self._limits.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} exceeds the "
                f"engine's context of {self._limits.context}. Shorten the prompt or ask for fewer tokens."
            )
        biases, stops = np.full((2, BIASES), NOTHING, np.float64), np.full((STOPS,), NOTHING, np.int32)
        stops[: len(stop_ids)] = stop_ids
        for i, (token, value) in enumerate(logit_bias.items()):
            biases[:, i] = token, value
        temperature, top_k = float(sampling["temperature"]), sampling["top_k"]
        settings = Settings(
            seed=np.uint32(sampling["seed"]),
            temperature=np.float32(0 if temperature < LEAST_TEMPERATURE else temperature),
            top_k=np.int32(size if top_k is None else min(int(top_k), size)),
            top_p=np.float32(max(float(sampling["top_p"]), float(np.finfo(np.float32).tiny))),
            frequency=np.float32(frequency_penalty),
            presence=np.float32(presence_penalty),
            bias_ids=biases[0].astype(np.int32),
            bias=np.where(biases[0] == NOTHING, 0, biases[1]).astype(np.float32),
            stops=stops,
            left=np.int32(max(1, max_new_tokens)),
            wants_top=np.bool_(top_logprobs > 0),
        )
        return np.asarray(prompt, np.int32), settings

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            with self._placed():
                while self._turn():
                    pass
        except BaseException as error:
            with self._lock:
                self._died = error
                handles = list(self._handles.values())
            while not self._inbox.empty():
                kind, handle = self._inbox.get()
                handles += [handle] if kind == "submit" else []
            for handle in handles:
                with contextlib.suppress(Exception):
                    handle._deliver([], error=error)

    def _turn(self) -> bool:
        """Takes what came, plans, starts the planned calls, and reads what earlier ones gave. False at the end."""
        busy = bool(self._pending or self._gone or self._schedule.running or self._schedule.waiting)
        closing = self._closing
        events = self._events(wait=not (busy or closing))
        if closing and not events and not busy:
            return False
        self._schedule, plan = step(self._limits, self._schedule, events, self._place)
        self.stats.waiting, self.stats.running = len(self._schedule.waiting), len(self._schedule.running)
        for one in plan.admitted:
            self._admit(one)
        for piece in plan.pieces:
            self._read(piece)
        started = len(self._pending)
        if plan.decoding:
            if any(self._of_slot[slot]._constraint is not None for slot in plan.decoding):
                self._settle(len(self._pending))  # a grammar has to know the newest token
                started = 0
            self._decode(plan.decoding)
        self._settle(started if plan.decoding else len(self._pending))
        return True

    def _events(self, *, wait: bool) -> list[Arrived | Gone]:
        """What happened since, in its order; waits for something to happen."""
        events: list[Arrived | Gone] = self._take_gone()
        while wait or not self._inbox.empty():
            kind, handle = self._inbox.get()
            wait = False
            if kind == "submit":
                self._handles[handle.id] = handle
                self.stats.requests += 1
                events.append(Arrived(Request(handle.id, handle.prompt_tokens, handle._most)))
            elif kind == "cancel" and not handle.done:
                self._finish(handle, [], "cancelled")
                events += self._take_gone()
        return events

    def _take_gone(self) -> list[Arrived | Gone]:
        gone, self._gone = self._gone, []
        for event in gone:
            self._handles.pop(event.id, None)
        return list(gone)

    def _place(self, request: Request, free: tuple[int, ...]) -> tuple[int, int]:
        """The slot of a request, and how much of its prompt it holds, or will when what is in another is copied."""
        handle = self._handles[request.id]
        found, source = 0, None
        if not handle._wants_scores:
            lengths = {
                slot: usable(held, handle._keys, self._chunk, self._limits.piece)
                for slot, held in enumerate(self._held)
                if held is not None
            }
            source = max(lengths, key=lengths.__getitem__, default=None)
            found = 0 if source is None else lengths[source]
        oldest = min(free, key=lambda slot: (self._held[slot] is not None, self._used[slot]))
        slot = oldest
        if not found:
            self.stats.misses[self._why_missed(handle)] = self.stats.misses.get(self._why_missed(handle), 0) + 1
        elif source in free and (2 * found >= self._held[source].exact or oldest == source):
            slot = source  # a conversation goes on in its place; what others begin with, too, is left and copied
        else:
            self._copies[request.id] = source
        self._held[slot] = Held(handle._keys, found, found)
        self._used[slot] = self._ids
        return slot, found

    def _why_missed(self, handle: Handle) -> str:
        if handle._wants_scores:
            return "the prompt is scored"
        if all(held is None for held in self._held):
            return "nothing is held"
        same = max((int(held.keys[0] == handle._keys[0]) for held in self._held if held is not None), default=0)
        return "no whole piece in common" if same else "another beginning"

    def _admit(self, one: Running) -> None:
        handle = self._handles[one.request.id]
        handle.cached_tokens = one.read
        self.stats.prompt_tokens += handle.prompt_tokens
        self.stats.cached_tokens += one.read
        self._of_slot[one.slot] = handle
        source = self._copies.pop(one.request.id, None)
        if source is not None:
            self._cache = _copy(self._cache, np.int32(source), np.int32(one.slot))
        if handle._tiles is not None and len(handle._tiles):
            handle._features = self._encode(handle._tiles)
            is_patch = handle._prompt == self.config.vision.patch_token_id
            handle._feature_index = np.maximum(np.cumsum(is_patch) - 1, 0)

    def _encode(self, tiles: Tiles) -> np.ndarray:
        """The features of all tiles' patches, on the host: what a piece needs of them is sent with it."""
        found = []
        for start in range(0, len(tiles), _TILES):
            some = tiles[start : start + _TILES]
            padded = np.concatenate([some, np.zeros((_TILES - len(some), *some.shape[1:]), some.dtype)])
            features = np.asarray(_encode(self._graphdef, self._state, padded[None])[0])
            found.append(features[: len(some) * self.config.vision.tokens_per_tile])
        return np.concatenate(found)

    def _read(self, piece: Piece) -> None:
        handle = self._handles[piece.id]
        ids = handle._prompt[piece.start : piece.stop]
        size = next(size for size in self._sizes if size >= len(ids))
        if handle._wants_scores:
            size = self._sizes[-1]
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(ids)] = ids
        targets = None
        if handle._wants_scores:
            targets = np.zeros((size,), np.int32)
            after = handle._prompt[piece.start + 1 : piece.stop + 1]
            targets[: len(after)] = after
        features = self._no_features(size)
        if handle._features is not None:
            features[0, : len(ids)] = handle._features[handle._feature_index[piece.start : piece.stop]]
        where = Where(*map(np.int32, (piece.slot, piece.start, len(ids))), np.bool_(piece.last))
        mask = self._all_allowed(1)
        if piece.last and handle._constraint is not None:
            mask[0] = handle._constraint.mask()
        self._cache, self._rows, choice, scores = _read(
            self._graphdef, self._state, self._cache, self._rows, tokens, features, where, handle._settings, mask,
            targets,
        )  # fmt: skip
        self._held[piece.slot] = Held(handle._keys, piece.stop, piece.stop)
        if piece.last or targets is not None:
            asked = None if targets is None else _Scored(len(after), scores)
            self._pending.append(_Call(((0, handle),), choice if piece.last else None, asked))

    def _decode(self, slots: tuple[int, ...]) -> None:
        rows = [(slot, self._of_slot[slot]) for slot in slots if not self._of_slot[slot].done]
        if not rows:
            return
        alive = np.zeros((self._limits.slots,), bool)
        alive[[slot for slot, _ in rows]] = True
        mask, limit = None, TOKENS_PER_CALL
        if any(handle._constraint is not None for _, handle in rows):
            mask, limit = self._all_allowed(self._limits.slots), 1
            for slot, handle in rows:
                if handle._constraint is not None:
                    mask[slot] = handle._constraint.mask()
        waiting = np.bool_(bool(self._schedule.waiting))
        self._cache, self._rows, choices = _decode(
            self._graphdef, self._state, self._cache, self._rows, alive, np.int32(limit), waiting, mask
        )
        for slot, _ in rows:
            held = self._held[slot]
            self._held[slot] = Held(held.keys, held.exact, min(held.longest + limit, self._limits.context))
        self._pending.append(_Call(tuple(rows), choices, None))

    def _settle(self, calls: int) -> None:
        """Reads what the first calls gave."""
        for call in self._pending[:calls]:
            choices, scores = jax.device_get((call.choices, None if call.scored is None else call.scored.scores))
            if scores is not None:
                _, handle = call.rows[0]
                handle.prompt_scores = handle.prompt_scores or [None]
                handle.prompt_scores += [_sampled(scores, i, handle._tops) for i in range(call.scored.count)]
            for row, handle in call.rows if choices is not None else ():
                own = Choice(*(x[row] for x in choices))
                self._take(handle, [_sampled(own, i, handle._tops) for i in range(int(np.sum(own.token != NOTHING)))])
        del self._pending[:calls]

    def _take(self, handle: Handle, new: list[Sampled]) -> None:
        if handle.done or not new:
            return
        if handle._most == 0:
            return self._finish(handle, [], "length")
        if handle._constraint is not None:
            for token in new:
                handle._constraint.accept(token.id)
        self.stats.generated_tokens += len(new)
        ends = new[-1].id in handle._stops
        if ends or len(handle._sampled) + len(new) == handle._most:
            self._finish(handle, new, "stop" if ends else "length")
        else:
            handle._deliver(new)

    def _finish(self, handle: Handle, new: list[Sampled], reason: str) -> None:
        self._gone.append(Gone(handle.id))
        with self._lock:
            self._open -= 1
        handle._features = handle._tiles = None
        handle._deliver(new, finish=reason)

    # ---- what runs on the devices

    def _placed(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _all_allowed(self, rows: int) -> UInt32[np.ndarray, "B words"]:
        return np.full((rows, -(-self.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)

    def _no_features(self, size: int) -> np.ndarray | None:
        if self.config.vision is None:
            return None
        return np.zeros((1, size, self.config.embed_dim), jnp.dtype(self._compute))

    def _compile(self, report: Callable[[int, int], None]) -> None:
        """Runs each program once, on nothing."""
        slots, model = self._limits.slots, (self._graphdef, self._state)
        nobody = self._checked(
            [0], max_new_tokens=1, stop_ids=(), frequency_penalty=0, presence_penalty=0, logit_bias={}, top_logprobs=0,
            empty=False, temperature=0, top_p=1, top_k=None, seed=0,
        )[1]  # fmt: skip
        nowhere = Where(np.int32(0), np.int32(0), np.int32(0), np.bool_(False))

        def read(size: int, scored: bool) -> None:
            tokens, targets = np.zeros((1, size), np.int32), np.zeros((size,), np.int32) if scored else None
            inputs = tokens, self._no_features(size), nowhere, nobody, self._all_allowed(1), targets
            self._cache, self._rows, *_ = _read(*model, self._cache, self._rows, *inputs)

        def decode(mask: UInt32[np.ndarray, "B words"] | None) -> None:
            inputs = np.zeros((slots,), bool), np.int32(1), np.bool_(False), mask
            self._cache, self._rows, _ = _decode(*model, self._cache, self._rows, *inputs)

        def copy() -> None:
            self._cache = _copy(self._cache, np.int32(0), np.int32(0))

        programs = [functools.partial(read, size, False) for size in self._sizes]
        programs += [functools.partial(read, self._sizes[-1], True), copy]
        programs += [functools.partial(decode, None), functools.partial(decode, self._all_allowed(slots))]
        if (vision := self.config.vision) is not None:
            tile = (vision.image_size, vision.image_size, vision.num_channels)
            programs.append(lambda: _encode(*model, np.zeros((1, _TILES, *tile), np.uint8)))
        for done, program in enumerate(programs):
            report(done, len(programs))
            program()
        jax.block_until_ready((self._cache, self._rows))
        report(len(programs), len(programs))


class _Scored(NamedTuple):
    count: int  # tokens of the prompt
    scores: Choice


class _Call(NamedTuple):
    """What was started and not read yet. Rows of `choices`, and whose they are."""

    rows: tuple[tuple[int, Handle], ...]
    choices: Choice | None
    scored: _Scored | None


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _sampled(choice: Choice, i: int, tops: int) -> Sampled:
    top = zip(choice.top[i, :tops].tolist(), choice.top_logprobs[i, :tops].tolist(), strict=True)
    return Sampled(int(choice.token[i]), float(choice.logprob[i]), tuple(one for one in top if one[0] != NOTHING))


def _mesh_of(state: nnx.State) -> jax.sharding.Mesh | None:
    for leaf in jax.tree.leaves(state):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


class Where(NamedTuple):
    """A piece of a prompt: its slot, how many tokens are before it, how many it has, and whether a reply follows."""

    slot: Int[Array, ""]
    start: Int[Array, ""]
    count: Int[Array, ""]
    last: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "context", "dtype"))
@use_rules(SERVING)
def _start(graphdef, state, slots: int, context: int, dtype: str | None) -> tuple[Cache, Row]:
    model = nnx.merge(graphdef, state)
    return model.empty_cache(slots, context, dtype), empty_rows(slots, model.config.vocab_size)


@functools.partial(jax.jit, static_argnames="graphdef")
@use_rules(SERVING)
def _encode(graphdef, state, tiles: Images) -> Float[Array, "1 patches D"]:
    return constrain(nnx.merge(graphdef, state).encode_images(tiles), None, None, None)


@functools.partial(jax.jit, donate_argnames="cache")
@use_rules(SERVING)
def _copy(cache: Cache, source: Int[Array, ""], slot: Int[Array, ""]) -> Cache:
    """What one slot holds into another."""

    def copied(x):
        return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, source, 1, axis=0), slot, axis=0)

    return cache._replace(layers=jax.tree.map(copied, cache.layers))


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames=("cache", "rows"))
@use_rules(SERVING)
def _read(
    graphdef,
    state,
    cache: Cache,
    rows: Row,
    tokens: Int[Array, "1 P"],
    features: Float[Array, "1 P D"] | None,
    where: Where,
    settings: Settings,
    mask: UInt32[Array, "1 words"],
    targets: Int[Array, " P"] | None,
) -> tuple[Cache, Row, Choice, Choice | None]:
    """Reads a piece of one slot's prompt; after the last, draws the first token of the reply, and the row is active.

    - targets: what follows each token of the piece. Their scores are the last result; None: they are not asked for
    """
    model = nnx.merge(graphdef, state)
    one = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, where.slot, 1, axis=0), cache.layers)
    hidden, one = model.step(tokens, Cache(one, where.start[None]), where.count[None], features)
    layers = jax.tree.map(
        lambda x, new: lax.dynamic_update_slice_in_dim(x, new, where.slot, axis=0), cache.layers, one.layers
    )
    is_slot = jnp.arange(len(cache.lengths)) == where.slot
    cache = Cache(layers, jnp.where(is_slot, one.lengths[0], cache.lengths))
    last = lax.dynamic_slice_in_dim(hidden, jnp.maximum(where.count - 1, 0), 1, axis=1)
    fresh = jax.tree.map(lambda x: x[None], Settings(*settings).row(model.config.vocab_size))
    choice = choose(model.logits(last)[:, 0], fresh, mask)
    begun = advanced(fresh, choice, jnp.ones((1,), bool))
    change = is_slot & where.last

    def put(old, new):
        return jnp.where(change.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    rows = jax.tree.map(put, rows, begun)
    scores = None
    if targets is not None:
        logits = model.logits(hidden)[0].astype(jnp.float32)
        scores = scored(logits, targets, settings.wants_top)
    return cache, rows, jax.tree.map(lambda x: constrain(x[:, None], *[None] * (x.ndim + 1)), choice), scores


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames=("cache", "rows"))
@use_rules(SERVING)
def _decode(
    graphdef,
    state,
    cache: Cache,
    rows: Row,
    alive: Bool[Array, " B"],
    limit: Int[Array, ""],
    others_wait: Bool[Array, ""],
    mask: UInt32[Array, "B words"] | None,
) -> tuple[Cache, Row, Choice]:
    """Up to `limit` tokens of all rows that are active and alive; fewer when none is any more, or when one has ended
    and others wait for its slot."""
    model = nnx.merge(graphdef, state)
    rows = rows._replace(active=rows.active & alive)
    begun, count = rows.active, len(alive)
    blank = Choice(
        jnp.full((count, TOKENS_PER_CALL), NOTHING, jnp.int32),
        jnp.zeros((count, TOKENS_PER_CALL)),
        jnp.full((count, TOKENS_PER_CALL, TOPS), NOTHING, jnp.int32),
        jnp.zeros((count, TOKENS_PER_CALL, TOPS)),
    )

    def running(carry):
        i, _, rows, _ = carry
        return (i < limit) & jnp.any(rows.active) & ~(others_wait & jnp.any(begun & ~rows.active))

    def one(carry):
        i, cache, rows, written = carry
        hidden, cache = model.step(rows.token[:, None], cache, rows.active.astype(jnp.int32))
        choice = choose(model.logits(hidden)[:, 0], rows, mask)
        new = choice._replace(token=jnp.where(rows.active, choice.token, NOTHING))
        written = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y[:, None], i, axis=1), written, new)
        return i + 1, cache, advanced(rows, choice, rows.active), written

    _, cache, rows, written = lax.while_loop(running, one, (jnp.int32(0), cache, rows, blank))
    return cache, rows, jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), written)

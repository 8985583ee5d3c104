"""Continuous batching over fixed slots of a cache, a turn at a time: what `Engine`, `generate`, `Chat` and batches run.

    core = EngineCore(model, slots=8, context=8192)
    handle = core.submit([1, 2, 3], max_new_tokens=64)
    while core.turn():
        …

`scheduler.step` says what runs next, `prefix` what of a prompt need not be read, `engine_programs` hold what runs on
the devices. A turn starts the planned calls, and reads what the calls of the turn before gave while these run.

What a request gets depends on nothing beside it: its tokens and log-probabilities are the same bit for bit alone, among
others, in any slot, and whether its prompt was found in the cache. Decoding always has the shape of all slots, in which
a row does not feel the others, and prompts are read in pieces that are cut at multiples of their size.
"""

import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int, UInt32

from llama4_jax.infer import engine_programs as programs
from llama4_jax.infer.checks import CACHES, Tiles, check_cache, check_images, check_prompt
from llama4_jax.infer.engine_programs import TOKENS_PER_CALL, Pieces
from llama4_jax.infer.logits_processor import LogitsProcessor, empty_past
from llama4_jax.infer.messages_to_all import MessagesToAll, as_array
from llama4_jax.infer.prefix import Held, common_length, keys_of, usable
from llama4_jax.infer.rows import BIASES, NOTHING, STOPS, TOPS, Choice, Settings, settings_of, stacked
from llama4_jax.infer.sampling import check_sampling, check_whole
from llama4_jax.infer.scheduler import Arrived, Gone, Limits, Piece, Request, Running, State, step
from llama4_jax.infer.snapshots import Block, Snapshot, Snapshots
from llama4_jax.model.llama4 import Llama4

log = logging.getLogger(__name__)

_SECONDS_PER_CALL = 0.05  # of decoding, about: the host is told of new requests, and of the end of others, that late
_TILES = 8  # encoded at once
_BLOCK = 512  # tokens of global layers that are taken into a snapshot at once


class Full(RuntimeError):
    """As many requests wait as may wait: ask again later."""


class EngineDied(RuntimeError):
    """The engine's thread has ended by an error, which is the cause of this one; no request is answered any more."""


class Sampled(NamedTuple):
    """A token, and the model's own opinion of it: at temperature 1, before filters, penalties and biases.

    - logprob: the natural logarithm of its probability; None where nobody can ask for it, as in `generate`
    - top: the likeliest tokens with theirs, as many as were asked for
    """

    id: int
    logprob: float | None
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
    - finish_reason: "stop", "length" or "cancelled"; None while it runs. `error` is set instead if the engine died, or
      if the model's logits are NaN
    """

    def __init__(self, core: "EngineCore", id: int, prompt: Int[np.ndarray, " T"], settings: Settings):
        self._core, self.id, self._prompt, self._settings = core, id, prompt, settings
        self.prompt_tokens, self.cached_tokens = len(prompt), 0
        self.prompt_scores: list[Sampled | None] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self._sampled: list[Sampled] = []
        self._changed = threading.Condition()
        self._listeners: list[Callable[[Handle, list[Sampled]], None]] = []
        self._asked: Mapping[str, Any] = {}
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

    def so_far(self) -> list[Sampled]:
        """The tokens that have come, without waiting for more."""
        with self._changed:
            return list(self._sampled)

    def tokens(self) -> Iterator[Sampled]:
        """Waits for one after another. Raises EngineDied, and FloatingPointError if the model's logits are NaN."""
        at = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._sampled) > at or self.done)  # noqa: B023
                new, done = self._sampled[at:], self.done
            yield from new
            at += len(new)
            if done and not new:
                if isinstance(self.error, FloatingPointError):
                    raise self.error
                if self.error is not None:
                    raise EngineDied("the engine died before this request was answered.") from self.error
                return

    def result(self) -> list[Sampled]:
        """All tokens, when they have come; the last is the stop id, if one ended the reply. Raises as `tokens`."""
        return list(self.tokens())

    def cancel(self) -> None:
        """Wants no more of it. Its slot is free at once."""
        self._core._inbox.put(("cancel", self))

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
    - found: requests that found something, by where: in their "slot", in an "other slot" or in a "snapshot"
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
    found: dict[str, int] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)


class EngineCore:
    """- slots: requests that run at the same time, each with a place in the cache for `context` tokens
    - context: None: as many as are needed, up to the model's: the cache is made anew when a longer request comes
    - cache: of keys and values: "float", in the dtype of computation, or "int8"
    - max_waiting: requests that wait for a slot, at most
    - piece: tokens of a prompt that are read at once; what is left of a prompt is padded to one of `sizes`
    - read_budget: tokens that are read between two calls that decode
    - together: pieces of all slots are read by one call. For requests that begin together
    - plain: nobody asks for penalties, biases, log-probabilities or scores
    - most_stops: stop ids of a request, at most
    - logits_processor: of `generate`; needs `together`
    - device_prefix_bytes, host_prefix_bytes: for snapshots of what slots held; 0 and 0: there are none
    - told_by_the_first: in several processes only the first takes requests. Otherwise all must submit the same

    Raises ValueError for arguments out of range. On a mesh when the model's parameters are on one, or under one.
    Programs are compiled when they are first needed, or by `compile`.
    """

    def __init__(
        self,
        model: Llama4,
        *,
        slots: int,
        context: int | None = None,
        cache: str = "float",
        max_waiting: int = 2**31 - 1,
        piece: int = 128,
        sizes: Sequence[int] = (32,),
        read_budget: int = 512,
        together: bool = False,
        plain: bool = False,
        most_stops: int = STOPS,
        logits_processor: LogitsProcessor | None = None,
        device_prefix_bytes: int = 0,
        host_prefix_bytes: int = 0,
        told_by_the_first: bool = False,
    ):
        check_cache(cache)
        check_whole("slots", slots, 1)
        check_whole("max_waiting", max_waiting, 0)
        check_whole("piece", piece, 1)
        check_whole("read_budget", read_budget, 1)
        check_whole("device_prefix_bytes", device_prefix_bytes, 0, 1 << 62)
        check_whole("host_prefix_bytes", host_prefix_bytes, 0, 1 << 62)
        if context is not None and check_whole("context", context, 2) > model.config.context_length:
            raise ValueError(
                f"context is {context}, but the model is meant for {model.config.context_length} tokens at most."
            )
        self.config = model.config
        self._compute = model.precision.compute
        self._graphdef, self._state = nnx.split(model.unscanned())
        self._mesh = _mesh_of(self._state)
        self._together, self._plain, self._most_stops, self._processor = together, plain, most_stops, logits_processor
        self._cache_dtype, self._grows = CACHES[cache], context is None
        piece = min(piece, context or piece)
        self._limits = Limits(slots, context or 0, piece, read_budget * (slots if together else 1), max_waiting)
        self._sizes = tuple(sorted({min(size, piece) for size in (*sizes, piece)}))
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ids, self._open, self._closing, self._closed = 0, 0, False, False
        self._to_all = MessagesToAll() if told_by_the_first and jax.process_count() > 1 else None
        self._died: BaseException | None = None
        self._handles: dict[int, Handle] = {}  # that are not done
        self._of_slot: list[Handle | None] = [None] * slots
        self._used: list[int] = [0] * slots  # when, for the least recently used
        self._moves: dict[int, _Move] = {}  # of requests that were given a slot
        self._prefix_bytes = device_prefix_bytes, host_prefix_bytes
        self._pending: list[_Call] = []
        self._schedule = State()
        self._gone: list[Gone] = []
        self._limit, self._settled = 8, 0.0
        self.stats = Stats(slots, context or 0)
        nobody = self._stacked([None] * slots)
        with self.placed():
            self._rows = programs.idle_rows(nobody, self.config.vocab_size)
            self._resize(context or 0)

    def _resize(self, context: int) -> None:
        """An empty cache for so many tokens."""
        self._limits = replace(self._limits, context=context)
        self.stats.context = context
        self._held: list[Held | None] = [None] * self._limits.slots
        chunks = [spec.chunk for spec in self.config.layers if spec.chunk is not None and spec.chunk < context]
        self._chunk = min(chunks, default=None)
        self._chunked = tuple(spec.chunk is not None and spec.chunk < context for spec in self.config.layers)
        self._block = min(_BLOCK, context)
        self._snapshots = Snapshots(*self._prefix_bytes, chunk=self._chunk, piece=self._limits.piece, block=self._block)
        self._past = None if self._processor is None else empty_past(self._limits.slots, context)
        self._cache = None  # first the old one goes
        if context:
            self._cache = programs.empty_cache(
                self._graphdef, self._state, self._limits.slots, context, self._cache_dtype
            )

    # ---- what others call, from any thread

    @property
    def context(self) -> int:
        """Tokens that a request may have, prompt and reply."""
        return self.config.context_length if self._grows else self._limits.context

    def submit(
        self,
        prompt: Sequence[int],
        *,
        tiles: Tiles | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        stream: int = 0,
        stop_ids: Sequence[int] = (),
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        top_logprobs: int = 0,
        prompt_scores: bool = False,
        constraint: Constraint | None = None,
    ) -> Handle:
        """A request, as `Engine.submit` describes it.

        - stream: which of the seed's random numbers it draws

        Raises ValueError for arguments out of range and a prompt that does not fit; Full; EngineDied.
        """
        stop_ids, logit_bias = tuple(stop_ids), logit_bias or {}
        check_whole("max_new_tokens", max_new_tokens, 0 if prompt_scores else 1)
        check_sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        check_whole("top_logprobs", top_logprobs, 0, TOPS)
        self._check_moved(stop_ids, frequency_penalty, presence_penalty, logit_bias)
        check_prompt(prompt, self.config.vocab_size)
        if len(prompt) + max_new_tokens > self.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} exceeds the "
                f"{'model' if self._grows else 'engine'}'s context of {self.context}. Shorten the prompt or ask for "
                f"fewer tokens."
            )
        (tiles,) = check_images(self.config.vision, [prompt], [tiles]) or (None,)
        if self._to_all is not None and not self._to_all.leads:
            raise ValueError("the first process takes the requests for all: submit there.")
        if self._to_all is not None and constraint is not None:
            raise ValueError("constraint is not supported where the engine runs in several processes.")
        asked = {
            "prompt": np.asarray(prompt, np.int32), "tiles": tiles, "max_new_tokens": int(max_new_tokens),
            "temperature": float(temperature), "top_p": float(top_p), "top_k": None if top_k is None else int(top_k),
            "seed": int(seed), "stream": int(stream), "stop_ids": [*map(int, stop_ids)],
            "frequency_penalty": float(frequency_penalty), "presence_penalty": float(presence_penalty),
            "logit_bias": {int(token): float(value) for token, value in logit_bias.items()},
            "top_logprobs": int(top_logprobs), "prompt_scores": bool(prompt_scores),
        }  # fmt: skip
        with self._lock:
            if self._died is not None:
                raise EngineDied("the engine has died.") from self._died
            if self._closing:
                raise Full("the engine is closing.")
            if self._open >= self._limits.slots + self._limits.waiting:
                raise Full(f"{self._limits.slots} requests run and {self._limits.waiting} wait, which is all that may.")
            self._open += 1
            handle = self._handle(self._ids, asked)
            self._ids += 1
        handle._constraint = constraint
        self._inbox.put(("submit", handle))
        return handle

    def _handle(self, id: int, asked: Mapping[str, Any]) -> "Handle":
        """The handle of a request whose arguments were checked."""
        said = dict(asked)
        ids, tiles, scores, tops = (said.pop(name) for name in ("prompt", "tiles", "prompt_scores", "top_logprobs"))
        settings = settings_of(
            self.config.vocab_size, **said, most_stops=self._most_stops, wants_top=tops > 0, plain=self._plain
        )
        handle = Handle(self, id, ids, settings)
        handle._asked, handle._stops, handle._tops = asked, frozenset(said["stop_ids"]), tops
        handle._wants_scores, handle._tiles, handle._most = scores, tiles, said["max_new_tokens"]
        patch_id = None if self.config.vision is None else self.config.vision.patch_token_id
        handle._keys = keys_of(ids, tiles, patch_id)
        return handle

    def _check_moved(self, stop_ids, frequency_penalty, presence_penalty, logit_bias) -> None:
        for name, value in (("frequency_penalty", frequency_penalty), ("presence_penalty", presence_penalty)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise ValueError(f"{name} must be a number from -100 to 100, got {value!r:.60}.")
        if len(stop_ids) > self._most_stops:
            raise ValueError(f"stop_ids has {len(stop_ids)} ids, and {self._most_stops} are the most.")
        if len(logit_bias) > BIASES:
            raise ValueError(f"logit_bias has {len(logit_bias)} tokens, and {BIASES} are the most.")
        size = self.config.vocab_size
        for name, given in (("stop_ids", stop_ids), ("logit_bias", logit_bias)):
            for token in given:
                if not is_id(token) or not 0 <= token < size:
                    raise ValueError(f"{name} has {token!r:.60}, but the vocabulary has the ids 0 to {size - 1}.")
        for token, value in logit_bias.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not -1000 <= value <= 1000:
                raise ValueError(f"logit_bias[{token}] must be a number from -1000 to 1000, got {value!r:.60}.")

    def prefix(self, keys: Int[np.ndarray, " T"]) -> Snapshot | None:
        """A snapshot of the beginning of a prompt of these keys, as long as there can be one; None if nothing of it is
        held. Between two turns."""
        held = {slot: one for slot, one in enumerate(self._held) if one is not None}
        after = np.concatenate([keys, [np.iinfo(np.int64).min]])
        lengths = {slot: usable(one, after, self._chunk, self._limits.piece) for slot, one in held.items()}
        slot = max(lengths, key=lengths.__getitem__, default=None)
        kept, length = self._snapshots.find(after)
        if slot is not None and lengths[slot] >= max(length, 1):
            return self._snapshot(slot, held[slot], lengths[slot])
        return kept

    def add_prefix(self, keys: Int[np.ndarray, " T"], blocks: list[Block], chunk: Block | None) -> None:
        """Keeps a snapshot that was read from a file. Between two turns."""
        self._snapshots.add(keys, lambda i: blocks[i], chunk)

    def forget(self) -> None:
        """What is in the slots is not used for later requests: after the weights were changed, or to measure."""
        self._inbox.put(("forget", None))

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """What a function returns or raises that is called between two turns. In one process alone."""
        if self._to_all is not None:
            raise ValueError("prefixes are saved and loaded where the engine runs in one process.")
        future: concurrent.futures.Future = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(("call", run))
        return future

    def close(self) -> None:
        """Takes no more requests; `turn` says False when all that were submitted are answered."""
        with self._lock:
            self._closing = True
        self._inbox.put(("close", None))

    def fail(self, error: BaseException) -> None:
        """Tells everybody that there will be no answer."""
        with self._lock:
            self._died = error
            handles = list(self._handles.values())
        while not self._inbox.empty():
            kind, handle = self._inbox.get()
            handles += [handle] if kind == "submit" else []
        for handle in handles:
            with contextlib.suppress(Exception):
                handle._deliver([], error=error)
        if self._to_all is not None and self._to_all.leads:
            with contextlib.suppress(Exception):
                self._to_all.send(None)

    # ---- what one thread calls

    def placed(self) -> contextlib.AbstractContextManager:
        """The mesh on which turns run."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def turn(self, *, wait: bool = False) -> bool:
        """Takes what came, plans, starts the planned calls, and reads what earlier ones gave. False when there is
        nothing to do; with `wait`, then waits for something, and says False when it was closed."""
        busy = bool(self._pending or self._gone or self._schedule.running or self._schedule.waiting)
        messages = self._messages(wait=wait and not (busy or self._closed))
        if messages is None or not (messages or busy):
            return False
        events = self._events(messages)
        self._schedule, plan = step(self._limits, self._schedule, events, self._place)
        if self._schedule.waiting and not self._schedule.running:  # none of which fits the cache
            most = max(request.length + request.new for request in self._schedule.waiting)
            self._resize(min(rounded(most, 64), self.config.context_length))
            self._schedule, plan = step(self._limits, self._schedule, (), self._place)
        self.stats.waiting, self.stats.running = len(self._schedule.waiting), len(self._schedule.running)
        for one in plan.admitted:
            self._admit(one)
        for pieces in _calls(plan.pieces, self._together):
            self._read(pieces)
        started = len(self._pending)
        if plan.decoding:
            if any(self._of_slot[slot]._constraint is not None for slot in plan.decoding):
                self._settle(len(self._pending))  # a grammar has to know the newest token
                started = 0
            self._decode(plan.decoding)
        self._settle(started if plan.decoding else len(self._pending))
        self._snapshots.settle()
        if not self._snapshots.device_bytes:
            for held in self._held:
                if held is not None and held.at_end is not None and held.at_end.on_device:
                    held.at_end.to_host()
        return True

    def _messages(self, *, wait: bool) -> list[tuple[str, Any]] | None:
        """What was said since, in its order; waits for something to be said. None: nothing more will be."""
        if self._to_all is not None and not self._to_all.leads:
            said = self._to_all.receive()
            return None if said is None else [self._as_message(*one) for one in said]
        messages = []
        while wait or not self._inbox.empty():
            messages.append(self._inbox.get())
            wait = False
        if self._to_all is not None:
            busy = bool(messages or self._pending or self._gone or self._schedule.running or self._schedule.waiting)
            said = [(kind, handle and handle.id, handle and handle._asked) for kind, handle in messages]
            self._to_all.send(said if busy else None)
        return messages

    def _as_message(self, kind: str, id: int | None, asked: Mapping[str, Any] | None) -> tuple[str, Any]:
        """As the first process has it."""
        if kind == "submit":
            arrays = {name: as_array(asked[name]) for name in ("prompt", "tiles")}
            self._open += 1
            self._handles[id] = self._handle(id, {**asked, **arrays})
        return kind, None if id is None else self._handles.get(id)

    def _events(self, messages: Sequence[tuple[str, Any]]) -> list[Arrived | Gone]:
        """What happened since, in its order."""
        events: list[Arrived | Gone] = self._take_gone()
        for kind, handle in messages:
            if kind == "submit":
                self._handles[handle.id] = handle
                self.stats.requests += 1
                events.append(Arrived(Request(handle.id, handle.prompt_tokens, handle._most)))
            elif kind == "forget":
                self._held = [None if held is None else replace(held, exact=0) for held in self._held]
                self._snapshots.clear()
            elif kind == "call":
                handle()
            elif kind == "close":
                self._closed = True
            elif kind == "cancel" and handle is not None and not handle.done:
                self._finish(handle, [], "cancelled")
                events += self._take_gone()
        return events

    def _take_gone(self) -> list[Arrived | Gone]:
        gone, self._gone = self._gone, []
        for event in gone:
            self._handles.pop(event.id, None)
        return list(gone)

    def _place(self, request: Request, free: tuple[int, ...]) -> tuple[int, int] | None:
        """The slot of a request, and how much of its prompt it holds, or will when what is in another slot or in a
        snapshot is copied. None if another that is being read has more of it."""
        if self._together:
            return request.id, 0  # row i of a batch is slot i
        handle = self._handles[request.id]
        piece, chunk = self._limits.piece, self._chunk
        found, source, snapshot = 0, None, None
        if not handle._wants_scores:
            held = {slot: one for slot, one in enumerate(self._held) if one is not None}
            lengths = {slot: usable(one, handle._keys, chunk, piece) for slot, one in held.items()}
            source = max(lengths, key=lengths.__getitem__, default=None)
            found = 0 if source is None else lengths[source]
            snapshot, length = self._snapshots.find(handle._keys)
            if length > found:
                found, source = length, None
            else:
                snapshot = None
            for slot, one in held.items():
                coming = min(common_length(one.keys, handle._keys), len(handle._keys) - 1) // piece * piece
                if slot not in free and one.exact < len(one.keys) and coming > found:
                    return None
        oldest = min(free, key=lambda slot: (self._held[slot] is not None, self._used[slot]))
        slot = oldest
        if not found:
            how = self._why_missed(handle)
        elif snapshot is not None:
            how = "snapshot"
        elif source in free and (2 * found >= self._held[source].exact or oldest == source):
            slot, how = source, "slot"  # a conversation goes on in its place; others' beginnings are left and copied
        else:
            how = "other slot"
        origin = None if source is None else self._held[source]
        self._moves[request.id] = _Move(how, found, self._held[slot], source, origin, snapshot)
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
        if not self._together:
            self._move(one.slot, handle, self._moves.pop(one.request.id))
        if handle._tiles is not None and len(handle._tiles):
            handle._features = self._encode(handle._tiles)
            is_patch = handle._prompt == self.config.vision.patch_token_id
            handle._feature_index = np.maximum(np.cumsum(is_patch) - 1, 0)

    def _move(self, slot: int, handle: Handle, move: "_Move") -> None:
        """Brings what was found into the slot; before, keeps what goes from it."""
        counts = self.stats.found if move.found else self.stats.misses
        counts[move.how] = counts.get(move.how, 0) + 1
        log.debug("request %d: %d of %d tokens found: %s", handle.id, move.found, handle.prompt_tokens, move.how)
        if move.before is not None:
            self._keep(slot, move.before, move.found if move.how == "slot" else 0)
        at = np.int32(slot)
        if move.how == "other slot":
            self._cache = programs.copy(self._cache, np.int32(move.source), at)
        if move.how in ("slot", "other slot") and move.origin.needs_its_end(move.found, self._chunk):
            self._cache = programs.put(self._cache, at, np.int32(0), move.origin.at_end.arrays)
        if move.how == "snapshot":
            self._snapshots.use(move.snapshot)
            for i, block in enumerate(move.snapshot.blocks[: -(-move.found // self._block)]):
                self._cache = programs.put(self._cache, at, np.int32(self._start_of(i)), block.arrays)
            if self._chunk is not None and move.found % self._chunk:
                self._cache = programs.put(self._cache, at, np.int32(0), move.snapshot.chunk.arrays)

    def _start_of(self, block: int) -> int:
        """The first token of a block. The last one may overlap with the one before."""
        return min(block * self._block, self._limits.context - self._block)

    def _keep(self, slot: int, held: Held, stays: int) -> None:
        """Takes a snapshot of what can be used of a slot, if it is more than what stays there."""
        if self._prefix_bytes == (0, 0):
            return
        after = np.concatenate([held.keys[: held.exact], [np.iinfo(np.int64).min]])
        length = usable(held, after, self._chunk, self._limits.piece)
        if length <= stays or self._snapshots.covers(held.keys[:length]):
            return
        self._snapshot(slot, held, length)

    def _snapshot(self, slot: int, held: Held, length: int) -> Snapshot:
        chunk = None
        if self._chunk is not None and length % self._chunk:
            needs_its_end = held.needs_its_end(length, self._chunk)
            chunk = held.at_end if needs_its_end else Block(self._taken(slot, 0, 0))
        return self._snapshots.add(
            held.keys[:length], lambda i: Block(self._taken(slot, self._start_of(i), self._block)), chunk
        )

    def _taken(self, slot: int, start: int, size: int) -> Any:
        return programs.take(self._cache, np.int32(slot), np.int32(start), chunked=self._chunked, size=size)

    def _leaves_its_chunk(self, handle: Handle) -> bool:
        """Whether a reply may leave the chunk in which its prompt ends, and whole pieces of that would be lost."""
        if self._prefix_bytes == (0, 0) or self._chunk is None:
            return False
        length, chunk = handle.prompt_tokens, self._chunk
        first = (length - 1) // chunk * chunk
        return length // self._limits.piece * self._limits.piece > first and length + handle._most > first + chunk

    def _encode(self, tiles: Tiles) -> np.ndarray:
        """The features of all tiles' patches, on the host: what a piece needs of them is sent with it."""
        found = []
        for start in range(0, len(tiles), _TILES):
            some = tiles[start : start + _TILES]
            padded = np.concatenate([some, np.zeros((_TILES - len(some), *some.shape[1:]), some.dtype)])
            features = np.asarray(programs.encode(self._graphdef, self._state, padded[None])[0])
            found.append(features[: len(some) * self.config.vision.tokens_per_tile])
        return np.concatenate(found)

    def _read(self, pieces: Sequence[Piece]) -> None:
        """Pieces of one slot or, together, of any: then row i is slot i."""
        handles = [self._handles[piece.id] for piece in pieces]
        at = [piece.slot for piece in pieces] if self._together else [0]
        rows = self._limits.slots if self._together else 1
        size = next(size for size in self._sizes if size >= max(piece.stop - piece.start for piece in pieces))
        if scored := handles[0]._wants_scores:
            size = self._sizes[-1]
        tokens, features = np.zeros((rows, size), np.int32), self._no_features(rows, size)
        where = Pieces(
            slot=None if self._together else np.int32(pieces[0].slot),
            start=np.zeros((rows,), np.int32), count=np.zeros((rows,), np.int32), last=np.zeros((rows,), bool),
        )  # fmt: skip
        whose: list[Handle | None] = [None] * rows
        mask = None if self._plain else self._all_allowed(rows)
        prompts = None if self._past is None else np.full((rows, self._limits.context), NOTHING, np.int32)
        for row, piece, handle in zip(at, pieces, handles, strict=True):
            ids = handle._prompt[piece.start : piece.stop]
            tokens[row, : len(ids)] = ids
            where.start[row], where.count[row], where.last[row] = piece.start, len(ids), piece.last
            whose[row] = handle
            if handle._features is not None:
                features[row, : len(ids)] = handle._features[handle._feature_index[piece.start : piece.stop]]
            if piece.last and handle._constraint is not None:
                mask[row] = handle._constraint.mask()
            if prompts is not None:
                prompts[row, : handle.prompt_tokens] = handle._prompt
            self._held[piece.slot] = Held(handle._keys, piece.stop, piece.stop)
        targets, asked = None, 0
        if scored:
            after = handles[0]._prompt[pieces[0].start + 1 : pieces[0].stop + 1]
            targets, asked = np.zeros((size,), np.int32), len(after)
            targets[:asked] = after
        self._cache, self._rows, self._past, choice, scores = programs.read(
            self._graphdef, self._state, self._cache, self._rows, self._past, tokens, features, where,
            self._stacked(whose), mask, targets, prompts, processor=self._processor,
        )  # fmt: skip
        for piece, handle in zip(pieces, handles, strict=True):
            if piece.last and self._leaves_its_chunk(handle):
                at_end = Block(self._taken(piece.slot, 0, 0))
                self._held[piece.slot] = replace(self._held[piece.slot], at_end=at_end)
        drawn = tuple((row, handle) for row, piece, handle in zip(at, pieces, handles, strict=True) if piece.last)
        if drawn or targets is not None:
            self._pending.append(_Call(drawn, choice, None if targets is None else _Scored(handles[0], asked, scores)))

    def _decode(self, slots: tuple[int, ...]) -> None:
        rows = [(slot, self._of_slot[slot]) for slot in slots if not self._of_slot[slot].done]
        if not rows:
            return
        alive = np.zeros((self._limits.slots,), bool)
        alive[[slot for slot, _ in rows]] = True
        mask, limit = None, self._limit
        if self._schedule.waiting and len(self._schedule.running) < self._limits.slots:
            limit = 1  # what they wait for was read
        if any(handle._constraint is not None for _, handle in rows):
            mask, limit = self._all_allowed(self._limits.slots), 1
            for slot, handle in rows:
                if handle._constraint is not None:
                    mask[slot] = handle._constraint.mask()
        waiting = np.bool_(bool(self._schedule.waiting))
        started = time.perf_counter()
        self._cache, self._rows, self._past, choices = programs.decode(
            self._graphdef, self._state, self._cache, self._rows, self._past, alive, np.int32(limit), waiting, mask,
            processor=self._processor,
        )  # fmt: skip
        for slot, handle in rows:
            held = self._held[slot]
            self._held[slot] = replace(held, longest=min(held.longest + limit, handle.prompt_tokens + handle._most))
        self._pending.append(_Call(tuple(rows), choices, None, started))

    def _settle(self, calls: int) -> None:
        """Reads what the first calls gave."""
        for call in self._pending[:calls]:
            choices, scores = jax.device_get((call.choices, None if call.scored is None else call.scored.scores))
            if call.scored is not None:
                handle = call.scored.handle
                handle.prompt_scores = handle.prompt_scores or [None]
                handle.prompt_scores += [_sampled(scores, i, handle._tops) for i in range(call.scored.count)]
            if call.started is not None:
                self._pace(call.started, int(np.max(np.sum(choices.token != NOTHING, axis=1))))
            for row, handle in call.rows:
                own = Choice(*(None if x is None else x[row] for x in choices))
                self._take(handle, [_sampled(own, i, handle._tops) for i in range(int(np.sum(own.token != NOTHING)))])
        del self._pending[:calls]

    def _pace(self, started: float, steps: int) -> None:
        """So many tokens a call that it takes about as long as the host may be kept waiting."""
        now = time.perf_counter()
        seconds, self._settled = now - max(started, self._settled), now
        if steps and jax.process_count() == 1:  # several processes must do the same
            self._limit = int(np.clip(_SECONDS_PER_CALL / max(seconds / steps, 1e-6), 1, TOKENS_PER_CALL))

    def _take(self, handle: Handle, new: list[Sampled]) -> None:
        if handle.done or not new:
            return
        if any(token.logprob is not None and np.isnan(token.logprob) for token in new):
            error = "the model's logits are NaN: a weight is broken, or numbers overflow. Try --dtype float32."
            return self._finish(handle, [], None, FloatingPointError(error))
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

    def _finish(
        self, handle: Handle, new: list[Sampled], reason: str | None, error: BaseException | None = None
    ) -> None:
        self._gone.append(Gone(handle.id))
        with self._lock:
            self._open -= 1
        handle._features = handle._tiles = None
        handle._deliver(new, finish=reason, error=error)

    # ---- inputs of the programs

    def _stacked(self, handles: Sequence[Handle | None]) -> Settings:
        nobody = settings_of(self.config.vocab_size, most_stops=self._most_stops, plain=self._plain)
        return stacked([nobody if handle is None else handle._settings for handle in handles])

    def _all_allowed(self, rows: int) -> UInt32[np.ndarray, "B words"]:
        return np.full((rows, -(-self.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)

    def _no_features(self, rows: int, size: int) -> np.ndarray | None:
        if self.config.vision is None:
            return None
        return np.zeros((rows, size, self.config.embed_dim), jnp.dtype(self._compute))

    def compile(self, report: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles every program that any request may need, by running it on nothing. `report` is told how many of how
        many are done. For a core with a fixed context that reads one slot at a time."""
        slots, model = self._limits.slots, (self._graphdef, self._state)
        nowhere = Pieces(np.int32(0), np.zeros((1,), np.int32), np.zeros((1,), np.int32), np.zeros((1,), bool))

        def read(size: int, scored: bool) -> None:
            tokens, targets = np.zeros((1, size), np.int32), np.zeros((size,), np.int32) if scored else None
            inputs = tokens, self._no_features(1, size), nowhere, self._stacked([None]), self._all_allowed(1), targets
            self._cache, self._rows, *_ = programs.read(*model, self._cache, self._rows, None, *inputs, None,
                                                        processor=None)  # fmt: skip

        def decode(mask: UInt32[np.ndarray, "B words"] | None) -> None:
            inputs = np.zeros((slots,), bool), np.int32(1), np.bool_(False), mask
            self._cache, self._rows, *_ = programs.decode(*model, self._cache, self._rows, None, *inputs,
                                                          processor=None)  # fmt: skip

        def copy() -> None:
            self._cache = programs.copy(self._cache, np.int32(0), np.int32(0))

        def put_aside(size: int) -> None:
            parts = self._taken(0, 0, size)
            self._cache = programs.put(self._cache, np.int32(0), np.int32(0), parts)
            parts = jax.tree.map(np.asarray, self._taken(0, 0, size))
            self._cache = programs.put(self._cache, np.int32(0), np.int32(0), parts)

        todo: list[Callable[[], Any]] = [lambda size=size: read(size, False) for size in self._sizes]
        todo += [lambda: read(self._sizes[-1], True), copy]
        todo += [lambda: decode(None), lambda: decode(self._all_allowed(slots))]
        if self._prefix_bytes != (0, 0):
            todo += [lambda size=size: put_aside(size) for size in (0, self._block)]
        if (vision := self.config.vision) is not None:
            tile = (vision.image_size, vision.image_size, vision.num_channels)
            todo.append(lambda: programs.encode(*model, np.zeros((1, _TILES, *tile), np.uint8)))
        for done, program in enumerate(todo):
            report(done, len(todo))
            program()
        jax.block_until_ready((self._cache, self._rows))
        report(len(todo), len(todo))


class _Move(NamedTuple):
    """How a request came to its slot.

    - how: "slot" (its beginning is there), "other slot", "snapshot", or why nothing was found
    - before: what the slot held
    - source, origin: another slot, and what it holds
    """

    how: str
    found: int
    before: Held | None
    source: int | None
    origin: Held | None
    snapshot: Snapshot | None


class _Scored(NamedTuple):
    handle: Handle
    count: int  # tokens of the prompt
    scores: Choice


class _Call(NamedTuple):
    """What was started and not read yet. Rows of `choices`, and whose they are; and when, if it decodes."""

    rows: tuple[tuple[int, Handle], ...]
    choices: Choice
    scored: _Scored | None
    started: float | None = None


def _calls(pieces: Sequence[Piece], together: bool) -> list[list[Piece]]:
    """Pieces that are read by one call: one, or the next of each slot."""
    if not together:
        return [[piece] for piece in pieces]
    calls: list[list[Piece]] = []
    seen: dict[int, int] = {}
    for piece in pieces:
        number = seen[piece.slot] = seen.get(piece.slot, -1) + 1
        calls += [[]] if number == len(calls) else []
        calls[number].append(piece)
    return calls


def is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def rounded(length: int, least: int) -> int:
    """The next power of two."""
    return max(least, 1 << (length - 1).bit_length())


def _sampled(choice: Choice, i: int, tops: int) -> Sampled:
    if choice.logprob is None:
        return Sampled(int(choice.token[i]), None)
    top = zip(choice.top[i, :tops].tolist(), choice.top_logprobs[i, :tops].tolist(), strict=True)
    return Sampled(int(choice.token[i]), float(choice.logprob[i]), tuple(one for one in top if one[0] != NOTHING))


def _mesh_of(state: nnx.State) -> jax.sharding.Mesh | None:
    for leaf in jax.tree.leaves(state):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None

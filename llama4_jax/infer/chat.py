"""A conversation with a model: history, streaming, and tools that are answered in a loop.

    chat = Chat(model, processor, tools=tools, functions={"get_time": get_time})
    chat.say("What time is it in Oslo?", on_event=print)

The model's calls are read, never evaluated: a call is run only if the caller gave a function of its name.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama4_jax.infer import interrupt
from llama4_jax.infer.checks import check_cache
from llama4_jax.infer.engine_core import EngineCore
from llama4_jax.infer.rows import STOPS
from llama4_jax.infer.sampling import check_sampling
from llama4_jax.inputs.messages import Message, Picture, Tool, ToolCall, read_tools
from llama4_jax.inputs.tokenizer import StreamDecoder
from llama4_jax.inputs.tool_calls import ReplyStream, problem_with
from llama4_jax.model.llama4 import Llama4
from llama4_jax.processor import Processor

Event = str | ToolCall  # text to show, or a call that is complete


@dataclasses.dataclass(frozen=True)
class Reply:
    """One message of the assistant.

    - tokens: how many it took
    - finish_reason: "stop", "tool_calls", "length" (max_new_tokens was reached, or the context is full) or
      "interrupted" (by Ctrl-C)
    - problem: why something that looks like a call is none
    """

    message: Message
    tokens: int
    finish_reason: str
    problem: str | None


class Chat:
    """A conversation.

    - messages: so far, the system's included
    - tools: that the model may call; without any, all that it writes is text
    - functions: what runs a tool, by its name, with the call's arguments. It returns text, or anything that JSON can
      hold; what it raises is told to the model
    - cache: of keys and values, as in `generate`
    - sampling: arguments of `generate`: max_new_tokens (512), temperature, top_p, top_k, and the seed of the first
      reply; each after it has the next

    Raises ValueError for tools that are none, for a function without a tool, and as `check_cache` and `check_sampling`.
    """

    def __init__(
        self,
        model: Llama4,
        processor: Processor,
        *,
        system: str | None = None,
        tools: Sequence[Tool | dict[str, Any]] = (),
        functions: Mapping[str, Callable[..., Any]] | None = None,
        cache: str = "float",
        **sampling: Any,
    ):
        self.model = model.unscanned()
        self.processor = processor
        self.tools = read_tools(tools)
        self.functions = dict(functions or {})
        self.sampling = {"max_new_tokens": 512, "seed": 0, **sampling}
        check_sampling(**self.sampling)
        check_cache(cache)
        self.cache = cache
        for name in self.functions.keys() - {tool.name for tool in self.tools}:
            raise ValueError(f"functions has {name!r}, which no tool declares: describe it in tools.")
        self.messages: list[Message] = []
        self._replies = 0
        self._core: EngineCore | None = None
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forgets everything; begins with this system message, if there is one."""
        self.messages = [] if system is None else [Message("system", (system,))]

    def say(
        self,
        *content: str | Picture,
        on_event: Callable[[Event], None] = lambda event: None,
        max_rounds: int = 8,
    ) -> Reply:
        """The user speaks, and the assistant answers; calls of `functions` are run and answered, so many times at most.

        `on_event` is given text as it is written, and each call. Ctrl-C stops the reply, as `interrupt` says: what was
        written stays, and the conversation goes on from there.
        Returns the last message of the assistant. If its finish_reason is "tool_calls", one of its calls is of no
        function, or the rounds are used up: `answer` goes on.

        Raises ValueError, with the conversation as it was before, for pictures that cannot be read, and if the
        conversation has grown longer than the model's context.
        """
        return self._go_on([Message("user", content)], on_event, max_rounds)

    def answer(
        self,
        results: Sequence[Any],
        *,
        on_event: Callable[[Event], None] = lambda event: None,
        max_rounds: int = 8,
    ) -> Reply:
        """The results of the last message's calls, in their order: text, or anything that JSON can hold.

        Else as `say`. Raises ValueError also unless there is one result for each call.
        """
        calls = self.messages[-1].tool_calls if self.messages else ()
        if not calls or len(results) != len(calls):
            raise ValueError(f"{len(results)} results were given for {len(calls)} calls: give one for each.")
        return self._go_on([Message("tool", (_text(result),)) for result in results], on_event, max_rounds)

    def _go_on(self, new: list[Message], on_event: Callable[[Event], None], max_rounds: int) -> Reply:
        before = list(self.messages)
        with interrupt.watched():
            try:
                self.messages += new
                reply = self._reply(on_event)
                for _ in range(max_rounds):
                    calls = reply.message.tool_calls
                    if reply.finish_reason != "tool_calls" or any(call.name not in self.functions for call in calls):
                        break
                    try:
                        with interrupt.stoppable():
                            results = [self._run(call) for call in calls]
                    except KeyboardInterrupt:
                        reply = dataclasses.replace(reply, finish_reason="interrupted")
                        break
                    self.messages += [Message("tool", (result,)) for result in results]
                    reply = self._reply(on_event)
            except BaseException:
                self.messages = before
                raise
            if interrupt.pressed():
                reply = dataclasses.replace(reply, finish_reason="interrupted")
        return reply

    def _reply(self, on_event: Callable[[Event], None]) -> Reply:
        tokenizer = self.processor.tokenizer
        tokens, tiles = self.processor.prompt(self.messages, tools=self.tools)
        decoder, stream = StreamDecoder(tokenizer), ReplyStream(self.tools)
        written: list[int] = []
        content: list[str] = []
        calls: list[ToolCall] = []

        def show(events: list[Event]) -> None:
            for event in events:
                if isinstance(event, str):
                    content.append(event)
                else:
                    calls.append(event)
                on_event(event)

        def read(text: str) -> None:
            show(stream.feed(text) if self.tools else [text] if text else [])

        def take(gained: list[int]) -> None:
            interrupt.check()
            written.extend(gained)
            read(decoder.feed(*(token for token in gained if token not in tokenizer.stop_ids)))

        room = self.model.config.context_length - len(tokens)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens, and the model's context_length is "
                f"{self.model.config.context_length}: begin a new one."
            )
        limit = min(self.sampling["max_new_tokens"], room)
        seed = (self.sampling["seed"] + self._replies) % (1 << 31)
        sampling = {**self.sampling, "max_new_tokens": limit, "seed": seed}
        self._replies += 1
        try:
            with interrupt.stoppable():
                reason = self._write(tokens, tiles, take, sampling)
        except KeyboardInterrupt:
            reason = "interrupted"
        read(decoder.flush())
        show(stream.flush())
        if calls and reason == "stop":
            reason = "tool_calls"
        message = Message("assistant", tuple(filter(None, ["".join(content)])), tuple(calls))
        self.messages.append(message)
        return Reply(message, len(written), reason, stream.problem)

    def _write(
        self, tokens: Sequence[int], tiles: Any, take: Callable[[list[int]], None], sampling: dict[str, Any]
    ) -> str:
        """Gives `take` the tokens of a reply as they come. Returns why it ended."""
        stop_ids = tuple(self.processor.tokenizer.stop_ids)
        core, self._core = self._core, None  # what Ctrl-C leaves behind is of no use
        if core is None:
            core = EngineCore(self.model, slots=1, cache=self.cache, plain=True, most_stops=max(STOPS, len(stop_ids)))
        handle, taken = core.submit(tokens, tiles=tiles, stop_ids=stop_ids, **sampling), 0
        with core.placed():
            while core.turn():
                if new := [token.id for token in handle.so_far()[taken:]]:
                    taken += len(new)
                    take(new)
        self._core = core  # it holds the conversation so far, which the next turn need not read again
        return handle.finish_reason

    def _run(self, call: ToolCall) -> str:
        problem = problem_with(call, self.tools)
        if problem is not None:
            return _text({"error": problem})
        try:
            return _text(self.functions[call.name](**call.arguments))
        except Exception as error:  # the model is told, and may try again; the conversation goes on
            return _text({"error": f"{type(error).__name__}: {error}"})


def _text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def written_call(call: ToolCall) -> str:
    """A call as people read it: get_weather(city="Oslo")."""
    arguments = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"

"""A conversation with a model: history, streaming, and tools that are answered in a loop.

    chat = Chat(model, processor, tools=tools, functions={"get_time": get_time})
    chat.say("What time is it in Oslo?", on_event=print)

The model's calls are read, never evaluated: a call is run only if the caller gave a function of its name.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama4_jax.infer.generate import generate
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
    - finish_reason: "stop", "tool_calls", "length" (max_new_tokens was reached) or "interrupted"
    - problem: why something that looks like a call is none
    """

    message: Message
    tokens: int
    finish_reason: str
    problem: str | None


class Chat:
    """A conversation.

    - messages: so far, the system's included
    - tools: that the model may call; `functions` run them, by name, with the call's arguments
    - sampling: arguments of `generate`, such as max_new_tokens, temperature, top_p, seed
    """

    def __init__(
        self,
        model: Llama4,
        processor: Processor,
        *,
        system: str | None = None,
        tools: Sequence[Tool | dict[str, Any]] = (),
        functions: Mapping[str, Callable[..., Any]] | None = None,
        **sampling: Any,
    ):
        self.model = model.unscanned()
        self.processor = processor
        self.tools = read_tools(tools)
        self.functions = dict(functions or {})
        self.sampling = {"max_new_tokens": 512, **sampling}
        self.messages: list[Message] = []
        self.reset(system)
        for name in self.functions.keys() - {tool.name for tool in self.tools}:
            raise ValueError(f"functions has {name!r}, which no tool declares: describe it in tools.")

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

        `on_event` is given text as it is written, and each call. Ctrl-C stops the reply: what was written stays.
        Returns the last message of the assistant, which may hold calls that no function answers; `answer` goes on.

        Raises ValueError, with the conversation as it was before, for pictures that cannot be read, and if the
        conversation has grown longer than the model's context.
        """
        before = list(self.messages)
        self.messages.append(Message("user", content))
        return self._go_on(before, on_event, max_rounds)

    def answer(
        self,
        results: Sequence[Any],
        *,
        on_event: Callable[[Event], None] = lambda event: None,
        max_rounds: int = 8,
    ) -> Reply:
        """The results of the last message's calls, in their order: text, or anything that JSON can hold."""
        calls = self.messages[-1].tool_calls if self.messages else ()
        if len(results) != len(calls):
            raise ValueError(f"{len(results)} results were given for {len(calls)} calls: give one for each.")
        before = list(self.messages)
        self.messages += [_result(result) for result in results]
        return self._go_on(before, on_event, max_rounds)

    def _go_on(self, before: list[Message], on_event: Callable[[Event], None], max_rounds: int) -> Reply:
        try:
            reply = self._reply(on_event)
        except ValueError:
            self.messages = before
            raise
        for _ in range(max_rounds):
            calls = reply.message.tool_calls
            if reply.finish_reason == "interrupted" or not calls or any(c.name not in self.functions for c in calls):
                break
            self.messages += [_result(self._run(call)) for call in calls]
            reply = self._reply(on_event)
        return reply

    def _reply(self, on_event: Callable[[Event], None]) -> Reply:
        tokenizer = self.processor.tokenizer
        tokens, tiles = self.processor.prompt(self.messages, tools=self.tools)
        decoder, stream = StreamDecoder(tokenizer), ReplyStream(self.tools)
        written: list[int] = []
        content: list[str] = []
        calls: list[ToolCall] = []

        def take(events: list[Event]) -> None:
            for event in events:
                if isinstance(event, str):
                    content.append(event)
                else:
                    calls.append(event)
                on_event(event)

        def feed(gained: list[list[int]]) -> None:
            written.extend(gained[0])
            take(stream.feed(decoder.feed(*(t for t in gained[0] if t not in tokenizer.stop_ids))))

        room = self.model.config.context_length - len(tokens)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens, and the model's context_length is "
                f"{self.model.config.context_length}: begin a new one."
            )
        sampling = {**self.sampling, "max_new_tokens": min(self.sampling["max_new_tokens"], room)}
        try:
            generate(self.model, [tokens], images=[tiles], stop_ids=tokenizer.stop_ids, on_tokens=feed, **sampling)
            reason = "stop" if written[-1] in tokenizer.stop_ids else "length"
        except KeyboardInterrupt:
            reason = "interrupted"
        take(stream.feed(decoder.flush()))
        take(stream.flush())
        if calls and reason == "stop":
            reason = "tool_calls"
        message = Message("assistant", tuple(filter(None, ["".join(content)])), tuple(calls))
        self.messages.append(message)
        return Reply(message, len(written), reason, stream.problem)

    def _run(self, call: ToolCall) -> Any:
        problem = problem_with(call, self.tools)
        if problem is not None:
            return {"error": problem}
        try:
            return self.functions[call.name](**call.arguments)
        except Exception as error:  # the model is told, and may try again; the conversation goes on
            return {"error": f"{type(error).__name__}: {error}"}


def _result(result: Any) -> Message:
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return Message("tool", (text,))


def written_call(call: ToolCall) -> str:
    """A call as people read it: get_weather(city="Oslo")."""
    arguments = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"

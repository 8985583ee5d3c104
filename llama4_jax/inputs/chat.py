"""Messages → tokens in Meta's chat format, and the tokens of a reply → a message.

    <|begin_of_text|> (<|header_start|> role <|header_end|> "\\n\\n" content end)*

where end is `<|eot|>`, or `<|eom|>` after a message with which a turn does not end: one of the assistant that calls
tools or is marked so, and every result of a tool (whose role is spelled "ipython"). A generation prompt is one more
header, of the assistant. Nothing is trimmed and there is no default system message. Each text of a message is
tokenized by itself, by `Tokenizer.encode`, which never gives special tokens: those that stand here are put in by id, so
no text in any field can end a turn or begin one.

The ids are those of `ChatFormat` in llama_models/llama4/chat_format.py (llama-models 0.3.0) for texts, pictures, and
calls in the styles "json" and "function_tag". Where we differ:

- "pythonic" (Meta's `python_list`): several calls are one list, `[f(a=1), g()]`, as models/llama4/prompt_format.md of
  llama-models shows it; Meta's encoder writes one list a call. Quotes, backslashes and control characters in strings
  are escaped, and dicts are Python's: Meta's encoder writes strings raw and dicts as `{a=1}`, which none can read back.
- Calls of the tools that Llama 3 had built in (brave_search, wolfram_alpha, photogen, code_interpreter) are written as
  any other call. Llama 4's prompt format does not have them.

How tools are told to the model is left to the caller by Meta's encoder. `prompt_format.md` puts them into the system or
the user message: one line of introduction, a list in JSON with four spaces of indent, and how to call. We write this at
the end of the system message, and make one if there is none. The sentences around the list are that file's for
"pythonic" and "function_tag"; for "json", those of the chat template in transformers' conversion script for Llama 4.
The long rules of conduct in that file's example of a system message are the caller's to add.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from llama4_jax.inputs.messages import NAME, Message, Picture, Tool, ToolCall, read_messages, read_tools
from llama4_jax.inputs.tokenizer import Tokenizer
from llama4_jax.inputs.tool_calls import parse_reply

_INTRODUCTION = "Here is a list of functions in JSON format that you can invoke:\n"
_HOW_TO_CALL = {
    "pythonic": (
        "Should you decide to return the function call(s), put them in the format of "
        "[func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\n"
        "You SHOULD NOT include any other text in the response."
    ),
    "json": (
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
        "Do not use variables."
    ),
    "function_tag": (
        "If you choose to call a function ONLY reply in the following format with no prefix or suffix:\n\n"
        '<function=example_function_name>{"example_name": "example_value"}</function>'
    ),
}
TOOL_STYLES = tuple(_HOW_TO_CALL)


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    - tokens: ids, begin_of_text first
    - reply: for each token whether the assistant says it: its content, its calls and its `<|eot|>` or `<|eom|>`, not
      its header. For losses on replies alone. None where it cannot be known.
    """

    tokens: list[int]
    reply: list[bool] | None


class ChatFormat:
    """Meta's format, in the vocabulary of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        special = tokenizer.special_tokens
        self._header_start, self._header_end = special.get("<|header_start|>"), special.get("<|header_end|>")
        self._eot, self._eom = special.get("<|eot|>"), special.get("<|eom|>")

    def check(self) -> None:
        """Raises ValueError if the vocabulary lacks what a conversation is written with."""
        needed = ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>")
        missing = [name for name in needed if name not in self.tokenizer.special_tokens]
        if missing:
            raise ValueError(
                f"the tokenizer has no {', '.join(missing)}, which conversations are written with. Use Llama 4's "
                f'tokenizer or "bytes", or add these to your own as special tokens.'
            )

    def encode(
        self,
        messages: Sequence[Message | dict[str, Any]],
        *,
        tools: Sequence[Tool | dict[str, Any]] = (),
        pictures: Sequence[Sequence[int]] = (),
        generation_prompt: bool = True,
        tool_style: str = "pythonic",
    ) -> Rendered:
        """The tokens of a conversation.

        - messages, tools: as `read_messages` and `read_tools` take them
        - pictures: the ids of each picture in the order in which they stand in the messages
        - generation_prompt: whether the header of the assistant's next message comes last
        - tool_style: one of `TOOL_STYLES`: how tools are to be called, and how calls that were made are written

        Raises ValueError for what is no conversation, for more or fewer pictures than the messages have, and for an
        unknown style; and as `check`.
        """
        self.check()
        if tool_style not in TOOL_STYLES:
            raise ValueError(f"tool_style should be one of {', '.join(TOOL_STYLES)}, and is {tool_style!r}.")
        said = read_messages(messages)
        count_pictures(said, pictures)
        tools = read_tools(tools)
        if tools:
            said = with_tools(said, tools, tool_style)
        left = iter(pictures)
        tokens, reply = [self.tokenizer.bos_id], [False]
        for message in said:
            header = self._header("ipython" if message.role == "tool" else message.role)
            body = []
            for part in message.content:
                body += self.tokenizer.encode(part) if isinstance(part, str) else next(left)
            for call in _written(message.tool_calls, tool_style):
                body += self.tokenizer.encode(call)
            open_end = message.role == "tool" or message.end_of_message or message.tool_calls
            body.append(self._eom if open_end else self._eot)
            tokens += header + body
            reply += [False] * len(header) + [message.role == "assistant"] * len(body)
        if generation_prompt:
            header = self._header("assistant")
            tokens += header
            reply += [False] * len(header)
        return Rendered(tokens, reply)

    def decode_reply(self, tokens: Iterable[SupportsIndex]) -> Message:
        """The assistant's message that the tokens of a reply say, with its stop token or without.

        Calls that cannot be read stay in the text; `parse_reply` says why.
        """
        ids = [int(i) for i in tokens]
        end = ids.pop() if ids and ids[-1] in self.tokenizer.stop_ids else None
        parsed = parse_reply(self.tokenizer.decode(ids))
        content = (parsed.content,) if parsed.content else ()
        return Message("assistant", content, parsed.tool_calls, end_of_message=end == self._eom)

    def _header(self, role: str) -> list[int]:
        encode = self.tokenizer.encode
        return [self._header_start, *encode(role), self._header_end, *encode("\n\n")]


def count_pictures(messages: Sequence[Message], pictures: Sequence[Any]) -> None:
    """Raises ValueError unless there are as many pictures as the messages have places for them."""
    places = [
        f"messages[{i}].content[{j}]"
        for i, message in enumerate(messages)
        for j, part in enumerate(message.content)
        if isinstance(part, Picture)
    ]
    if len(pictures) < len(places):
        raise ValueError(
            f"{places[len(pictures)]} is a picture, and of pictures there are only {len(pictures)} for {len(places)}."
        )
    if len(pictures) > len(places):
        raise ValueError(f"there are {len(pictures)} pictures, and the messages have places for {len(places)}.")


def with_tools(messages: tuple[Message, ...], tools: tuple[Tool, ...], style: str) -> tuple[Message, ...]:
    """The same messages, with the tools and how to call them at the end of the system message, or in a new one."""
    listed = json.dumps([dataclasses.asdict(tool) for tool in tools], indent=4, ensure_ascii=False)
    told = f"{_INTRODUCTION}{listed}\n\n{_HOW_TO_CALL[style]}"
    if messages[0].role != "system":
        return (Message("system", (told,)), *messages)
    *before, last = messages[0].content or ("",)
    system = Message("system", (*before, f"{last}\n\n{told}" if last else told))
    return (system, *messages[1:])


def _written(calls: tuple[ToolCall, ...], style: str) -> list[str]:
    """The calls as the assistant writes them, each text of which is tokenized by itself."""
    if style == "json":
        return [json.dumps({"type": "function", "name": c.name, "parameters": c.arguments}) for c in calls]
    if style == "function_tag":
        return [f"<function={c.name}>{json.dumps(c.arguments)}</function>" for c in calls]
    return [f"[{', '.join(f'{c.name}({_keywords(c.arguments)})' for c in calls)}]"] if calls else []


def _keywords(arguments: dict[str, Any]) -> str:
    """The arguments of a call in Python; those whose names are none in Python, as `**{"a name": 1}`."""
    plain = [name for name in arguments if name.isidentifier() and NAME.fullmatch(name)]
    others = {name: value for name, value in arguments.items() if name not in plain}
    written = [f"{name}={_literal(arguments[name])}" for name in plain]
    return ", ".join([*written, f"**{_literal(others)}"] if others else written)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(inner)}' for key, inner in value.items())}}}"
    return str(value)

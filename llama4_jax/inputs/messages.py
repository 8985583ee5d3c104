"""A conversation as data: messages, pictures and tools, read from OpenAI-style JSON and checked.

What is read: dicts with "role" and "content" (a string, or a list of parts of type "text", "image" or "image_url"),
"tool_calls" of the assistant, and results of tools (role "tool", or "ipython" as Meta calls it). "developer" is
OpenAI's newer name for "system" and means the same. Pictures may stand in messages of the user and in results of tools;
Meta's code would take them everywhere, but its published format shows none in what the system or the assistant says.

Every error names the place, as in `messages[2].content[0].type`, and comes before anything is tokenized. Nothing is
ever fetched: a picture at an http address is an error that says so. An unknown key is an error unless its value is
null or empty, as in the replies of OpenAI's API (`"refusal": null`). Arguments of a call that are missing, null or an
empty string are none. "name" and "tool_call_id" are read over, since
Llama 4's format has no place for them; results belong to calls by their order.
"""

import base64
import binascii
import dataclasses
import json
import os
import re
import reprlib
import urllib.parse
import urllib.request
from collections.abc import Iterable
from typing import Any, Literal

from llama4_jax.untrusted_json import parse_json

Role = Literal["system", "user", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "ipython": "tool",
}

# A model can write such a name in each of the three styles of calls, and the parser of calls reads it.
NAME = re.compile(r"\w[\w.-]*")

# Lists and dicts inside one another, in the arguments of a call or in a schema.
MAX_DEPTH = 32


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture inside a message.

    `source`: a path, the bytes of a file, anything else that the image loader takes, or None: the next one of the
    pictures that are given apart from the messages.
    """

    source: Any = None


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """The assistant asks for `name(**arguments)`, which are JSON values. `id` is OpenAI's, and in no prompt."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Message:
    """What one role says, texts and pictures in order, then the assistant's tool calls.

    `end_of_message`: the assistant's turn goes on after this message (Meta's stop reason of that name); with tool calls
    it does in any case.
    """

    role: Role
    content: tuple[str | Picture, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    end_of_message: bool = False

    @property
    def text(self) -> str:
        """The texts, joined; pictures are left out."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]


def read_messages(value: Any, *, where: str = "messages") -> tuple[Message, ...]:
    """A non-empty list of OpenAI-style dicts, or of `Message`, as messages.

    `where` is what errors call the list. Raises ValueError, naming the place, for anything that is no conversation.
    """
    messages = tuple(_message(item, f"{where}[{i}]") for i, item in enumerate(_list(value, where, "messages")))
    if not messages:
        raise ValueError(f"{where} is empty: there should be at least one message.")
    return messages


def read_tools(value: Any, *, where: str = "tools") -> tuple[Tool, ...]:
    """A list of functions as tools: OpenAI's {"type": "function", "function": {…}}, the inner dict alone, or `Tool`.

    Raises ValueError, naming the place, for one that is none, for a schema that is none, and for a name used twice.
    """
    tools: dict[str, Tool] = {}
    for i, item in enumerate(_list(value, where, "tools")):
        tool = _tool(item, f"{where}[{i}]")
        if tool.name in tools:
            raise ValueError(f"{where}[{i}] is called {_short(tool.name)}, as one before it is: names must differ.")
        tools[tool.name] = tool
    return tuple(tools.values())


def _message(value: Any, where: str) -> Message:
    if isinstance(value, Message):
        value = {
            "role": value.role,
            "content": value.content,
            "tool_calls": value.tool_calls,
            "end_of_message": value.end_of_message,
        }
    _dict(value, where, "a message")
    _only(value, where, ("role", "content", "name", "tool_calls", "tool_call_id", "end_of_message"))
    said = value.get("role")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise ValueError(f"{where}.role should be one of {', '.join(_ROLES)}, and is {_short(said)}.")
    calls = value.get("tool_calls")
    calls = () if calls is None else _list(calls, f"{where}.tool_calls", "tool calls")
    if calls and role != "assistant":
        raise ValueError(f"{where}.tool_calls: only the assistant calls tools, and the role is {said!r}.")
    end_of_message = value.get("end_of_message") or False
    if not isinstance(end_of_message, bool) or (end_of_message and role != "assistant"):
        raise ValueError(
            f"{where}.end_of_message should be true or false, and true only for the assistant; it is "
            f"{_short(end_of_message)} for {said!r}."
        )
    content = _content(value.get("content"), f"{where}.content", role, may_miss=bool(calls))
    tool_calls = tuple(_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls))
    return Message(role, content, tool_calls, end_of_message)


def _content(value: Any, where: str, role: Role, *, may_miss: bool) -> tuple[str | Picture, ...]:
    if value is None and may_miss:
        return ()
    if isinstance(value, str):
        return (value,) if value else ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} should be a string or a list of parts, and is {_short(value)}.")
    parts = tuple(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
    for i, part in enumerate(parts):
        if isinstance(part, Picture) and role not in ("user", "tool"):
            raise ValueError(
                f"{where}[{i}] is a picture in a message of the {role}: only messages of the user and results of "
                f"tools hold pictures."
            )
    return parts


def _part(value: Any, where: str) -> str | Picture:
    if isinstance(value, str | Picture):
        return value
    _dict(value, where, "a part")
    kind = value.get("type")
    if kind == "text":
        _only(value, where, ("type", "text"))
        return _string(value.get("text"), f"{where}.text")
    if kind == "image":
        _only(value, where, ("type", "image", "path", "url"))
        given = [key for key in ("image", "path", "url") if value.get(key) is not None]
        if len(given) > 1:
            raise ValueError(f"{where} should name one picture, and has both {given[0]!r} and {given[1]!r}.")
        return Picture(_source(value[given[0]], f"{where}.{given[0]}") if given else None)
    if kind == "image_url":
        _only(value, where, ("type", "image_url"))
        inner = value.get("image_url")
        if isinstance(inner, str):
            return Picture(_source(inner, f"{where}.image_url"))
        _dict(inner, f"{where}.image_url", "a dict with a url")
        _only(inner, f"{where}.image_url", ("url", "detail"))
        return Picture(_source(_string(inner.get("url"), f"{where}.image_url.url"), f"{where}.image_url.url"))
    raise ValueError(f'{where}.type should be "text", "image" or "image_url", and is {_short(kind)}.')


def _source(value: Any, where: str) -> Any:
    """A picture's source: what is no string is left to the image loader, but for JSON values that name no file."""
    if isinstance(value, bool | int | float | list | tuple | dict):
        raise ValueError(f"{where} should be a path, a data: URL, bytes or a picture, and is {_short(value)}.")
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ValueError(f"{where} should be a path or a data: URL, and is {_short(value)}.")
    scheme = value.partition(":")[0].lower()
    if scheme in ("http", "https", "ftp"):
        raise ValueError(f"{where}: nothing is fetched from the network. Download {_short(value)}, and give its path.")
    if scheme == "data":
        return _data_url(value, where)
    return _file_url(value, where) if scheme == "file" else value


def _data_url(value: str, where: str) -> bytes:
    head, comma, payload = value.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError(f"{where} should be data:image/…;base64,… and begins with {_short(head)}.")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where} is a data: URL whose base64 is damaged: {error}.") from error


def _file_url(value: str, where: str) -> str:
    try:
        url = urllib.parse.urlsplit(value)
    except ValueError as error:
        raise ValueError(f"{where} is no URL of a file: {_short(value)}: {error}.") from error
    path = urllib.request.url2pathname(url.path)
    if url.netloc not in ("", "localhost") or not path or "\0" in path:
        raise ValueError(f"{where} should be a file of this machine, as in file:///a/b.png, and is {_short(value)}.")
    return path


def _tool_call(value: Any, where: str) -> ToolCall:
    if isinstance(value, ToolCall):
        value = {"name": value.name, "arguments": value.arguments, "id": value.id}
    _dict(value, where, "a tool call")
    identity = value.get("id")
    if "function" in value:
        _only(value, where, ("id", "type", "function", "index"))
        _kind(value, where)
        value, where = value["function"], f"{where}.function"
        _dict(value, where, "a dict with name and arguments")
        _only(value, where, ("name", "arguments"))
    else:
        _only(value, where, ("id", "type", "name", "arguments"))
        _kind(value, where)
    if identity is not None:
        _string(identity, f"{where}.id")
    arguments = read_arguments(value.get("arguments"), f"{where}.arguments")
    return ToolCall(_name(value.get("name"), f"{where}.name"), arguments, identity)


def read_arguments(value: Any, where: str) -> dict[str, Any]:
    """The arguments of a call: a dict, or a string of JSON with one. None, null and a string of space alone are no
    arguments, as servers write them for a function that takes none. Raises ValueError, which begins with `where`."""
    said = value
    if isinstance(said, str):
        said = parse_json(said, where=where) if said.strip() else None
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise ValueError(f"{where} should be a dict, or a string of JSON with one, and is {_short(said)}.")
    return json_values(said, where)


def _tool(value: Any, where: str) -> Tool:
    if isinstance(value, Tool):
        value = {"name": value.name, "description": value.description, "parameters": value.parameters}
    _dict(value, where, "a tool")
    if "function" in value:
        _only(value, where, ("type", "function"))
        _kind(value, where)
        value, where = value["function"], f"{where}.function"
        _dict(value, where, "a dict with name, description and parameters")
        _only(value, where, ("name", "description", "parameters", "strict"))
    else:
        _only(value, where, ("type", "name", "description", "parameters", "strict"))
        _kind(value, where)
    name = _name(value.get("name"), f"{where}.name")
    description = value.get("description")
    if description is not None:
        _string(description, f"{where}.description")
    parameters = value.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    return Tool(name, description or "", _schema(parameters, f"{where}.parameters"))


def _schema(value: Any, where: str) -> dict[str, Any]:
    """A JSON schema of the arguments; "dict" for "object" is how Meta's examples write it."""
    schema = json_values(_dict(value, where, "a JSON schema"), where)
    if schema.get("type", "object") not in ("object", "dict"):
        raise ValueError(f'{where}.type should be "object", as arguments have names, and is {_short(schema["type"])}.')
    properties = _dict(schema.get("properties", {}), f"{where}.properties", "a dict of schemas")
    for name, inner in properties.items():
        if not isinstance(inner, bool):
            kind = _dict(inner, f"{where}.properties[{_short(name)}]", "a schema").get("type", "")
            if not all(isinstance(one, str) for one in (kind if isinstance(kind, list) else [kind])):
                raise ValueError(
                    f"{where}.properties[{_short(name)}].type should be the name of a type, and is {_short(kind)}."
                )
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{where}.required should be a list of names, and is {_short(required)}.")
    return schema


def json_values(value: Any, where: str) -> Any:
    """A copy in JSON's types alone. Raises ValueError for what JSON has not, or nests deeper than `MAX_DEPTH`."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"{where} nests deeper than {MAX_DEPTH} lists and dicts.")
        level, depth = [inner for outer in level for inner in _inner(outer)], depth + 1
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} holds what JSON cannot: {error}.") from error


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _kind(value: dict[str, Any], where: str) -> None:
    if value.get("type", "function") != "function":
        raise ValueError(f'{where}.type should be "function", and is {_short(value["type"])}.')


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{where} should be a name of letters, digits, _, - and ., and is {_short(value)}.")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} should be a string, and is {_short(value)}.")
    return value


def _list(value: Any, where: str, what: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} should be a list of {what}, and is {_short(value)}.")
    return value


def _dict(value: Any, where: str, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} should be {what}, and is {_short(value)}.")
    return value


def _only(value: dict[Any, Any], where: str, known: tuple[str, ...]) -> None:
    for key, said in value.items():
        if key not in known and not (said is None or (isinstance(said, str | list | tuple | dict) and not said)):
            raise ValueError(f"{where} has an unknown key {_short(key)}; known are {', '.join(known)}.")


def _short(value: Any) -> str:
    """What was got, for an error: short whatever it is."""
    if value is None:
        return "missing"
    if isinstance(value, str | int | float | list | tuple | dict | bytes | os.PathLike):
        return _REPR.repr(value)
    return f"a {type(value).__name__}"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60

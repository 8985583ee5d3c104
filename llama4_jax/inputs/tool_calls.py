"""A reply's text → what the assistant says, and the tools that it calls; also while the reply is being written.

Llama 4 writes calls in the way that it was told to, and now and then in another. All of these are read, several in a
row and mixed, each with or without `<|python_start|>` before and `<|python_end|>` after it:

    [get_weather(city="Oslo", days=3), get_time()]                          pythonic
    {"type": "function", "name": "get_time", "parameters": {"utc": true}}   JSON, or a list of such; also "arguments",
                                                        and both inside of "function", as in messages of OpenAI's API
    <function=get_time>{"utc": true}</function>                             function tag

Arguments that are missing, null or an empty string are none; as a string of JSON they are read as what it says.

A call is read where nothing but calls came before it, and a function tag anywhere, as Meta's decoder does (`ToolUtils`
of llama-models 0.3.0, which returns the first call alone). Where tools are declared, a call of one of them is read
anywhere: models write "Let me look:" before it. Anything else is text: brackets, code, JSON that calls nothing. A list
is all or nothing, and so is any other JSON: what stands inside of it is no call, whatever it looks like. What begins
like a call and cannot be read stays text, and `problem` says why.

Nothing is evaluated. Values are literals of JSON or Python (both spellings of true, false and null, both quotes), at
most `MAX_DEPTH` lists and dicts deep. Escapes are Python's, all of them, and mean what they mean there, but for two of
JSON's: the halves of one character, each written as a backslash, u and four digits, are joined; and outside of pythonic
calls a slash may have a backslash. A string with a prefix, as in r'', is not read. The text is read a character at a
time and never twice, by generators that wait for the next one: so the time is linear, and a stream in any pieces gives
what the whole text gives.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Generator, Sequence
from typing import Any

from llama4_jax.inputs.messages import MAX_DEPTH, NAME, Tool, ToolCall, read_arguments

_PYTHON_START, _PYTHON_END = "<|python_start|>", "<|python_end|>"
_TAG, _TAG_END = "<function=", "</function>"


@dataclasses.dataclass(frozen=True)
class ParsedReply:
    """What a reply says, the calls in order, and why something that looks like a call is none (None: nothing does)."""

    content: str
    tool_calls: tuple[ToolCall, ...]
    problem: str | None


def parse_reply(text: str, tools: Sequence[Tool] = ()) -> ParsedReply:
    """The text and the calls of a whole reply, without its end token. Takes any text, and raises nothing."""
    stream = ReplyStream(tools)
    events = [*stream.feed(text), *stream.flush()]
    return ParsedReply(
        content="".join(event for event in events if isinstance(event, str)),
        tool_calls=tuple(event for event in events if isinstance(event, ToolCall)),
        problem=stream.problem,
    )


def problem_with(call: ToolCall, tools: Sequence[Tool]) -> str | None:
    """Why a call does not fit the declared tools: no such name, an argument missing or unknown. None if it fits.

    A good answer to such a call is this sentence: the model may then try again.
    """
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return f"there is no tool {call.name}; there are: {', '.join(tool.name for tool in tools)}"
    missing = [name for name in tool.parameters.get("required", []) if name not in call.arguments]
    if missing:
        return f"{call.name} needs the argument {missing[0]}"
    known = tool.parameters.get("properties", {})
    unknown = [name for name in call.arguments if name not in known]
    if unknown and tool.parameters.get("additionalProperties") is False:
        return f"{call.name} has no argument {unknown[0]}; it has: {', '.join(known)}"
    return None


class ReplyStream:
    """Reading a reply while it is written: text is given as soon as it can be no call, a call once it is complete.

    `problem` says, as in `ParsedReply`, why something that looks like a call is none; it is final after `flush`.
    """

    def __init__(self, tools: Sequence[Tool] = ()):
        self.problem: str | None = None
        self._names = frozenset(tool.name for tool in tools)
        self._only_calls = True  # nothing but calls so far
        self._after_call = False  # and space
        self._python = False  # <|python_start|> was read
        self._gap: list[str] = []  # the space, shown if text comes next
        self._attempt: _Attempt | None = None  # what may become a call
        self._out = _Events()

    def feed(self, text: str) -> list[str | ToolCall]:
        """What is certain after this piece of the reply."""
        i = 0
        while i < len(text):
            i = self._seek(text, i) if self._attempt is None else self._read(text, i)
        return self._out.take()

    def flush(self) -> list[str | ToolCall]:
        """What was held back; the reply is over."""
        if self._attempt is not None:
            self._give_up("the reply ends inside it")
        if not self._after_call:
            self._out.text(*self._gap)
        return self._out.take()

    def _seek(self, text: str, i: int) -> int:
        """Shows text up to where a call may begin."""
        if self._only_calls or self._after_call:
            gap = (_SPACE_OR_SIGN if self._after_call else _SPACE).match(text, i)
            self._gap.append(gap.group())
            i = gap.end()
            if i < len(text) and not self._opening().match(text, i):
                self._show(*self._gap)
        if not (self._only_calls or self._after_call):
            found = self._opening().search(text, i)
            self._out.text(text[i : found.start() if found else len(text)])
            i = found.start() if found else len(text)
        if i < len(text):
            names = self._names if self._names and not self._only_calls else None
            marks = [_TAG]
            marks += [_PYTHON_START] if self._only_calls else []
            marks += [_PYTHON_END] if self._python else []
            marks += [_TAG_END] if self._after_call else []
            self._attempt = _Attempt(names, self._names, marks)
        return i

    def _opening(self) -> re.Pattern[str]:
        return _OPENING if self._only_calls or self._names else _ANGLE

    def _read(self, text: str, i: int) -> int:
        """Goes on with the attempt until it is a call, or cannot become one, or the text ends."""
        attempt = self._attempt
        for j in range(i, len(text)):
            try:
                attempt.send(text[j])
                if attempt.no_call is not None:
                    self._show_attempt(attempt.no_call)
            except _Not as reason:
                self._give_up(str(reason))
                return j
            except StopIteration as done:
                self._attempt = None
                if attempt.no_call is not None:
                    attempt.held.append(text[j])
                    self._show_attempt(attempt.no_call, attempt)
                elif isinstance(done.value, str):
                    self._python |= done.value == _PYTHON_START
                    self._only_calls |= done.value == _PYTHON_END
                else:
                    self._out.calls(done.value)
                    self._after_call, self._gap = True, []
                return j + 1
        return len(text)

    def _give_up(self, reason: str) -> None:
        """What was an attempt is text after all."""
        attempt, self._attempt = self._attempt, None
        self._show_attempt(reason, attempt)

    def _show_attempt(self, reason: str, attempt: "_Attempt | None" = None) -> None:
        """Shows what was read of an attempt that is none, and why if that is worth it."""
        attempt = attempt or self._attempt
        if self._only_calls and attempt.sure and self.problem is None:
            end = "".join(attempt.held[-40:])
            self.problem = f"what looks like a call of a tool cannot be read: {reason}, after {end!r}"
        self._show(*self._gap, *attempt.held)
        attempt.held.clear()

    def _show(self, *texts: str) -> None:
        """Shows text; what follows no longer stands after calls alone."""
        self._out.text(*texts)
        self._gap, self._only_calls, self._after_call = [], False, False


_SPACE = re.compile(r"\s*")
_SPACE_OR_SIGN = re.compile(r"[\s;,]*")
# Where an attempt is worth its time; it would fail at the next character elsewhere.
_ANGLE = re.compile(r"<(?=[f|/]|\Z)")
_OPENING = re.compile(r"[\[{](?=[\s\w\[{\"'-]|\Z)|" + _ANGLE.pattern)


class _Events:
    """Texts and calls in order, with texts that follow one another joined."""

    def __init__(self):
        self._done: list[str | ToolCall] = []
        self._texts: list[str] = []

    def text(self, *texts: str) -> None:
        self._texts += texts

    def calls(self, calls: list[ToolCall]) -> None:
        self._done += [*self._joined(), *calls]

    def take(self) -> list[str | ToolCall]:
        done, self._done = [*self._done, *self._joined()], []
        return done

    def _joined(self) -> list[str]:
        text, self._texts = "".join(self._texts), []
        return [text] if text else []


# Each of the generators below is sent one character after another and returns what it read; _Not: it is not that.
_Reading = Generator[None, str, Any]


class _Not(Exception):
    """This is no call, and why."""


class _Attempt:
    """Reading what may be calls, from their first character on.

    `send` raises StopIteration with the calls, or with a mark such as `<|python_end|>`, at its last character, and _Not
    at the first one that cannot belong to it. `held` is what was read, `sure` whether it can hardly be meant otherwise.
    `no_call`: why it is other JSON, which is read to its end as text, so that nothing inside is taken for a call; None:
    it may still be one. `names`: only calls of these; None: of any. `declared`: names that alone make a call.
    """

    def __init__(self, names: frozenset[str] | None, declared: frozenset[str], marks: list[str]):
        self.held: list[str] = []
        self.sure = False
        self.no_call: str | None = None
        self._names, self._declared, self._marks = names, declared, marks
        self._reading = self._calls()
        next(self._reading)

    def send(self, char: str) -> None:
        self._reading.send(char)
        self.held.append(char)

    def _calls(self) -> _Reading:
        first = yield
        if first == "<":
            return (yield from self._mark())
        if first == "{":
            said = yield from _dict(MAX_DEPTH + 2, look=self._key)
            return [] if self.no_call is not None else [self._json_call(said)]
        char = yield from _space((yield))
        if char in "{[\"'-" or char.isdecimal():
            return (yield from self._json_list(char))
        return (yield from self._python_list(char))

    def _mark(self) -> _Reading:
        mark = "<"
        while mark not in self._marks:
            mark += yield
            if not any(known.startswith(mark) for known in self._marks):
                raise _Not
        if mark != _TAG:
            return mark
        name, char = yield from _name((yield))
        if not name or char != ">":
            raise _Not
        self._check(name)
        self.sure = True
        char = yield from _space((yield))
        if char == "{":
            return [ToolCall(name, (yield from _dict(MAX_DEPTH)))]
        given = None
        if char != "<":
            if char == "(":
                raise _Not("its arguments should be a dict")
            given, char = yield from _value(char, MAX_DEPTH)
            char = yield from _space(char)
        arguments = _arguments(given)
        for expected in _TAG_END:
            if char != expected:
                raise _Not(f"{_TAG_END} should follow")
            if expected != ">":
                char = yield
        return [ToolCall(name, arguments)]

    def _json_list(self, char: str) -> _Reading:
        """After `[`, from the first character of a value on."""
        calls = []
        if char != "{":
            self._no_call("it is another list")
        while char != "]":
            if char == "{":
                said = yield from _dict(MAX_DEPTH + 2, look=self._key)
                char = yield
                if self.no_call is None:
                    try:
                        calls.append(self._json_call(said))
                    except _Not as reason:
                        self._no_call(str(reason))
            else:
                self._no_call("a call in braces should follow the comma")
                _, char = yield from _value(char, MAX_DEPTH)
            char = yield from _separated_from(char, "]")
        return [] if self.no_call is not None else calls

    def _no_call(self, why: str) -> None:
        self.no_call = self.no_call if self.no_call is not None else why

    def _key(self, key: str) -> "_Look | None":
        """Looks at each key of an object, before its value: other JSON is told from a call as early as can be."""
        if key in ("parameters", "arguments"):
            self.sure = True
        elif key == "function":
            return self._inner_key
        elif key not in ("type", "name", "id", "index"):
            self._no_call(f"a call has no {key[:40]!r}")
        return None

    def _inner_key(self, key: str) -> None:
        """As `_key`, of what stands inside of "function"."""
        if key in ("parameters", "arguments"):
            self.sure = True
        elif key != "name":
            self._no_call(f"a call has no {key[:40]!r}")

    def _json_call(self, said: dict[str, Any]) -> ToolCall:
        inner = said.get("function", said)
        self.sure |= said.get("type") == "function"
        if inner is not said and (
            not isinstance(inner, dict) or not said.keys() <= {"type", "id", "index", "function"}
        ):
            raise _Not("its function should be a dict with a name, and nothing of it beside it")
        name, given = inner.get("name"), inner.get("parameters")
        if said.get("type", "function") != "function" or not isinstance(name, str) or not NAME.fullmatch(name):
            raise _Not("it should have a name, and no type but function")
        if given is None:
            given = inner.get("arguments")
        if not (inner.keys() & {"parameters", "arguments"} or self.sure or name in self._declared):
            raise _Not("it has no parameters")
        arguments = _arguments(given)
        self._check(name)
        return ToolCall(name, arguments)

    def _python_list(self, char: str) -> _Reading:
        """After `[`, from the first character of a name on."""
        calls = []
        while char != "]" or not calls:
            name, char = yield from _name(char)
            if not name or (yield from _space(char)) != "(":
                raise _Not("a name and a parenthesis should follow")
            self._check(name)
            calls.append(ToolCall(name, (yield from self._keywords())))
            char = yield from _separated("]")
        return calls

    def _keywords(self) -> _Reading:
        """After `(`."""
        arguments: dict[str, Any] = {}
        char = yield from _space((yield))
        while char != ")":
            if char == "*":
                if (yield) != "*" or (yield from _space((yield))) != "{":
                    raise _Not("a dict should follow **")
                given = yield from _dict(MAX_DEPTH, json=False)
                char = yield
            else:
                self.sure |= char in _QUOTES  # in prose, what a parenthesis opens is seldom quoted
                key, char = yield from _name(char)
                if not key or (yield from _space(char)) != "=":
                    raise _Not("its arguments should have names, as in f(a=1)")
                self.sure = True
                value, char = yield from _value((yield from _space((yield))), MAX_DEPTH - 1, json=False)
                given = {key: value}
            twice = arguments.keys() & given.keys()
            if twice:
                raise _Not(f"the argument {min(twice)} stands twice")
            arguments |= given
            char = yield from _separated_from(char, ")")
        self.sure = True
        return arguments

    def _check(self, name: str) -> None:
        if self._names is not None and name not in self._names:
            raise _Not


_QUOTES = "\"'"


def _space(char: str) -> _Reading:
    """The first character, from this one on, that is no space."""
    while char.isspace():
        char = yield
    return char


def _separated(end: str) -> _Reading:
    """As `_separated_from`, with a character that is still to come."""
    return (yield from _separated_from((yield), end))


def _separated_from(char: str, end: str) -> _Reading:
    """What follows an item: the end, or after a comma the next item's first character, or the end again."""
    char = yield from _space(char)
    if char == ",":
        return (yield from _space((yield)))
    if char != end:
        raise _Not(f"a comma or {end} should follow")
    return char


def _name(char: str) -> _Reading:
    """A name, empty if there is none, and the character after it."""
    name = []
    while char.isalnum() or char == "_" or (name and char in ".-"):
        name.append(char)
        char = yield
    return "".join(name), char


_Look = Callable[[str], Any]  # is called with each key of a dict; may return what looks at the keys of its value


def _arguments(given: Any) -> dict[str, Any]:
    try:
        return read_arguments(given, "it")
    except ValueError as error:
        raise _Not(f"its parameters should be a dict, or a string of JSON with one: {str(error)[:60]}") from error


def _value(char: str, depth: int, *, json: bool = True, look: _Look | None = None) -> _Reading:
    """A literal with at most so many lists and dicts in one another, and the character after it. `json`: or Python."""
    if char in _QUOTES:
        return (yield from _string(char, json))
    if char == "[":
        value = yield from _list(depth, json)
        return value, (yield)
    if char == "{":
        value = yield from _dict(depth, json=json, look=look)
        return value, (yield)
    return (yield from _word(char))


def _list(depth: int, json: bool) -> _Reading:
    """After `[`."""
    _deeper(depth)
    values = []
    char = yield from _space((yield))
    while char != "]":
        value, char = yield from _value(char, depth - 1, json=json)
        values.append(value)
        char = yield from _separated_from(char, "]")
    return values


def _dict(depth: int, *, json: bool = True, look: _Look | None = None) -> _Reading:
    """After `{`. `look` is called with each key."""
    _deeper(depth)
    values = {}
    char = yield from _space((yield))
    while char != "}":
        if char not in _QUOTES:
            raise _Not("a name in quotes should stand here")
        key, char = yield from _string(char, json)
        inside = None if look is None else look(key)
        if (yield from _space(char)) != ":":
            raise _Not(f"a colon should follow {key!r}")
        char = yield from _space((yield))
        values[key], char = yield from _value(char, depth - 1, json=json, look=inside)
        char = yield from _separated_from(char, "}")
    return values


def _deeper(depth: int) -> None:
    if depth <= 0:
        raise _Not(f"it nests deeper than {MAX_DEPTH} lists and dicts")


def _string(quote: str, json: bool) -> _Reading:
    """After a quote: the text up to the next, or, if it is tripled, the next three; and the character after it."""
    char, closing, run = (yield), 1, 0
    if char == quote:
        if (char := (yield)) != quote:
            return "", char
        char, closing = (yield), 3
    raw = []
    while run < closing:
        run = run + 1 if char == quote else 0
        raw.append(char)
        if char == "\\":
            raw.append((yield))
        char = yield
    text = "".join(raw[:-closing])
    return (_unescape(text, json) if "\\" in text else text), char


def _unescape(text: str, json: bool) -> str:
    """With what escapes stand for; two that are the halves of one character, as JSON has them, are joined."""
    text = _ESCAPE.sub(lambda escape: "/" if json and escape[0] == r"\/" else _one_escape(escape), text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\(?:u({_HEX}{{4}})|x({_HEX}{{2}})|U({_HEX}{{8}})|([0-7]{{1,3}})|N\{{([^{{}}]+)\}}|(\r\n|.))", re.DOTALL
)
_ESCAPED = {
    **{"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "a": "\a", "v": "\v"},
    **{"\\": "\\", '"': '"', "'": "'", "\n": "", "\r\n": "", "\r": ""},
}


def _one_escape(escape: re.Match[str]) -> str:
    """What an escape stands for in Python; one that Python does not have stays as it is. A broken one is an error."""
    digits, octal, name, char = escape[1] or escape[2] or escape[3], escape[4], escape[5], escape[6]
    if digits and int(digits, 16) <= 0x10FFFF:
        return chr(int(digits, 16))
    if octal:
        return chr(int(octal, 8))
    if name:
        try:
            if len(named := unicodedata.lookup(name)) == 1:
                return named
        except KeyError:
            pass
    if char is None or char in "uxUN":
        raise _Not(f"{escape[0][:40]!r} is no escape")
    return _ESCAPED.get(char, escape[0])


def _word(char: str) -> _Reading:
    """A number, or true, false or null in either spelling, and the character after it."""
    letters = []
    while char.isalnum() or char in "_+-.":
        letters.append(char)
        char = yield
    word = "".join(letters)
    if word in _CONSTANTS:
        return _CONSTANTS[word], char
    if len(word) <= _MAX_DIGITS and _INT.fullmatch(word):
        return int(word), char
    if len(word) <= _MAX_DIGITS and _FLOAT.fullmatch(word) and abs(value := float(word)) != float("inf"):
        return value, char
    raise _Not(f"{word[:40] or char!r} is no literal")


_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_INT = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")
_MAX_DIGITS = 4000  # Python refuses to read longer ones

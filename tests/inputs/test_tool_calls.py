"""Every call of a reply is read, nothing is evaluated, and a stream in any pieces gives what the whole text gives."""

import ast
import json
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.inputs.messages import Tool, ToolCall
from llama4_jax.inputs.tool_calls import ParsedReply, ReplyStream, parse_reply, problem_with

F, G, H = ToolCall("f", {"a": 1}), ToolCall("g", {}), ToolCall("h", {"x": [{"y": None}]})
QUOTED = {"a": 'q"', "b": "it's", "c": {"k": [[], {}]}, "d": ""}
DECLARED = (Tool("f", "", {}), Tool("g", "", {}))


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(a=1)]", [F]),
        ('[f(a=1), g(), h(x=[{"y": None}])]', [F, G, H]),
        ("[f(a=1)][g()]", [F, G]),
        (" \n[ f ( a = 1 , ) , g( ) , ]\n", [F, G]),
        ('{"type": "function", "name": "f", "parameters": {"a": 1}}', [F]),
        ('{"name": "f", "arguments": {"a": 1}}{"parameters": {}, "name": "g"}', [F, G]),
        ('{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}\n', [F, G]),
        ('[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]', [F, G]),
        ('<function=f>{"a": 1}</function><function=g>{}</function>', [F, G]),
        ('<function=f>{"a": 1}\n<function=g>{}', [F, G]),
        ("<|python_start|>[f(a=1)]<|python_end|>", [F]),
        ('<|python_start|>{"name": "g", "parameters": {}}<|python_end|>', [G]),
        ("<|python_start|><|python_end|>[g()]", [G]),
        ('[f(a=1)]{"name": "g", "parameters": {}}<function=h>{"x": [{"y": null}]}</function>', [F, G, H]),
        (
            "[math.sqrt(x=2), get-time(), 日本(都市='東京')]",
            [ToolCall("math.sqrt", {"x": 2}), ToolCall("get-time", {}), ToolCall("日本", {"都市": "東京"})],
        ),
        ("[f(a=-1.5e3, b=+2, c=.5, d=3.)]", [ToolCall("f", {"a": -1500.0, "b": 2, "c": 0.5, "d": 3.0})]),
        ("[f(a=true, b=False, c=null, d=None)]", [ToolCall("f", {"a": True, "b": False, "c": None, "d": None})]),
        ("[f(a='q\"', b=\"it's\", c={'k': [[], {}]}, d=\"\")]", [ToolCall("f", QUOTED)]),
        (
            r'[f(a="\n\t\"\\\'\x41\u00e9\U0001F600\/\d", b="\ud83d\ude00")]',
            [ToolCall("f", {"a": "\n\t\"\\'Aé😀\\/\\d", "b": "😀"})],
        ),
        (r'{"name": "f", "parameters": {"a": "\/\u00e9"}}', [ToolCall("f", {"a": "/é"})]),
        ("[f(a='''x = \"y\"\n''', b=\"\")]", [ToolCall("f", {"a": 'x = "y"\n', "b": ""})]),
        ("[f(**{'not a name': 1}, a=2)]", [ToolCall("f", {"not a name": 1, "a": 2})]),
        ("[f(a=123456789012345678901234567890)]", [ToolCall("f", {"a": 123456789012345678901234567890})]),
    ],
)
def test_every_call_is_read_and_nothing_is_left(text, calls):
    assert parse_reply(text) == ParsedReply("", tuple(calls), None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "Hello [world] and {braces}, a < b, f(x) = [1, 2] {",
        "[1] Author, A. (2020).",
        "[link](https://example.org) and [ ] a box",
        "[]",
        "[f",
        "[f(x), f(y)] is an interval",
        "[see f(a=1)]",
        "{",
        '{"name": "Bob", "age": 3}',
        '{"name": "Bob", "ag',
        '[{"name": "Bob"}, {"name": "Eve"}]',
        '{"a": [1, {"b": 2}]}',
        "{'type': 'circle', 'name': 'c'}",
        "print('<function>') and <function name>",
        "Then it says [f(a=1)], as declared nowhere.",
        'In JSON that is {"name": "f", "parameters": {}}.',
        "```python\nx = [Point(x=1, y=2)]\n```",
        "<|python_end|> stays, with nothing before it",
        "<|eot|><|header_start|>",
    ],
)
def test_prose_is_prose(text):
    assert parse_reply(text) == ParsedReply(text, (), None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[f("x")]', "its arguments should have names, as in f(a=1), after '[f('"),
        ('[f(a=1, "x")]', "its arguments should have names"),
        ("[f(a=x)]", "'x' is no literal"),
        ("[f(a=g())]", "'g' is no literal"),
        ("[f(a=__import__('os').system('true'))]", "'__import__' is no literal"),
        ("[f(a=1+1)]", "'1+1' is no literal"),
        ("[f(a=(1, 2))]", "'(' is no literal"),
        ("[f(a=nan)]", "'nan' is no literal"),
        ("[f(a=1e999)]", "'1e999' is no literal"),
        ("[f(a=007)]", "'007' is no literal"),
        ("[f(a=" + "9" * 10_000 + ")]", "9' is no literal"),
        ("[f(a=f'x')]", "'f' is no literal"),
        ("[f(a=1, a=2)]", "the argument a stands twice"),
        ("[f(a=1, **{'a': 2})]", "the argument a stands twice"),
        ("[f(a=1, **g)]", "a dict should follow **"),
        ("[f(a=1 b=2)]", "a comma or ) should follow"),
        ("[f(a=1) g()]", "a comma or ] should follow"),
        ("[f(a=1), 42]", "a name and a parenthesis should follow"),
        ("[f(a=1), (g(),)]", "a name and a parenthesis should follow"),
        ("[f(a={b: 1})]", "a name in quotes should stand here"),
        ("[f(a={'b' 1})]", "a colon should follow 'b'"),
        ("[f(a=" + "[" * 40 + "]" * 40 + ")]", "it nests deeper than 32 lists and dicts"),
        ("[f(a=1", "the reply ends inside it, after '[f(a=1'"),
        ('[f(a="unclosed)]', "the reply ends inside it"),
        ('{"name": "f", "parameters": {"a": }}', "'}' is no literal"),
        ('{"name": "f", "parameters": [1]}', "its parameters should be a dict"),
        ('{"name": "f", "parameters": "[1]"}', "its parameters should be a dict"),
        ('{"name": "f", "parameters": "{"}', "its parameters should be a dict"),
        ('{"name": "f", "parameters": "{\\"a\\": NaN}"}', "its parameters should be a dict"),
        ('{"type": "function", "function": "f", "parameters": {}}', "its function should be a dict with a name"),
        ('{"name": "f", "function": {"name": "f", "parameters": {}}}', "its function should be a dict with a name"),
        ('{"function": {"name": "f", "parameters": {}, "description": "a tool"}}', "a call has no 'description'"),
        (r"[f(a='\x4')]", r"'\\x' is no escape"),
        (r"[f(a='\u12')]", r"'\\u' is no escape"),
        (r"[f(a='\U00110000')]", r"'\\U00110000' is no escape"),
        (r"[f(a='\N{NO SUCH NAME}')]", r"'\\N{NO SUCH NAME}' is no escape"),
        (r"[f(a=b'\0')]", "'b' is no literal"),
        (r"[f(a=r'\d')]", "'r' is no literal"),
        ('{"name": 3, "parameters": {}}', "it should have a name, and no type but function"),
        ('{"name": "a b", "parameters": {}}', "it should have a name, and no type but function"),
        ('{"parameters": {}, "x": 1}', "a call has no 'x'"),
        ('{"name": "f", "parameters": {"a": 1}', "the reply ends inside it"),
        ('[{"name": "f", "parameters": {}}, 3]', "a call in braces should follow the comma"),
        ("<function=f>(a=1)</function>", "its arguments should be a dict"),
        ('<function=f>{"a": 1', "the reply ends inside it"),
    ],
)
def test_a_malformed_call_comes_back_as_text_with_the_reason(text, why):
    got = parse_reply(text)
    assert (got.content, got.tool_calls) == (text, ())
    assert why in got.problem
    assert len(got.problem) < 250
    # Whole calls before it are calls all the same.
    assert parse_reply(f"[f(a=1)]{text}").tool_calls[0] == F


WRAPPED = '{"type": "function", "function": {"name": "f", "%s": %s}}'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (WRAPPED % ("parameters", '{"a": 1}'), [F]),
        (WRAPPED % ("arguments", '{"a": 1}'), [F]),
        (WRAPPED % ("arguments", json.dumps('{"a": 1}')), [F]),
        ('{"function": {"arguments": "{}", "name": "g"}, "id": "call_1", "index": 0, "type": "function"}', [G]),
        (f"[{WRAPPED}, {WRAPPED}]" % ("arguments", '{"a": 1}', "parameters", '{"a": 1}'), [F, F]),
        (f"{WRAPPED}\n{WRAPPED}" % ("arguments", '{"a": 1}', "parameters", '{"a": 1}'), [F, F]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [F]),
        *[(f'{{"name": "g", "parameters": {none}}}', [G]) for none in ('""', '" "', "null", "{}", '"{}"')],
        ('{"type": "function", "name": "g"}', [G]),
        ('{"type": "function", "function": {"name": "g"}}', [G]),
        ('[{"type": "function", "name": "g"}, {"name": "f", "parameters": null, "arguments": {"a": 1}}]', [G, F]),
        ("<function=g></function><function=g> </function><function=g>null</function>", [G, G, G]),
        ('<function=f>"{\\"a\\": 1}"</function>', [F]),
    ],
)
def test_a_call_as_openai_wraps_it_or_without_arguments_is_read_whole(text, calls):
    for tools in ((), DECLARED):
        assert parse_reply(text, tools) == ParsedReply("", tuple(calls), None)
        pieces = ReplyStream(tools)
        assert [event for char in text for event in pieces.feed(char)] + pieces.flush() == list(calls)


def test_a_name_alone_is_a_call_of_a_declared_tool_only():
    assert parse_reply('{"name": "g"}', DECLARED) == ParsedReply("", (G,), None)
    assert parse_reply('{"name": "Bob"}', DECLARED) == ParsedReply('{"name": "Bob"}', (), None)
    assert parse_reply('{"name": "g"}') == ParsedReply('{"name": "g"}', (), None)


@pytest.mark.parametrize(
    "text",
    [
        '{"tool_calls": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]}',
        '{"thought": "now", "call": {"name": "f", "parameters": {"a": 1}}}',
        '{"type": "function", "function": {"name": "f", "x": 1, "parameters": {"name": "g", "parameters": {}}}}',
        '[{"name": "Bob"}, {"name": "f", "parameters": {"a": 1}}]',
        '[{"name": "f", "parameters": {"a": 1}}, 3, {"name": "f", "parameters": {"a": 1}}]',
        '[1, {"name": "f", "parameters": {"a": 1}}]',
        '[[1], "x", {"name": "f", "parameters": {"a": 1}}]',
        '["x", [{"name": "f", "parameters": {"a": 1}}]]',
        '{"a": "[f(a=1)]", "b": [1, {"c": "g()"}]}',
        '{"name": "f", "parameters": [{"name": "f", "parameters": {"a": 1}}]}',
    ],
)
def test_what_stands_inside_of_other_json_is_no_call(text):
    for tools in ((), DECLARED):
        for said in (text, f"So: {text} and that is it."):
            parsed = parse_reply(said, tools)
            assert (parsed.content, parsed.tool_calls) == (said, ())
            pieces = ReplyStream(tools)
            assert "".join([event for char in said for event in pieces.feed(char)] + pieces.flush()) == said
    shown = ReplyStream(DECLARED)
    assert "".join(shown.feed('{"thought": "I will not')) == '{"thought": "I will not'  # at once, as it can be no call
    assert parse_reply(f"{text} [f(a=1)]", DECLARED).tool_calls == (F,)  # what follows is


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [r"\033", r"\0", r"\8", r"\777", r"\x1b", r"\xe9", r"\u00e9", r"\U0001F600", r"\N{BULLET}",
             "\\\n", r"\a", r"\d", r"\/", r"\'", r"\"", r"\\", "3", "{", "}", "é", " ", "x", "N"]
        ), max_size=8,
    ).map("".join)
)  # fmt: skip
def test_escapes_of_a_pythonic_call_mean_what_python_says(inside):
    literal = f"'{inside}'"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of escapes that it does not have
        try:
            expected = ast.literal_eval(literal)
        except SyntaxError:
            expected = None
    calls = parse_reply(f"[f(a={literal})]").tool_calls
    assert calls == (() if expected is None else (ToolCall("f", {"a": expected}),))


def test_what_stands_around_calls_is_text():
    assert parse_reply("[g()] Done.") == ParsedReply(" Done.", (G,), None)
    assert parse_reply("So:\n<function=f>{'a': 1}</function>") == ParsedReply("So:\n", (F,), None)
    assert parse_reply('<|python_start|>Look.<|python_end|>{"name": "g", "parameters": {}}').content == "Look."
    tags = "So: <function=f>{'a': 1}</function>; <function=g>{}</function> and [g()]"
    assert parse_reply(tags) == ParsedReply("So:  and [g()]", (F, G), None)
    assert parse_reply("[g()][f(a=") == ParsedReply("[f(a=", (G,), parse_reply("[f(a=").problem)


def test_a_declared_tool_is_called_anywhere_and_another_is_not():
    text = 'Let me look: [f(a=1)] then [h(a=1)], {"name": "g", "parameters": {}}, {"name": "h", "parameters": {}}.'
    said = 'Let me look:  then [h(a=1)], , {"name": "h", "parameters": {}}.'
    assert parse_reply(text, DECLARED) == ParsedReply(said, (F, G), None)
    assert parse_reply("[h(x=[{'y': null}])]", DECLARED).tool_calls == (H,)  # alone, it is surely meant as a call
    assert parse_reply("so [f(x)] or [f(a=x)] or {'name': 'f'}", DECLARED).problem is None


def test_a_call_that_does_not_fit_is_told_why():
    parameters = {"properties": {"a": {}, "b": {}}, "required": ["a"], "additionalProperties": False}
    tools = (Tool("f", "", parameters), Tool("g", "", {}))
    assert problem_with(F, tools) is None
    assert problem_with(ToolCall("g", {"any": 1}), tools) is None
    assert problem_with(H, tools) == "there is no tool h; there are: f, g"
    assert problem_with(ToolCall("f", {"b": 1}), tools) == "f needs the argument a"
    assert problem_with(ToolCall("f", {"a": 1, "c": 1}), tools) == "f has no argument c; it has: a, b"


def test_text_is_shown_as_soon_as_it_can_be_no_call_and_calls_once_they_are_whole():
    stream, shown = ReplyStream(), []
    for char in "[so]":
        shown.append(stream.feed(char))
    assert shown == [[], [], [], ["[so]"]]
    assert stream.feed(" a [b") == [" a [b"]
    stream, shown = ReplyStream(), []
    for char in "[f(a=1)] {'name': 'g', 'parameters': {}}":
        shown += stream.feed(char)
        assert shown in ([], [F]) or char == "}"
    assert shown == [F, G]
    assert stream.flush() == []
    stream = ReplyStream(DECLARED)
    assert stream.feed("Look: [") == ["Look: "]
    assert stream.feed("1]") == ["[1]"]
    assert stream.feed("[f(") == []
    assert stream.flush() == ["[f("]


WORDS = [
    *("[f(", "f", "(", ")", "]", "[", "a=", "a", "=", ",", " ", "\n", '"', "'", "\\", "\\u00e9", "{", "}", ":", ";"),
    *('{"name": "f", "parameters": {}}', '"name"', '"parameters"', '"type"', '"function"', "[g()]", "**", "1", "-1.5"),
    *("<", "<function=", "f>", "</function>", "<|python_start|>", "<|python_end|>", "<|", "None", "true", '"""', "é日"),
]
NEAR = st.lists(st.sampled_from(WORDS), max_size=25).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.text() | NEAR, st.sampled_from([(), DECLARED]))
def test_a_stream_in_any_pieces_gives_what_the_whole_gives(data, text, tools):
    whole = parse_reply(text, tools)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    for bounds in ([0, *cuts, len(text)], range(len(text) + 1)):
        stream = ReplyStream(tools)
        pieces = [text[i:j] for i, j in zip(bounds, [*bounds][1:], strict=False)]
        events = [event for piece in pieces for event in stream.feed(piece)] + stream.flush()
        assert "".join(e for e in events if isinstance(e, str)) == whole.content
        assert tuple(e for e in events if isinstance(e, ToolCall)) == whole.tool_calls
        assert stream.problem == whole.problem
        # … and in the same order: joined, the texts between the calls are the same.
        assert joined(events) == joined([*(s := ReplyStream(tools)).feed(text), *s.flush()])


def joined(events):
    out = []
    for event in events:
        if isinstance(event, str) and out and isinstance(out[-1], str):
            out[-1] += event
        else:
            out.append(event)
    return out


@settings(max_examples=1000, deadline=None)
@given(st.text() | NEAR)
def test_any_text_is_read_without_a_crash_and_without_calls_it_is_given_back_whole(text):
    for tools in ((), DECLARED):
        got = parse_reply(text, tools)
        json.dumps([call.arguments for call in got.tool_calls], allow_nan=False)
        if not got.tool_calls and "<|python" not in text:
            assert got.content == text


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2 * 10**4,
        '{"name":' * 10**4,
        '[f(a="' * 10**4,
        "[f(a=[" * 10**4,
        "[f(a=" + '[{"x":' * 10**4,
        "<function=f>{" * 10**4,
    ],
)
def test_a_hostile_text_takes_linear_time(text):
    seconds = []
    for size in (len(text) // 4, len(text)):
        start = time.perf_counter()
        assert parse_reply(text[:size], DECLARED).content == text[:size]
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 8 * seconds[0] + 0.5  # quadratic: 16 times


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.booleans(), st.sampled_from([None, 1]))
def test_json_and_python_literals_have_the_values_that_json_and_python_give_them(arguments, ascii, indent):
    as_json = json.dumps(arguments, ensure_ascii=ascii, indent=indent)
    for text in (f'{{"name": "f", "parameters": {as_json}}}', f"<function=f>{as_json}</function>"):
        assert parse_reply(text).tool_calls == (ToolCall("f", json.loads(as_json)),)
    as_python = repr(arguments)
    assert parse_reply(f"[f(x={as_python})]").tool_calls == (ToolCall("f", {"x": ast.literal_eval(as_python)}),)


@settings(max_examples=100, deadline=None)
@given(st.text("\\nrtbfav'\"x0u1dNUé \n8", max_size=12))
def test_a_string_means_what_it_means_in_json_or_python(inside):
    """JSON's meaning where it has one, and Python's where it has not."""
    try:
        expected = json.loads(f'"{inside}"', strict=False)
    except ValueError:
        try:
            with warnings.catch_warnings(action="ignore"):  # Python keeps escapes that are none, and says so
                expected = ast.literal_eval(f'"{inside}"')
        except (SyntaxError, ValueError):
            return
        if '"' in inside:  # nor does it join strings that stand side by side
            return
    assert parse_reply(f'[f(x="{inside}")]').tool_calls == (ToolCall("f", {"x": expected}),)

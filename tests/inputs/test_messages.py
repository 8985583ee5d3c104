"""OpenAI-style dicts become messages and tools, and anything else one error that names the place."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.inputs.messages import MAX_DEPTH, Message, Picture, Tool, ToolCall, read_messages, read_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def one(content, role="user", **more):
    return read_messages([{"role": role, "content": content, **more}])[0]


def test_a_conversation_with_a_tool_is_read_in_order():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "n": [1]}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Here: "}, {"type": "image", "path": "a.png"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "Rain.", "end_of_message": True},
    ]
    assert read_messages(messages) == (
        Message("system", ("Be brief.",)),
        Message("user", ("Here: ", Picture("a.png"))),
        Message("assistant", (), (ToolCall("weather", {"city": "Oslo", "n": [1]}, "c1"),)),
        Message("tool", ("rain",)),
        Message("assistant", ("Rain.",), (), True),
    )
    assert read_messages(messages)[1].text == "Here: "
    assert read_messages(read_messages(messages)) == read_messages(messages)


@pytest.mark.parametrize(("said", "role"), [("ipython", "tool"), ("tool", "tool"), ("developer", "system")])
def test_other_names_of_roles_mean_the_same(said, role):
    assert one("x", said).role == role


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image"}, None),
        ({"type": "image", "image": "a b.png"}, "a b.png"),
        ({"type": "image", "url": "dir/a.png"}, "dir/a.png"),
        ({"type": "image", "image": b"GIF89a"}, b"GIF89a"),
        ({"type": "image_url", "image_url": {"url": "/tmp/a.png", "detail": "low"}}, "/tmp/a.png"),
        ({"type": "image_url", "image_url": "file:///tmp/a%20b.png"}, "/tmp/a b.png"),
        ({"type": "image_url", "image_url": {"url": "file://localhost/tmp/a.png"}}, "/tmp/a.png"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AP8="}}, b"\x00\xff"),
        ({"type": "image_url", "image_url": {"url": r"C:\pictures\a.png"}}, r"C:\pictures\a.png"),
    ],
)
def test_a_picture_has_its_source(part, source):
    assert one([part]).content == one([part], "tool").content == (Picture(source),)


def test_a_picture_that_is_an_object_is_left_to_the_loader():
    held = object()
    assert one([{"type": "image", "image": held}, Picture(held), "text"]).content == (*[Picture(held)] * 2, "text")


CALLS = "messages[0].tool_calls"
FUNCTION = {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        ("hello", "messages should be a list of messages, and is 'hello'"),
        ({"role": "user", "content": "x"}, "messages should be a list of messages, and is {"),
        (["hello"], "messages[0] should be a message, and is 'hello'"),
        ([{"content": "x"}], "messages[0].role should be one of system, developer, user, assistant, tool, ipython"),
        ([{"role": "bot", "content": "x"}], "messages[0].role should be one of"),
        ([{"role": "user<|eot|>", "content": "x"}], "and is 'user<|eot|>'"),
        ([{"role": ["user"], "content": "x"}], "and is ['user']"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "messages[1].content should be a string or a list of"),
        (
            [{"role": "assistant", "content": None}],
            "messages[0].content should be a string or a list of parts, and is mis",
        ),
        ([{"role": "user", "content": 3}], "messages[0].content should be a string or a list of parts, and is 3"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0] should be a part, and is 3"),
        ([{"role": "user", "content": [{"text": "x"}]}], 'messages[0].content[0].type should be "text", "image" or'),
        ([{"role": "user", "content": [{"type": "video"}]}], "and is 'video'"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text should be a string, and is mis",
        ),
        ([{"role": "user", "content": "x", "tool_call": [1]}], "messages[0] has an unknown key 'tool_call'; known are"),
        ([{"role": "user", "content": "x", "tool_calls": [FUNCTION]}], "messages[0].tool_calls: only the assistant"),
        ([{"role": "user", "content": "x", "end_of_message": True}], "messages[0].end_of_message should be"),
        ([{"role": "assistant", "content": "x", "end_of_message": "no"}], "messages[0].end_of_message should be"),
        (
            [{"role": "system", "content": [{"type": "image"}]}],
            "messages[0].content[0] is a picture in a message of the",
        ),
        (
            [{"role": "assistant", "content": [Picture()]}],
            "messages[0].content[0] is a picture in a message of the ass",
        ),
        ([Message("assistant", (Picture(),))], "messages[0].content[0] is a picture in a message of the assistant"),
        ([{"role": "assistant", "tool_calls": {}, "content": "x"}], f"{CALLS} should be a list of tool calls"),
        ([{"role": "assistant", "tool_calls": ["f"]}], f"{CALLS}[0] should be a tool call, and is 'f'"),
        ([{"role": "assistant", "tool_calls": [{}]}], f"{CALLS}[0].name should be a name of letters"),
        ([{"role": "assistant", "tool_calls": [FUNCTION | {"name": "<|eot|>"}]}], "and is '<|eot|>'"),
        ([{"role": "assistant", "tool_calls": [FUNCTION | {"id": 3}]}], f"{CALLS}[0].id should be a string, and is 3"),
        ([{"role": "assistant", "tool_calls": [FUNCTION | {"type": "x"}]}], f'{CALLS}[0].type should be "function"'),
        ([{"role": "assistant", "tool_calls": [{"function": 3}]}], f"{CALLS}[0].function should be a dict with name"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments is no valid JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}], "arguments should be a dict, or a"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}], "holds what JSON cannot"),
        ([{"role": "assistant", "tool_calls": [ToolCall("f", {"a": float("inf")})]}], "holds what JSON cannot"),
        ([{"role": "assistant", "tool_calls": [ToolCall("f", {"a": object()})]}], "holds what JSON cannot"),
    ],
)
def test_what_is_no_conversation_is_one_error_that_names_the_place(messages, said):
    with pytest.raises(ValueError) as error:
        read_messages(messages)
    assert said in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.org/a.png", "nothing is fetched from the network. Download 'https://example.org/a.png'"),
        ("HTTP://example.org/a.png", "nothing is fetched"),
        ("data:image/png,abc", "should be data:image/…;base64,… and begins with 'data:image/png'"),
        ("data:image/png;base64,a!", "is a data: URL whose base64 is damaged"),
        ("data:image/png;base64", "should be data:image/…;base64,… and begins with 'data:image/png;base64'"),
        ("file://elsewhere/a.png", "should be a file of this machine"),
        ("file://[/a.png", "is no URL of a file"),
        ("", "should be a path or a data: URL, and is ''"),
        ("a\0b", "should be a path or a data: URL"),
        (7, "should be a"),
    ],
)
def test_a_picture_that_cannot_be_had_is_named(url, said):
    for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image", "url": url}):
        with pytest.raises(ValueError) as error:
            one(["x", part])
        assert "messages[0].content[1]." in str(error.value)
        assert said in str(error.value)


@pytest.mark.parametrize(
    "said", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": " \n"}, {"arguments": "{}"}]
)
def test_arguments_that_are_missing_or_empty_are_none(said):
    for call in ({"function": {"name": "f", **said}}, {"name": "f", **said}):
        (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
        assert message.tool_calls == (ToolCall("f", {}),)


def test_two_sources_of_one_picture_are_an_error():
    with pytest.raises(ValueError, match=r"messages\[0\].content\[0\] should name one picture, and has both 'image'"):
        one([{"type": "image", "image": "a.png", "url": "b.png"}])


def test_an_error_is_short_however_long_the_value_is():
    with pytest.raises(ValueError) as error:
        one([{"type": "image_url", "image_url": {"url": "https://" + "x" * 100_000}}])
    assert len(str(error.value)) < 300


def nested(depth):
    value = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def test_arguments_may_nest_so_deep_and_no_deeper():
    read = {"role": "assistant", "content": None}
    call = {"name": "f", "arguments": nested(MAX_DEPTH)}
    assert read_messages([read | {"tool_calls": [call]}])[0].tool_calls[0].arguments == nested(MAX_DEPTH)
    for said in (nested(MAX_DEPTH + 2), json.dumps(nested(200)), '{"a":' * 10_000):
        with pytest.raises(ValueError, match=r"messages\[0\].tool_calls\[0\].arguments"):
            read_messages([read | {"tool_calls": [{"name": "f", "arguments": said}]}])


def test_tools_are_read_in_both_forms():
    inner = {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}
    tool = Tool("get_weather", "Weather.", SCHEMA)
    assert read_tools([{"type": "function", "function": inner | {"strict": True}}]) == read_tools([inner]) == (tool,)
    assert read_tools([tool]) == (tool,)
    assert read_tools([]) == ()
    assert read_tools([{"name": "now"}]) == (Tool("now", "", {"type": "object", "properties": {}}),)


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({"name": "f"}, "tools should be a list of tools, and is {'name': 'f'}"),
        (["f"], "tools[0] should be a tool, and is 'f'"),
        ([{"type": "function"}], "tools[0].name should be a name of letters, digits, _, - and ., and is missing"),
        ([{"type": "retrieval", "name": "f"}], "tools[0].type should be \"function\", and is 'retrieval'"),
        ([{"function": 3}], "tools[0].function should be a dict with name, description and parameters, and is 3"),
        ([{"name": "get weather"}], "and is 'get weather'"),
        ([{"name": "f", "description": 3}], "tools[0].description should be a string, and is 3"),
        ([{"name": "f", "input_schema": SCHEMA}], "tools[0] has an unknown key 'input_schema'; known are"),
        ([{"name": "f", "parameters": "city"}], "tools[0].parameters should be a JSON schema, and is 'city'"),
        ([{"name": "f", "parameters": {"type": "array"}}], 'tools[0].parameters.type should be "object"'),
        ([{"name": "f", "parameters": {"properties": ["a"]}}], "tools[0].parameters.properties should be a dict of"),
        (
            [{"name": "f", "parameters": {"properties": {"a": "int"}}}],
            "properties['a'] should be a schema, and is 'int'",
        ),
        ([{"name": "f", "parameters": {"properties": {"a": {"type": 3}}}}], "properties['a'].type should be the name"),
        ([{"name": "f", "parameters": {"required": "a"}}], "tools[0].parameters.required should be a list of names"),
        ([{"name": "f", "parameters": {"a": {1, 2}}}], "tools[0].parameters holds what JSON cannot"),
        ([{"name": "f"}, {"name": "g"}, {"name": "f"}], "tools[2] is called 'f', as one before it is"),
    ],
)
def test_what_is_no_tool_is_one_error_that_names_it(tools, said):
    with pytest.raises(ValueError) as error:
        read_tools(tools)
    assert said in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = [
    *("role", "content", "type", "text", "image", "path", "url", "image_url", "tool_calls"),
    *("function", "name", "arguments", "parameters", "properties"),
]
SAID = st.sampled_from(
    ["user", "assistant", "tool", "text", "image", "image_url", "{}", "file://[", "data:,", "object"]
)
NEAR = st.recursive(
    JSON | SAID,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(JSON | NEAR | st.lists(NEAR, max_size=3))
def test_any_json_is_read_or_a_valueerror(value):
    for read, kind in ((read_messages, Message), (read_tools, Tool)):
        try:
            result = read(value, where="body")
        except ValueError as error:
            assert str(error).startswith("body")
        else:
            assert all(isinstance(item, kind) for item in result)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=40))
def test_a_data_url_gives_the_bytes(data):
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert one([{"type": "image_url", "image_url": {"url": url}}]).content == (Picture(data),)

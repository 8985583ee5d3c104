"""JSON of others: a value, or one short ValueError that names the file and the place."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.untrusted_json import parse_json, read_json, shortened, shown, typed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Sizes(msgspec.Struct):
    width: int
    layers: list[int] | None = None
    eps: float = 1e-5


DEEP = "[" * 10**5 + "]" * 10**5


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (DEEP, "x.json is no valid JSON: it is nested too deeply."),
        ('{"a":' * 10**5, "x.json is no valid JSON: it is nested too deeply."),
        ("9" * 5000, "x.json is no valid JSON: Exceeds the limit (4300 digits)"),
        (b"\xff\xfe", "x.json is no valid JSON: 'utf-8' codec can't decode byte 0xff"),
        ("", "x.json is no valid JSON: Expecting value"),
        ("[]", "x.json: expected `object`, got `array`."),
        ("{}", "x.json: object missing required field `width`."),
        ('{"width": "8"}', "x.json: width: expected `int`, got `str`."),
        ('{"width": 8.0}', "x.json: width: expected `int`, got `float`."),
        ('{"width": true}', "x.json: width: expected `int`, got `bool`."),
        ('{"width": 8, "layers": [0, null]}', "x.json: layers[1]: expected `int`, got `null`."),
    ],
)
def test_what_is_wrong_is_one_short_error(data, says):
    with pytest.raises(ValueError) as caught:
        parse_json(data, where="x.json", of=Sizes)
    assert str(caught.value).startswith(says) and len(str(caught.value)) < 300


def test_values_are_not_converted_but_whole_numbers_are_floats():
    assert parse_json('{"width": 8, "eps": 1}', where="x", of=Sizes) == Sizes(width=8, eps=1.0)
    assert parse_json('{"a": [1, "2"]}', where="x") == {"a": [1, "2"]}


def test_a_file_that_is_missing_or_too_large_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*a\.json \(every model has one\)\."):
        read_json(tmp_path / "a.json", why="every model has one")
    (tmp_path / "a.json").write_text(json.dumps([0] * 100))
    with pytest.raises(ValueError, match=r"a\.json is too large: of a file like this 99 bytes are read at most"):
        read_json(tmp_path / "a.json", max_bytes=99)
    assert read_json(tmp_path / "a.json", of=list[int]) == [0] * 100


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_value_can_be_shown_and_checked(value):
    said = shown(value)
    assert len(said) < 1000 and said.isprintable()
    said.encode("utf-8")
    try:
        typed(value, Sizes, where="x")
    except ValueError as error:
        assert len(str(error)) < 400


def test_text_of_others_is_short_printable_and_of_one_line():
    said = shortened("\x1b[31mred\n\ud800\u202e" + "a" * 1000)
    assert said.startswith("\\x1b[31mred\\n\\ud800\\u202e") and len(said) == 81
    said.encode("utf-8")
    assert shown(10**400) == "an integer of more than 30 digits"
    assert shown([1, "a"]) == "[1, 'a']"
    assert shown({"a": [1] * 10**6}) == "an object of 1 keys"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": -0}', "-0 is no integer"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        ('{"a": "\\udfff"}', "surrogates not allowed"),
    ],
)
def test_what_only_python_takes_for_json_can_be_refused(text, says):
    parse_json(text, where="x")
    with pytest.raises(ValueError, match=f"x is no valid JSON: .*{says}"):
        parse_json(text, where="x", exact=True)
    assert parse_json('{"a": [-1, 2.5], "b": {}}', where="x", exact=True) == {"a": [-1, 2.5], "b": {}}


@pytest.mark.parametrize(("value", "of"), [("\ud800", int), ({"\ud800": 1}, dict[str, str]), (10**400, float)])
def test_what_the_library_cannot_say_is_an_error_too(value, of):
    with pytest.raises(ValueError, match="^x: "):
        typed([value], list[of], where="x")

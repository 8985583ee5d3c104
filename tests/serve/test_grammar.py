"""What is written under a grammar is what the grammar says, whatever writes it."""

import json
import random

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_schemas import SCHEMAS, WORDS

from llama4_jax.inputs.messages import Tool
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.inputs.tool_calls import parse_reply, problem_with
from llama4_jax.serve.grammar import Grammars

TOKENIZER = ByteTokenizer()
GRAMMARS = Grammars(TOKENIZER, 352)  # a model may have more logits than the tokenizer has ids
CLOSING = (*b'"}])', *TOKENIZER.stop_ids)
SMALL = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def written(grammar, seed, most=6000):
    """What a model writes that has learned nothing, but that what closes something is likely: else few texts end."""
    draw, ids = random.Random(seed), []
    while len(ids) < most:
        allowed = np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")).tolist()
        assert allowed and allowed[-1] < TOKENIZER.vocab_size
        ends = [token for token in allowed if token in CLOSING]
        token = draw.choice(ends if ends and draw.random() < 0.6 else allowed)
        grammar.accept(token)
        assert grammar.problem is None
        if token in TOKENIZER.stop_ids:
            return TOKENIZER.decode(ids)
        ids.append(token)
    pytest.fail(f"no end: {TOKENIZER.decode(ids)[:300]}")


QUIETLY = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}


def check_schema(schema, seed):
    text = written(GRAMMARS.compile(schema=schema), seed)
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=40, **QUIETLY)
@given(SCHEMAS, st.integers(0, 1000))
def test_json_is_valid_by_its_schema(schema, seed):
    check_schema(schema, seed)


@pytest.mark.slow
@settings(max_examples=300, **QUIETLY)
@given(SCHEMAS, st.integers(0, 1000))
def test_json_is_valid_by_many_schemas(schema, seed):
    check_schema(schema, seed)


PAIRS = st.one_of(
    st.tuples(st.just({"type": "boolean"}), st.booleans()),
    st.tuples(st.just({"type": "string"}), st.text("abé漢 .,-", max_size=20)),
    st.tuples(st.just({"type": "integer", "minimum": -50}), st.integers(-50, 10**12)),
    st.tuples(st.just({"type": "number"}), st.floats(-1e6, 1e6).map(lambda x: round(x, 3))),
    st.tuples(st.just({"type": "array", "items": {"enum": ["x", 1, None]}}), st.lists(st.sampled_from(["x", 1, None]))),
)


@settings(max_examples=50, **QUIETLY)
@given(st.dictionaries(WORDS, PAIRS, min_size=1, max_size=3), st.sampled_from([None, 0, 2]))
def test_what_is_valid_by_a_schema_is_allowed(pairs, indent):
    """As other programs write it, in one line or indented."""
    properties = {name: schema for name, (schema, _) in pairs.items()}
    schema = {"type": "object", "properties": properties, "required": list(pairs), "additionalProperties": False}
    text = json.dumps({name: value for name, (_, value) in pairs.items()}, ensure_ascii=False, indent=indent)
    grammar = GRAMMARS.compile(schema=schema)
    for at, token in enumerate([*TOKENIZER.encode(text), TOKENIZER.stop_ids[0]]):
        assert grammar.mask()[token // 32] >> (token % 32) & 1, (text, at)
        grammar.accept(token)
    assert grammar.problem is None


@settings(max_examples=30, **QUIETLY)
@given(st.dictionaries(WORDS, SCHEMAS, max_size=4), st.integers(0, 4), st.integers(0, 99), st.booleans())
def test_calls_fit_their_tools_and_are_read_back(properties, required, seed, parallel):
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)[:required]}
    tools = (Tool("first.one", "", parameters), Tool("second", "", {"type": "dict", "properties": {}}))
    for notation in ("pythonic", "json"):
        text = written(GRAMMARS.compile(tools=tools, parallel=parallel, notation=notation), seed)
        parsed = parse_reply(text, tools)
        if "e" in text.lower() and not parsed.tool_calls and any(c.isdigit() for c in text):
            continue  # a number that no float holds, as 1e999
        assert parsed.tool_calls and not parsed.content and parsed.problem is None, text
        assert parallel or len(parsed.tool_calls) == 1
        for call in parsed.tool_calls:
            assert problem_with(call, tools) is None
            jsonschema.validate(call.arguments, parameters if call.name == "first.one" else {})


@pytest.mark.parametrize(
    "parameters",
    [
        {"$defs": {"word": {"enum": ["a", "b"]}}, "properties": {"x": {"$ref": "#/$defs/word"}}, "required": ["x"]},
        {"properties": {"x": {"type": "integer"}}, "anyOf": [{"required": ["x"]}]},
        {"properties": {"two words": {"type": "integer"}}, "required": ["two words"]},
        {"properties": {"x": {"type": "array", "items": {"$ref": "#"}}}, "required": ["x"]},
        {"properties": {"x": {"const": '"\\ \n ü'}}, "required": ["x"], "additionalProperties": False},
        {"additionalProperties": {"type": "boolean"}},
        {},
    ],
)
def test_schemas_that_say_more_than_names_and_types_are_kept_to_as_well(parameters):
    tools = (Tool("f", "", {"type": "object", **parameters}),)
    for notation in ("pythonic", "json"):
        for seed in range(5):
            parsed = parse_reply(written(GRAMMARS.compile(tools=tools, notation=notation), seed), tools)
            assert parsed.tool_calls
            for call in parsed.tool_calls:
                jsonschema.validate(call.arguments, {"type": "object", **parameters})


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"not": {"type": "integer"}}, "not"), ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "word"}, "word"), ({"type": "string", "format": "colour"}, "colour"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "retriev"), ({"$ref": "file:///etc/passwd"}, "retriev"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "nsatisfiable"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"), ({"type": "object", "x-guidance": {}}, "x-guidance"),
        ({"enum": ["x" * 10] * 20_000}, "too large"),
        ({"properties": {"a": {"not": {}}}}, "not"), ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ],
    ids=lambda x: json.dumps(x)[:40] if isinstance(x, dict) else None,
)  # fmt: skip
def test_a_schema_that_cannot_be_kept_to_is_refused(schema, why):
    for how in ({"schema": schema}, {"tools": (Tool("f", "", {"type": "object", "properties": {"a": schema}}),)}):
        if "x-guidance" in schema and "tools" in how:
            continue
        with pytest.raises(ValueError, match=r"^(schema|tools)") as error:
            GRAMMARS.compile(**how)
        assert why in str(error.value) and len(str(error.value)) <= 500


def test_nothing_but_the_end_may_follow_the_end():
    grammar = GRAMMARS.compile(schema=SMALL)
    for token in b'{"a": 1}':
        assert grammar.mask()[token // 32] >> (token % 32) & 1
        grammar.accept(token)
    allowed = np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder="little"))
    assert tuple(allowed) == tuple(sorted(TOKENIZER.stop_ids))


def test_a_token_that_was_not_allowed_ends_the_reply_and_is_told():
    grammar = GRAMMARS.compile(schema=SMALL)
    grammar.accept(ord("x"))
    assert grammar.problem
    allowed = np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder="little"))
    assert tuple(allowed) == tuple(sorted(TOKENIZER.stop_ids))
    again = GRAMMARS.compile(schema=SMALL)
    other = again.again()
    again.accept(ord("{"))
    assert not (again.mask() == other.mask()).all() and other.problem is None


def test_schemas_are_bounded_together_and_what_admits_nothing_is_told_before_a_reply_begins():
    def tool(i):
        one = {"type": "object", "properties": {"a": {"enum": ["x" * 9000]}}}
        return Tool(f"f{i}", "", one)

    GRAMMARS.compile(tools=[tool(i) for i in range(10)])
    with pytest.raises(ValueError, match=r"tools\[11\] \(f11\): schemas are too large: 100,000 characters of all"):
        GRAMMARS.compile(tools=[tool(i) for i in range(12)])
    for schema in ({"$ref": "#"}, {"anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {} for i in range(40)}}
                                             for j in range(40)]}):  # fmt: skip
        with pytest.raises(ValueError, match="^schema: this schema cannot be kept to: "):
            GRAMMARS.compile(schema=schema)
    written(
        GRAMMARS.compile(schema={"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(400)}}), 0
    )

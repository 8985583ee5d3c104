"""What a client is shown of a reply does not depend on where its tokens end."""

import json

import pytest
from fake_engine import Sampled
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.inputs.messages import Tool, ToolCall
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.serve.reply import ReplyReader, StopStrings

TOKENIZER = ByteTokenizer()
TOOLS = (Tool("get_time", "", {"type": "object", "properties": {"place": {"type": "string"}}}),)


def tokens(text, end=True):
    ids = [*TOKENIZER.encode(text), *([TOKENIZER.stop_ids[-1]] if end else [])]
    return [Sampled(i, -0.5, ()) for i in ids]


def read(said, pieces, **how):
    """The pieces of a reply that comes in groups of so many tokens."""
    reader = ReplyReader(TOKENIZER, **how)
    given, at = [], 0
    while at < len(said) and not reader.stopped:
        count = pieces[len(given) % len(pieces)]
        given.append(reader.feed(said[at : at + count]))
        at += count
    return reader, [*given, reader.flush()]


def text(pieces):
    return "".join(piece.text for piece in pieces)


@settings(deadline=None, max_examples=200)
@given(
    st.text("abé漢", max_size=30),
    st.lists(st.text("abé漢", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(said, stops, pieces):
    """Each character takes one to three tokens here."""
    reader, given = read(tokens(said), pieces, stops=stops)
    # The one that is complete first, and of those that end together the one that began first.
    ends = [said.find(stop) + len(stop) for stop in stops if stop in said]
    begins = [said.find(stop) for stop in stops if stop in said and said.find(stop) + len(stop) == min(ends)]
    assert text(given) == (said[: min(begins)] if begins else said)
    assert reader.stopped == bool(begins)


def test_text_that_may_begin_a_stop_string_is_held_back_and_no_more():
    stops = StopStrings(["END", "ENTER"])
    assert [stops.feed(part) for part in ("a", "E", "N", "x", "EN", "D")] == ["a", "", "", "ENx", "", ""]
    assert stops.found and stops.feed("more") == "" and stops.flush() == ""
    stops = StopStrings(["END"])
    assert stops.feed("xEN") == "x" and stops.flush() == "EN"


def test_half_a_character_waits_for_the_other_half_and_is_shown_broken_at_the_end():
    reader = ReplyReader(TOKENIZER)
    assert reader.feed(tokens("é", end=False)[:1]).events == []
    assert reader.flush().text == "�"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_log_probabilities_go_with_the_text_and_none_is_lost(pieces):
    said = tokens("a éb STOP and more")
    _, given = read(said, pieces, stops=["STOP"])
    shown = [token.id for piece in given for token in piece.tokens]
    assert shown == TOKENIZER.encode("a éb ")
    _, given = read(said, pieces)
    assert [token.id for piece in given for token in piece.tokens] == TOKENIZER.encode("a éb STOP and more")


@pytest.mark.parametrize("pieces", [[1], [2, 5], [1000]])
def test_calls_come_out_whole_and_special_tokens_that_mean_nothing_do_not(pieces):
    special = TOKENIZER.special_tokens
    said = [
        Sampled(special["<|python_start|>"], -0.5, ()),
        *tokens('[get_time(place="Öslo")]', end=False),
        Sampled(special["<|python_end|>"], -0.5, ()),
        Sampled(special["<|step|>"], -0.5, ()),
        Sampled(TOKENIZER.stop_ids[1], -0.5, ()),
    ]
    reader, given = read(said, pieces, tools=TOOLS)
    assert [event for piece in given for event in piece.events] == [ToolCall("get_time", {"place": "Öslo"})]
    assert reader.calls == 1 and reader.taken == len(said)
    _, given = read(said, pieces)  # without tools it is text, and special tokens are none
    assert text(given) == '[get_time(place="Öslo")]'


def test_what_looks_like_a_call_and_is_none_is_text_and_the_problem_is_said():
    reader, given = read(tokens('[get_time(place="Oslo"'), [3], tools=TOOLS)
    assert text(given) == '[get_time(place="Oslo"'
    assert "the reply ends inside it" in reader.problem
    assert json.dumps(reader.problem)

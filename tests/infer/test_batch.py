"""A file of requests is answered, bad lines and all, and the replies do not know whether the run was interrupted.

But for the test of a real model, replies are a digest of what the model is asked and, with temperature, of what it
would draw: its seed."""

import base64
import hashlib
import io
import json

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_run import PICTURES, picture_model, picture_processor
from PIL import Image
from scripted_core import ScriptedCore

from llama4_jax.infer import batch as module
from llama4_jax.infer.batch import Progress, answer_file
from llama4_jax.infer.generate import generate
from llama4_jax.infer.sampling import check_sampling
from llama4_jax.model.llama4 import Llama4

PROCESSOR = picture_processor()
TOKENIZER = PROCESSOR.tokenizer
EOT = TOKENIZER.special_tokens["<|eot|>"]
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"properties": {"city": {}}}}}


class Digests:
    """What is written."""

    def __init__(self, script=()):
        self.asked = []
        self.script = dict(script)  # last words of the user → what is written

    def __call__(self, prompt, *, tiles, stop_ids, max_new_tokens, temperature, top_p, top_k, seed):
        assert set(stop_ids) == set(TOKENIZER.stop_ids)
        self.asked.append((max_new_tokens, temperature, top_p, top_k, seed))
        drawn = seed if temperature else None
        asked = repr((prompt, None if tiles is None else tiles.tobytes(), drawn)).encode()
        text = next((text for words, text in self.script.items() if words in TOKENIZER.decode(prompt)), None)
        row = [*TOKENIZER.encode(text or f"é{hashlib.blake2b(asked, digest_size=4).hexdigest()}"), EOT]
        return [[token] for token in row[:max_new_tokens]]


@pytest.fixture(scope="module")
def model():
    return nnx.eval_shape(lambda: Llama4(PICTURES, scan_layers=False))


@pytest.fixture
def digests(monkeypatch):
    made = Digests()
    monkeypatch.setattr(module, "EngineCore", ScriptedCore(made))
    return made


def asks(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def lines(rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


@pytest.fixture
def answer(model, tmp_path, digests):
    """Requests → replies, as values."""

    def run(rows, destination="replies.jsonl", **how):
        source = tmp_path / "requests.jsonl"
        source.write_bytes(rows if isinstance(rows, bytes) else lines(rows))
        run.progress = answer_file(model, PROCESSOR, source, tmp_path / destination, **how)
        return [json.loads(line) for line in (tmp_path / destination).read_bytes().splitlines()]

    return run


def alone(request, **how):
    """What the fake answers to one request."""
    tokens, tiles = PROCESSOR.prompt(request["messages"], tools=request.get("tools", ()))
    settings = {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "top_k": None, "seed": 0, **how}
    row = Digests()(tokens, tiles=tiles, stop_ids=TOKENIZER.stop_ids, **settings)
    return TOKENIZER.decode([token for (token,) in row if token != EOT])


def png(value, size=28):
    data = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(data, "PNG")
    return data.getvalue()


def test_replies_stand_in_the_order_of_the_requests_as_openai_has_them(answer, digests):
    plain, around = asks("one"), {"custom_id": "b", "method": "POST", "url": "/v1", "body": asks("two", max_tokens=4)}
    replies = answer([plain, around, b"", asks("three", id=7), asks("four")], batch_size=3)
    usage = [{"prompt_tokens": len(PROCESSOR.prompt(asks(words)["messages"]).tokens), "completion_tokens": count}
             for words, count in (("one", 11), ("two", 4), ("three", 11), ("four", 11))]  # fmt: skip
    content = [alone(asks("one")), alone(asks("two"))[:3], alone(asks("three")), alone(asks("four"))]
    for reply in replies:
        assert len(reply.pop("request")) == 12
    assert replies == [
        {"line": line, **named, "message": {"role": "assistant", "content": text}, "finish_reason": reason,
         "usage": used}
        for line, named, text, reason, used in zip(
            (1, 2, 4, 5), ({}, {"custom_id": "b"}, {"custom_id": 7}, {}), content, ("stop", "length", "stop", "stop"),
            usage, strict=True,
        )
    ]  # fmt: skip
    assert answer.progress == Progress(done=4, earlier=0, errors=0)
    assert [asked[0] for asked in digests.asked] == [512, 4, 512, 512]


def test_every_request_is_sampled_as_it_says(answer, digests):
    answer([*[asks(str(i), temperature=1, top_p=0.5, top_k=3.0) for i in range(2)], asks("x", seed=4), asks("y")],
           max_new_tokens=20, seed=7)  # fmt: skip
    alike = [(20, 1.0, 0.5, 3, 7 + line) for line in (1, 2)]
    assert digests.asked == [*alike, (20, 0.0, 1.0, None, 4), (20, 0.0, 1.0, None, 7 + 4)]


def test_equal_requests_draw_other_numbers_on_every_line(answer):
    replies = answer([asks("Dice?", temperature=1)] * 9, batch_size=4)
    assert len({reply["message"]["content"] for reply in replies}) == 9
    same = answer([asks("Dice?", temperature=1, seed=5)] * 2, "same.jsonl")  # but with one seed the same
    assert same[0]["message"] == same[1]["message"]


def test_pictures_come_from_beside_the_file_or_from_the_line(answer, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(3))
    monkeypatch.chdir("/")
    url = "data:image/png;base64," + base64.b64encode(png(3)).decode()
    content = [
        [{"type": "image", "path": "a.png"}, "What?"],
        [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}],
        [{"type": "image", "path": str(tmp_path / "a.png")}, "What?"],
    ]
    replies = answer([asks(parts) for parts in content])
    picture = np.full((28, 28, 3), 3, np.uint8)
    expected = alone(asks([{"type": "image", "image": picture}, "What?"]))
    assert [reply["message"]["content"] for reply in replies] == [expected] * 3


def test_calls_are_given_as_openai_gives_them(answer, digests):
    digests.script = {"now?": 'Wait: [get_time(city="Oslo"), get_time(city="東京")]', "then?": "[get_time(city=Oslo)]"}
    rows = [asks("now?", tools=[TIME]), asks("now?"), asks("then?", tools=[TIME]), asks("now?", tools=[TIME], n=1)]
    call, text, broken, again = answer(rows)
    calls = [
        {"id": f"call_1_{i}", "type": "function", "function": {"name": "get_time", "arguments": arguments}}
        for i, arguments in enumerate(['{"city": "Oslo"}', '{"city": "東京"}'])
    ]
    assert call["message"] == {"role": "assistant", "content": "Wait: ", "tool_calls": calls}
    assert (call["finish_reason"], again["finish_reason"]) == ("tool_calls", "tool_calls")
    assert text["message"] == {"role": "assistant", "content": digests.script["now?"]}  # it was given no tools
    assert (broken["finish_reason"], broken["message"]["content"]) == ("stop", "[get_time(city=Oslo)]")
    assert "what looks like a call of a tool cannot be read: 'Oslo' is no literal" in broken["problem"]
    assert not {"problem"} & (call.keys() | text.keys())
    # and what it said can be a part of the next request
    answered = {"role": "tool", "tool_call_id": "call_1_0", "content": "23:00"}
    assert "message" in answer([asks("hi") | {"messages": [*rows[0]["messages"], call["message"], answered]}], "b")[0]


BAD = {
    b'{"messages": ': "no valid JSON: Expecting value: line 1 column 14",
    b'{"a": "\xff"}': "no valid JSON: 'utf-8' codec can't decode byte 0xff",
    b"[" * 100_000: "no valid JSON: ",
    b'"hello"': "a request should be a JSON object, and this is 'hello'.",
    b"[]": "a request should be a JSON object, and this is [].",
    b"{}": "it has no messages, but nothing.",
    b'{"prompt": "x"}': "'prompt' is not known: a request may have messages, tools, max_tokens",
    b'{"body": 3}': "body should be a JSON object, and is 3.",
    b'{"body": {"messages": []}, "temperature": 1}': "'temperature' is not known: what stands around a body may have",
    b'{"messages": "hi"}': "messages should be a list of messages, and is 'hi'.",
    b'{"messages": []}': "messages is empty",
    b'{"messages": [{"role": "wizard", "content": "x"}]}': "messages[0].role should be one of system,",
    b'{"messages": [{"role": "user", "content": 5}]}': "messages[0].content should be a string or a list of parts",
    json.dumps(asks([{"type": "image", "path": "no.png"}])).encode(): "messages[0].content[0]: there is no picture",
    json.dumps(asks([{"type": "image", "path": "requests.jsonl"}])).encode(): "content[0] is not a picture that can",
    json.dumps(asks(["x", {"type": "image"}])).encode(): "messages[0].content[1] is the place of a picture, and there",
    json.dumps(asks([{"type": "image", "url": "https://x.y/z.png"}])).encode(): "nothing is fetched from the network",
    json.dumps(asks("x", tools={"name": "f"})).encode(): "tools should be a list of tools, and is {'name': 'f'}.",
    json.dumps(asks("x", tools=[{"name": "f", "parameters": []}])).encode(): "tools[0].parameters should be a JSON",
    json.dumps(asks("x", tools="")).encode(): "tools should be a list of tools, and is ''.",
    json.dumps(asks("x", stop=["a"])).encode(): "stop is ['a'], and only [] is supported here.",
    json.dumps(asks("x", logprobs=True)).encode(): "logprobs is True, and only false is supported here.",
    json.dumps(asks("x", frequency_penalty=False)).encode(): "frequency_penalty is False, and only 0 is supported",
    json.dumps(asks("x", guided_regex="a")).encode(): "'guided_regex' is not known",
    json.dumps(asks("x", n=2)).encode(): "n is 2, and there is one reply to a line",
    json.dumps(asks("x", temperature="hot")).encode(): "temperature should be a number, and is 'hot'.",
    json.dumps(asks("x", temperature=-1)).encode(): "temperature must be 0 (the most likely token) or a positive",
    json.dumps(asks("x", temperature=10**400)).encode(): "temperature should be a number, and is an integer of more",
    json.dumps(asks("x", top_p=float("nan"))).encode(): "top_p should be a number, and is nan.",
    json.dumps(asks("x", top_p=2)).encode(): "top_p must be above 0 and at most 1 (every token), got 2.0.",
    json.dumps(asks("x", top_k=1.5)).encode(): "top_k should be a whole number, and is 1.5.",
    json.dumps(asks("x", top_k=10**12)).encode(): "top_k must be below 2147483648, got 1000000000000.",
    json.dumps(asks("x", seed=float("inf"))).encode(): "seed should be a whole number, and is inf.",
    json.dumps(asks("x", seed=-1)).encode(): "seed must be from 0 to 2147483647, got -1.",
    json.dumps(asks("x", max_tokens=True)).encode(): "max_tokens should be a whole number, and is True.",
    json.dumps(asks("x", max_completion_tokens=0)).encode(): "max_completion_tokens must be at least 1, got 0.",
    json.dumps(asks("x", custom_id=float("nan"))).encode(): "custom_id holds what JSON cannot: ",
    json.dumps(asks("x", custom_id=[[float("inf")]])).encode(): "custom_id holds what JSON cannot: ",
    b'{"custom_id": ' + b"[" * 40 + b"]" * 40 + b"}": "custom_id nests deeper than 32 lists and dicts.",
    json.dumps(asks("x" * 3000)).encode(): "tokens, and with 512 new ones it exceeds the model's context_length",
    json.dumps(asks("x", max_tokens=3000)).encode(): "with 3000 new ones it exceeds the model's context_length of 2048",
}


def test_each_bad_line_gets_one_error_and_the_others_are_answered(answer):
    rows = [row for bad in BAD for row in (asks("good"), bad)]
    replies = answer(rows, batch_size=7)
    assert answer.progress == Progress(done=2 * len(BAD), earlier=0, errors=len(BAD))
    for number, (reply, words) in enumerate(zip(replies[1::2], BAD.values(), strict=True), 1):
        assert reply.keys() == {"line", "error", "request"}
        assert reply["error"].startswith(f"line {2 * number}: ") and words in reply["error"]
        assert len(reply["error"]) < 500
    assert [reply["message"]["content"] for reply in replies[::2]] == [alone(asks("good"))] * len(BAD)


@pytest.mark.parametrize("how", ["absolute", "..", "url", "link", "linked folder"])
def test_a_request_opens_no_file_outside_its_folder_and_shows_none(model, digests, tmp_path, how):
    folder, outside = tmp_path / "in", tmp_path / "outside"
    folder.mkdir(), outside.mkdir()
    (outside / "secret").write_text("TOPSECRET")
    (outside / "a.png").write_bytes(png(1))
    (folder / "link.png").symlink_to(outside / "a.png")
    (folder / "linked").symlink_to(outside)
    (folder / "b.png").symlink_to(folder / "c.png")
    (folder / "c.png").write_bytes(png(2))
    path = {
        "absolute": f"{outside}/a.png", "..": "../outside/a.png", "url": f"file://{outside}/a.png", "link": "link.png",
        "linked folder": "linked/a.png",
    }[how]  # fmt: skip
    asked = [path, path.replace("a.png", "secret"), path.replace("a.png", "gone.png"), "b.png", f"{folder}/c.png"]
    rows = [asks([{"type": "image", "path": one}, "What?"]) for one in asked]
    source, destination = folder / "requests.jsonl", folder / "replies.jsonl"
    source.write_bytes(lines(rows))
    answer_file(model, PROCESSOR, source, destination)
    replies = [json.loads(line) for line in destination.read_text().splitlines()]
    assert "leads out of the folder" in replies[0]["error"] and "--images-under DIR" in replies[0]["error"]
    assert "TOPSECRET" not in destination.read_text()
    if how != "link":  # whether a file is there is not told either
        assert ["leads out" in reply["error"] for reply in replies[:3]] == [True] * 3
    assert [reply["message"]["content"] for reply in replies[3:]] == [replies[3]["message"]["content"]] * 2
    destination.unlink()
    answer_file(model, PROCESSOR, source, destination, images_under=tmp_path)  # which has them all
    replies = [json.loads(line) for line in destination.read_text().splitlines()]
    assert "error" not in replies[0] and "TOPSECRET" not in destination.read_text()


def test_null_is_as_good_as_nothing(answer, digests):
    fields = ("tools", "temperature", "top_k", "seed", "max_tokens", "stop", "response_format", "n", "custom_id")
    (reply,) = answer([asks("x", **dict.fromkeys(fields))])
    assert reply["message"]["content"] == alone(asks("x")) and "custom_id" not in reply


def test_what_clients_write_although_it_is_the_default_is_taken(answer):
    said = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "tool_choice": "auto",
            "parallel_tool_calls": True, "response_format": {"type": "text"}, "stop": [], "n": 1, "stream": False,
            "store": False, "metadata": {"a": "b"}, "user": "me", "model": "any"}  # fmt: skip
    (reply,) = answer([asks("x", **said)])
    assert reply["message"]["content"] == alone(asks("x"))


def test_an_id_of_half_a_character_stops_nothing(answer):
    first, second = answer([asks("\ud83d", custom_id="\ud800"), asks("x")])
    assert first["custom_id"] == "\ufffd" and "message" in second


def test_a_run_killed_at_any_byte_goes_on_to_the_same_file(answer, tmp_path, digests):
    rows = [
        asks("one", temperature=0.7), asks("two", temperature=0.7), b"no request", asks("three", temperature=0.7),
        asks("four", temperature=0.7, seed=5), asks("five", max_tokens=2), asks("six", custom_id="ü"),
        *[asks(f"{i}", temperature=1.0) for i in range(8)],
    ]  # fmt: skip
    answer(rows, batch_size=3)
    path = tmp_path / "replies.jsonl"
    whole = path.read_bytes()
    assert len({json.loads(line).get("message", {}).get("content") for line in whole.splitlines()}) == len(rows)
    for size in (*range(0, len(whole), 29), len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        answer(rows, batch_size=3)
        assert path.read_bytes() == whole
        before = whole[:size].count(b"\n")
        assert answer.progress == Progress(done=len(rows) - before, earlier=before, errors=1)
    digests.asked.clear()
    answer(rows, batch_size=3)
    assert digests.asked == []  # nothing was left to do


def test_what_is_answered_is_not_opened_again(answer, tmp_path):
    (tmp_path / "a.png").write_bytes(png(3))
    rows = [asks([{"type": "image", "path": "a.png"}]), asks("x"), asks("y")]
    answer(rows, batch_size=1)
    whole = (tmp_path / "replies.jsonl").read_bytes()
    (tmp_path / "replies.jsonl").write_bytes(whole[:-1])
    (tmp_path / "a.png").unlink()
    answer(rows, batch_size=1)
    assert (tmp_path / "replies.jsonl").read_bytes() == whole


def test_a_file_of_requests_may_grow_but_not_change(answer, tmp_path):
    rows = [asks("one"), asks("two")]
    first = answer(rows)
    assert answer([*rows, asks("three")])[:2] == first
    assert answer.progress == Progress(done=1, earlier=2, errors=0)
    content = (tmp_path / "replies.jsonl").read_bytes()
    for changed, how, line in [
        ([asks("one"), asks("2")], {}, 2),
        ([asks("two"), asks("one")], {}, 1),
        ([asks("one")], {}, 2),
        ([*rows, asks("three")], {"temperature": 0.5}, 1),
        ([*rows, asks("three")], {"max_new_tokens": 5}, 1),
    ]:
        message = rf"replies.jsonl, line {line} answers line {line} of the requests as it was, or under other settings"
        with pytest.raises(ValueError, match=message):
            answer(changed, **how)
    assert (tmp_path / "replies.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"some text",
        b"{}",
        b"3",
        b"\xff",
        b'{"line": 1}',
        b'{"line": [1], "request": "x"}',
        b'{"line": "x", "request": 3}',
        b'{"line": null, "request": null}',
    ],
)
def test_a_file_of_something_else_is_not_written_to(answer, tmp_path, content):
    content += b"\n"
    (tmp_path / "replies.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"line 1 is no reply of this command: give another --out, or remove it."):
        answer([asks("x")])
    assert (tmp_path / "replies.jsonl").read_bytes() == content


def test_requests_cannot_be_their_own_replies(answer, tmp_path):
    with pytest.raises(ValueError, match="line 1 is no reply"):
        answer([asks("x")], "requests.jsonl")
    assert (tmp_path / "requests.jsonl").read_bytes() == lines([asks("x")])


def test_no_requests_have_no_replies(answer):
    assert answer(b"") == answer(b"\n \r\n") == []
    assert answer.progress == Progress(0, 0, 0)


def test_what_does_not_serve_is_said_before_anything_is_asked(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EngineCore", None)
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines([asks("x")]))
    for here, there, how, kind, message in [
        (tmp_path / "none", tmp_path / "out", {}, FileNotFoundError, "no such file of requests: .*none"),
        (source, tmp_path / "a" / "out", {}, FileNotFoundError, "out cannot be written: there is no directory .*/a"),
        (source, tmp_path, {}, ValueError, "cannot be written: it is no file."),
        (source, tmp_path / "out", {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0."),
        (source, tmp_path / "out", {"top_p": 0.0}, ValueError, "top_p must be above 0"),
        (source, tmp_path / "out", {"seed": -3}, ValueError, "seed must be from 0 to 2147483647, got -3"),
    ]:
        with pytest.raises(kind, match=message):
            answer_file(model, PROCESSOR, here, there, **how)
    assert not (tmp_path / "out").exists()


def test_progress_is_reported_when_replies_are_written(answer, digests):
    digests.script = {"long": "long" * 20, "short": "short"}
    seen = []
    answer([asks("long"), b"x", asks("short"), asks("long")], batch_size=1, report=seen.append)
    assert seen == [Progress(3, 0, 1), Progress(4, 0, 1)]  # in order: those after a long reply wait for it


def test_a_real_model_answers_as_generate_does_and_goes_on_where_it_stopped(tmp_path):
    model = picture_model()
    (tmp_path / "a.png").write_bytes(png(90))
    (tmp_path / "b.png").write_bytes(png(200, size=40))
    picture = [{"type": "image", "path": "a.png"}, {"type": "image", "path": "b.png"}, "Which?"]
    rows = [asks("Hello"), b"bad", asks(picture), asks("Now then"), asks("Good bye")]
    (tmp_path / "in.jsonl").write_bytes(lines(rows))
    how = {"batch_size": 8, "temperature": 0.9, "max_new_tokens": 6, "seed": 2}
    out = tmp_path / "out.jsonl"
    answer_file(model, PROCESSOR, tmp_path / "in.jsonl", out, **how)
    whole = out.read_bytes()
    good = [asks("Hello"), asks([{**part, "path": tmp_path / part["path"]} if isinstance(part, dict) else part
                                 for part in picture]), *rows[3:]]  # fmt: skip
    prompts = [PROCESSOR.prompt(request["messages"]) for request in good]
    expected = [
        generate(
            model, [prompt.tokens], images=[prompt.tiles], stop_ids=TOKENIZER.stop_ids, max_new_tokens=6,
            temperature=0.9, seed=2 + line,
        )[0]
        for line, prompt in zip((1, 3, 4, 5), prompts, strict=True)
    ]  # fmt: skip
    replies = [json.loads(line) for line in whole.splitlines()]
    texts = [TOKENIZER.decode([t for t in row if t not in TOKENIZER.stop_ids]) for row in expected]
    assert [replies[i]["message"]["content"] for i in (0, 2, 3, 4)] == texts
    for size in (0, whole.index(b"\n") + 40, len(whole) - 5):
        out.write_bytes(whole[:size])
        answer_file(model, PROCESSOR, tmp_path / "in.jsonl", out, **how)
        assert out.read_bytes() == whole


FIELDS = [
    "messages",
    "body",
    "custom_id",
    "id",
    "tools",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "max_tokens",
    "n",
    "x",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(asks("hi")["messages"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5), st.integers(0, 10**6), st.binary(max_size=3))
def test_any_line_is_a_request_or_one_short_error_and_its_reply_is_json(row, place, damage):
    line = json.dumps(row).encode()
    for one in (line, line[: place % (len(line) + 1)] + damage + line[place % (len(line) + 1) :]):
        request = module._read(1, one, module._DEFAULTS)
        json.dumps(request.custom_id, allow_nan=False)
        assert request.error is None or 0 < len(request.error) < 500
        if request.error is None:
            check_sampling(**{**request.sampling, "seed": request.sampling["seed"] or 0})

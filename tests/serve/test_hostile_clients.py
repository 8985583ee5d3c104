"""Whatever a client does, or stops doing, it costs little, ends, and harms nobody else."""

import base64
import contextlib
import io
import json
import socket
import time

import openai
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from micro_run import picture_processor
from PIL import Image
from serving import MODEL, USER, crowd, serving, wait_until

from llama4_jax.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

CHAT = "/v1/chat/completions"
PATHS = [CHAT, "/v1/completions", "/tokenize", "/detokenize"]
FIELDS = [
    *dict.fromkeys(name for of in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
                   for name in of.__struct_fields__ if name != "model"),
    "store", "metadata", "functions", "best_of", "suffix", "type", "content", "role", "url", "name", "parameters",
    "image_url", "properties", "tool_calls", "tool_call_id", "arguments", "json_schema", "schema", "unknown",
]  # fmt: skip


def error_of(answer):
    status, _, body = answer
    return status, json.loads(body)["error"]


def raw_status(connection):
    """Of an answer to bytes that no client would send; None if the connection was closed without one."""
    data = connection.recv(65536)
    return int(data.split()[1]) if data else None


@pytest.fixture(scope="module")
def server():
    with serving(limits={"body_bytes": 20_000, "all_bodies_bytes": 50_000, "body_seconds": 1.0, "header_seconds": 1.0},
                 script="fine") as found:  # fmt: skip
        yield found


@pytest.fixture(autouse=True)
def all_is_well_afterwards(request):
    yield
    if "server" in request.fixturenames:
        found = request.getfixturevalue("server")
        assert found.chat().choices[0].message.content == "fine"
        assert wait_until(lambda: found.server.active == 0 and found.server.bodies == 0 and found.idle())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny"', b'{"messages": [' + b"[" * 9000, b"1" * 9000,
     b'{"messages": 1, "messages": 2}', b'{"temperature": NaN}', b'{"seed": 1e400}', b'{"user": "\\ud800"}',
     b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", "json_schema": '
     b'{"name": "x", "schema": ' + b'{"a":' * 800 + b"1" + b"}" * 803,
     b'{"n": ' + b"9" * 5000 + b"}", b'{"' + b"x" * 9000 + b'": 1}', b'{"messages": [{"role": "user", "content": "'],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_what_is_no_request_is_a_400_in_openais_form(server, body):
    status, error = error_of(server.request("POST", CHAT, body))
    assert status == 400 and error["type"] == "invalid_request_error" and len(error["message"]) <= 520
    assert error["message"].isprintable()


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=6), st.just("\ud800"),
        st.sampled_from(["auto", "function", "text", "json_schema", "user", "tool", "data:;base64,AA==", "/a"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.sampled_from(FIELDS), inner),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.booleans())
def test_whatever_is_asked_is_answered_or_refused_by_name(server, path, fields, complete):
    body = {"max_tokens": 2, **({"messages": USER} if "chat" in path else {"prompt": "a"})} if complete else {}
    status, headers, answer = server.request("POST", path, json.dumps(body | fields).encode())
    assert status in (200, 400, 404, 413), answer
    if status != 200:
        error = json.loads(answer)["error"]
        assert error["message"] and len(error["message"]) <= 520 and "Traceback" not in error["message"]
        assert error["param"] or error["message"].startswith("the request"), error
    elif headers["content-type"].startswith("application/json"):
        json.loads(answer)
    else:
        assert answer.endswith(b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def usual():
    """With the limits that a user's server has."""
    with serving(script="fine", processor=picture_processor()) as found:
        yield found


def said_with(schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    return {"messages": USER, "response_format": form}


def bomb(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


CALLS = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in range(4000)]
RESULTS = [{"role": "tool", "tool_call_id": call["id"], "content": "x" * 9} for call in reversed(CALLS)]
OPTIONAL = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}
LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
TOOLS = [{"type": "function", "function": {"name": f"f{i}", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"enum": ["x" * 990]}}}}} for i in range(120)]  # fmt: skip
TOLD_AT_LENGTH = [{"type": "function", "function": {"name": "f", "description": "x" * 10**6}}]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {"messages": [{}] * 10_001}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 10_001}]}, 400,
         "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 3_000_000}]}, 413, "messages"),
        (CHAT, {"messages": USER, "tools": TOLD_AT_LENGTH}, 413, "messages"),
        ("/tokenize", {"prompt": "x" * 3_000_000}, 413, "prompt"),
        ("/v1/completions", {"prompt": "x" * 3_000_000}, 413, "prompt"),
        ("/v1/completions", {"prompt": ["x"] * 500_000}, 400, "prompt"),
        ("/v1/completions", {"prompt": [[1]] * 100_000}, 400, "prompt"),
        (CHAT, {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": CALLS}, *RESULTS]}, 413,
         "messages"),
        (CHAT, b'{"messages":[' + b'{"a":1},' * 200_000 + b"{}]}", 413, None),
        (CHAT, b'{"prompt":[' + b"1," * 1_000_001 + b"1]}", 413, None),
        (CHAT, {"messages": USER, "logit_bias": {str(i): 1 for i in range(100_000)}}, 400, "logit_bias"),
        (CHAT, {"messages": USER, "stop": ["a"] * 100_000}, 400, "stop"),
        (CHAT, {"messages": USER, "x" * 1_000_000: 1}, 400, None),
        (CHAT, said_with({"$ref": "#"}), 400, "response_format"),
        (CHAT, said_with(LOOP), 400, "response_format"),
        (CHAT, said_with({"$ref": "http://127.0.0.1:1/x"}), 400, "response_format"),
        (CHAT, said_with({"$ref": "file:///etc/passwd"}), 400, "response_format"),
        (CHAT, said_with({"type": "integer", "multipleOf": 999_999_937}), 400, "response_format"),
        (CHAT, said_with({"type": "integer", "minimum": 10**300}), 400, "response_format"),
        (CHAT, said_with(OPTIONAL), 400, "response_format"),
        (CHAT, said_with({"const": "x" * 10_001}), 400, "response_format"),
        (CHAT, said_with({"enum": [f"value {i}" for i in range(100_000)]}), 400, "response_format"),
        (CHAT, said_with({"type": "string", "pattern": "(a)\\1"}), 400, "response_format"),
        (CHAT, {"messages": USER, "tools": TOOLS}, 413, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": bomb(20_000)}}]}]},
         400, "messages[0].content[0]"),
    ],
    ids=lambda x: str(x)[:60] if isinstance(x, dict | bytes) else str(x),
)  # fmt: skip
def test_what_is_made_to_be_expensive_is_refused_before_it_is(usual, path, body, status, param):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    began = time.monotonic()
    found, error = error_of(usual.request("POST", path, data))
    assert found == status and (error["param"] == param or param is None), error
    assert time.monotonic() - began < 5  # of a busy machine; each took minutes, or was an error of the server, before
    assert len(error["message"]) <= 520
    assert usual.chat().choices[0].message.content == "fine"


@pytest.mark.parametrize(
    "pattern",
    ["^((((a{1,99}){1,99}){1,99}){1,99})$", "^(a+)+$", ".*a.{500}", "|".join("ab" * i for i in range(1, 90))],
)
def test_patterns_that_blow_up_elsewhere_take_no_time(usual, pattern):
    began = time.monotonic()
    status, _, answer = usual.request(
        "POST", CHAT, {**said_with({"type": "string", "pattern": pattern}), "max_tokens": 20}
    )
    assert status == 200, answer
    assert time.monotonic() - began < 5


def test_one_connection_too_many_is_told_so_and_the_others_go_on():
    with serving(script="fine", limits={"connections": 20}) as found:
        assert found.chat().choices[0].message.content == "fine"
        found.client.close()
        idle = [found.connect() for _ in range(20)]
        for connection in [found.connect() for _ in range(50)]:
            with connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in head
                assert json.loads(body)["error"]["code"] == "too_many"
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw_status(idle[0]) == 200
        for connection in idle:
            connection.close()
        assert wait_until(lambda: found.request("GET", "/health")[0] == 200)


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00", b"GET / \r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_http_is_a_400_in_openais_form(usual, head):
    with usual.connect() as connection:
        connection.sendall(head + b"\r\n\r\n")
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 400"), answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_no_path_leads_to_where_a_host_header_says(usual):
    status, headers, _ = usual.request("POST", CHAT + "/", b"{}")
    assert status == 404 and "location" not in headers


def test_a_body_is_bounded_whether_it_says_its_size_or_not(server):
    status, error = error_of(server.request("POST", CHAT, b" " * 20_001))
    assert status == 413 and "20,000" in error["message"]
    with server.connect() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):
            connection.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
        assert raw_status(connection) == 413


def test_a_body_that_comes_slowly_is_a_408(server):
    with server.connect() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode())
        began = time.monotonic()
        assert raw_status(connection) == 408
        assert time.monotonic() - began < 5


def test_headers_that_come_slowly_or_never_end_the_connection(server):
    for head in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-"):
        with server.connect() as connection:
            connection.sendall(head)
            began = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
            assert time.monotonic() - began < 5


def test_headers_are_bounded(server):
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 200_000 + b"\r\n\r\n")
        assert raw_status(connection) in (400, 431)


def test_all_bodies_together_are_bounded(server):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n".encode()
    connections = [server.connect() for _ in range(4)]
    for connection in connections:
        connection.sendall(head + b" " * 19_000)
    assert sorted(raw_status(connection) for connection in connections)[-1] == 429
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403), ({"Host": "localhost.evil.example:80"}, 403), ({"Host": ""}, 403),
        ({"Host": "localhost:8000"}, 200), ({"Host": "127.0.0.1"}, 200), ({"Host": "[::1]:80"}, 200),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403), ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
    ],
)  # fmt: skip
def test_pages_of_other_sites_cannot_ask(server, headers, status):
    """Neither by a name of theirs that leads here, nor by a request that a browser sends without asking."""
    found, answered, _ = server.request("POST", "/tokenize", {"prompt": "a"}, **headers)
    assert found == status and "access-control-allow-origin" not in answered


def test_a_name_that_a_proxy_passes_on_may_be_allowed():
    with serving(script="fine", settings={"hosts": ("Models.example",)}) as found:
        assert found.request("GET", "/v1/models", Host="models.example:443")[0] == 200
        assert found.request("GET", "/v1/models", Host="other.example")[0] == 403


def test_unknown_paths_and_methods_are_answered_in_openais_form(server):
    assert error_of(server.request("GET", "/v2/../etc/passwd"))[0] == 404
    assert error_of(server.request("GET", CHAT))[0] == 405
    assert error_of(server.request("DELETE", "/v1/models"))[0] == 405


@pytest.mark.parametrize("when", ["decoding", "waiting"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(when, stream):
    with serving(slots=1, delay=0.01) as found:
        if when == "waiting":
            other = found.post(CHAT, {"messages": USER, "stream": True})
            assert wait_until(lambda: found.engine.stats.running == 1)
        connection = found.post(CHAT, {"messages": USER, "stream": stream, "n": 2})
        assert wait_until(lambda: found.engine.stats.waiting == (2 if when == "waiting" else 1))
        connection.close()
        assert wait_until(lambda: found.engine.stats.waiting == 0)
        gone = found.engine.requests[-2:]
        assert wait_until(lambda: all(one.finish_reason == "cancelled" for one in gone))
        if when == "waiting":
            assert found.engine.stats.running == 1  # the other goes on
            other.close()
        assert found.idle()


def test_a_client_that_does_not_read_loses_its_stream_and_nobody_else():
    with serving(slots=2, context=200_000, delay=0.0, limits={"send_seconds": 0.5}, tokens_a_call=50) as found:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", found.port))
        body = json.dumps({"messages": USER, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert wait_until(lambda: found.engine.requests and found.engine.requests[0].finish_reason == "cancelled", 10)
        assert len(found.engine.requests[0].written) < 150_000
        assert wait_until(lambda: found.server.active == 0)
        assert found.chat(max_tokens=5).usage.completion_tokens == 5
        assert b'llama4:slow_readers_total{model_name="tiny"} 1.0' in found.request("GET", "/metrics")[2]
        connection.close()


def test_a_key_is_asked_for_everywhere_but_where_none_is_needed(tmp_path):
    with serving(script="fine", settings={"api_keys": ("first-key", "zweiter-schlüssel")}) as found:
        for key in ("wrong", "first-ke", "first-key2", ""):
            with pytest.raises(openai.AuthenticationError) as error:
                found.client.with_options(api_key=key or "-").models.list()
            assert error.value.code == "invalid_api_key"
        assert found.client.with_options(api_key="first-key").models.list().data
        for path in ("/v1/models", "/metrics"):
            status, headers, _ = found.request("GET", path)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
        for path in ("/", "/health", "/ready"):
            assert found.request("GET", path)[0] == 200
        assert found.request("POST", "/tokenize", b"x" * 1000, Authorization="Basic first-key")[0] == 401


def test_pictures_of_one_folder_alone_are_opened(tmp_path):
    inside, outside = tmp_path / "pictures", tmp_path / "secret"
    inside.mkdir()
    outside.mkdir()
    Image.new("RGB", (28, 28), "blue").save(inside / "a.png")
    Image.new("RGB", (28, 28), "red").save(outside / "b.png")
    (inside / "link.png").symlink_to(outside / "b.png")
    with serving(script="fine", processor=picture_processor(), settings={"images_under": inside}) as found:

        def ask(url):
            content = [{"type": "image_url", "image_url": {"url": url}}]
            return found.chat(messages=[{"role": "user", "content": content}])

        for url in ("a.png", str(inside / "a.png"), (inside / "a.png").as_uri()):
            assert ask(url).choices[0].message.content == "fine"
            assert (found.engine.requests[-1].asked["tiles"] == [0, 0, 255]).all()
        for url in ("../secret/b.png", str(outside / "b.png"), "link.png", (outside / "b.png").as_uri(),
                    "/etc/passwd", "nothing.png", "..", ".", "http://localhost/a.png", "gs://bucket/a.png",
                    "file://host/a.png", "a.png\0", "~/a.png"):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as error:
                ask(url)
            assert error.value.param.startswith("messages[0].content[0]"), error.value.body
            assert str(inside) not in error.value.message


def test_a_server_that_goes_down_ends_what_runs_and_takes_nothing_new():
    with serving(delay=0.01, slots=2) as found:
        stream = iter(found.chat(stream=True, max_tokens=150))
        next(stream)
        idle = found.connect()
        found.http.drain()
        with pytest.raises(openai.InternalServerError) as error:
            found.chat()
        assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "5"
        assert found.request("GET", "/ready")[0] == 503 and found.request("GET", "/health")[0] == 200
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        idle.close()


def test_what_does_not_end_in_the_time_for_it_is_cancelled():
    with serving(delay=0.01, drain_seconds=0.3) as found:
        stream = iter(found.chat(stream=True))
        next(stream)
        began = time.monotonic()
        found.http.drain()
        with contextlib.suppress(Exception):  # its connection ends
            list(stream)
        assert 0.3 < time.monotonic() - began < 8
        assert wait_until(lambda: found.engine.requests[-1].finish_reason == "cancelled")


def test_many_clients_of_whom_some_go_away_leave_nothing_behind():
    """200 at a time, on 8 slots; everyone who stays gets what the same request gets alone. On a real engine, and for
    longer: `test_real_engine.py`."""

    def ask(draw):
        seed = draw.randrange(10**6)
        return {"messages": USER, "seed": seed}, f"{seed} " * 20

    with serving(script=lambda handle: f"{handle.asked['seed']} " * 20, max_waiting=1000, tokens_a_call=20) as found:
        found.engine.keep_requests = False
        was = crowd(found, ask, clients=200, seconds=1.5, patience=0.02)
        assert not was.wrong, was.wrong[:3]
        assert was.answered > 200 and was.gone > 20
        assert found.idle() and wait_until(lambda: found.server.active == 0 and found.server.bodies == 0)
        assert wait_until(lambda: len(found.http.server_state.connections) <= 1, 8)
        assert was.grown < 30 * 2**20
        assert found.client.models.retrieve(MODEL).id == MODEL

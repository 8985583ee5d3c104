"""A server over an engine without a model, in a thread, on a free port."""

import contextlib
import dataclasses
import http.client
import json
import random
import re
import socket
import struct
import threading
import time

import openai
import psutil
from fake_engine import FakeEngine

from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.processor import Processor
from llama4_jax.serve.app import Server
from llama4_jax.serve.http import HttpServer, listening
from llama4_jax.serve.settings import Limits, Settings

MODEL = "tiny"
USER = [{"role": "user", "content": "hi"}]


class Serving:
    """- engine, server: what is behind it; port: where it listens"""

    def __init__(self, engine, server, http_server, port):
        self.engine, self.server, self.http, self.port = engine, server, http_server, port
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=15)

    def chat(self, **fields):
        return self.client.chat.completions.create(**{"model": MODEL, "messages": USER, **fields})

    def request(self, method, path, body=None, **headers):
        """Status, headers and body of an answer, without any client's help."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def post(self, path, body):
        """A connection on which that request was sent, and nothing read."""
        data = json.dumps(body).encode()
        connection = self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def idle(self, seconds=10.0):
        """Waits until nothing runs."""
        return wait_until(lambda: not (self.engine.stats.running or self.engine.stats.waiting), seconds)


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def serving(*, processor=None, engine=None, drain_seconds=5.0, limits=None, settings=None, **of_engine):
    """`settings`: fields of `Settings` beside the usual ones."""
    processor = processor or Processor(ByteTokenizer())
    engine = engine or FakeEngine(processor.tokenizer, **of_engine)
    settings = {"limits": Limits(**(limits or {})), **(settings or {})}
    server = Server(engine, processor, Settings(MODEL, engine.stats.context, 320, **settings))
    http_server = HttpServer(server, drain_seconds=drain_seconds)
    with listening("127.0.0.1", 0) as taken:
        thread = threading.Thread(target=http_server.run, args=([taken],))
        thread.start()
        try:
            yield Serving(engine, server, http_server, taken.getsockname()[1])
        finally:
            http_server.drain()
            thread.join(timeout=drain_seconds + 10)
            assert not thread.is_alive()
            engine.close()


@dataclasses.dataclass
class Crowd:
    """What became of many clients. `wrong`: (request, what it got); `grown`: bytes of memory, from a time when all
    clients had begun to the end."""

    answered: int = 0
    gone: int = 0
    wrong: list = dataclasses.field(default_factory=list)
    grown: int = 0


def crowd(found, ask, *, clients, seconds, patience, leaving=0.2):
    """As many clients at a time ask for so long, one request after another, half of them for streams.

    - ask: draws a request to the chat API, and the text that should come
    - leaving: the part of the requests whose client goes away before the end, after up to `patience` seconds
    """
    process, was, lock = psutil.Process(), Crowd(), threading.Lock()
    stop = time.monotonic() + seconds

    def client(number):
        draw = random.Random(number)
        while time.monotonic() < stop:
            body, wanted = ask(draw)
            body = {**body, "stream": draw.random() < 0.5}
            with found.post("/v1/chat/completions", body) as connection:
                connection.settimeout(120)
                if draw.random() < leaving:
                    time.sleep(draw.random() * patience)
                    if draw.random() < 0.5:  # by a reset
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    with lock:
                        was.gone += 1
                    continue
                got = _text_of(connection, body["stream"])
                with lock:
                    was.answered += 1
                    if got != wanted:
                        was.wrong.append((body, got))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)
    before = process.memory_info().rss
    for thread in threads:
        thread.join()
    was.grown = process.memory_info().rss - before
    return was


def _text_of(connection, stream):
    """What a reply says, or the whole answer where it is none."""
    data = b""
    while True:
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if b"data: [DONE]" in body or (length and len(body) >= int(length[1])):
            break
        more = connection.recv(65536)
        if not more:
            return data.decode()
        data += more
    if b" 200 OK" not in head:
        return data.decode()
    if not stream:
        return json.loads(body)["choices"][0]["message"]["content"]
    chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    if any("error" in chunk for chunk in chunks):
        return data.decode()
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

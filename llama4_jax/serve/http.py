"""Listening, and going down: what stands between a socket and the application.

uvicorn reads HTTP. What is added: a port is taken before anything expensive is done; headers must come in time; a
stalled connection can be cut; and a signal drains. The first SIGTERM or SIGINT makes the server refuse new requests
and end when those that run have ended, with exit code 0; a second one, or the time for draining being over, ends it at
once.
"""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import time
from http import HTTPStatus
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama4_jax.serve.answers import error_response
from llama4_jax.serve.app import Server
from llama4_jax.serve.protocol import ApiError

log = logging.getLogger(__name__)

_OTHER_FILES = 128  # that a process has open: of the model, libraries, devices


def listening(host: str, port: int) -> socket.socket:
    """A socket that has the port, and takes no connections yet. Raises OSError that says what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise OSError(f"--host {host}: this is no address to listen to: {error}.") from None
    taken = socket.socket(family, kind, protocol)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # Two servers may have bound a port with that option; only one can listen, so that it shows here.
        taken.listen(1)
    except OSError as error:
        taken.close()
        raise OSError(
            f"cannot listen to {host}:{port}: {error.strerror or error}. Stop what does, or give another --port."
        ) from None
    return taken


def most_connections(wanted: int) -> int:
    """How many connections this process may have, up to `wanted`: as many files may be open, if the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        wanted = max(1, min(wanted, soft - _OTHER_FILES))
    return wanted


def is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


class _Protocol(H11Protocol):
    """HTTP/1.1, with a limit for how long headers may take to come, and connections that can be cut. What is no HTTP,
    or one connection too many, is answered in OpenAI's form."""

    header_seconds, most_connections = 20.0, 2048
    _deadline: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.app_state = {**self.app_state, "abort": transport.abort}  # found in the scope of each request
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self._refuse()
        else:
            self._await_headers()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._deadline is None:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self.transport.write(_raw(ApiError(400, msg)))
        self.transport.close()

    def _refuse(self) -> None:
        """Answers before anything is asked. What a client sends meanwhile is read for a moment: to close at once would
        take the answer from it."""
        self._refused = True
        error = ApiError(503, "too many connections: try again.", code="too_many", headers={"Retry-After": "1"})
        self.transport.write(_raw(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(1.0, self.transport.abort)

    def _await_headers(self) -> None:
        self._deadline = self.loop.call_later(self.header_seconds, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _raw(error: ApiError) -> bytes:
    """An answer as it goes over the wire; the connection ends with it."""
    answer = error_response(error)
    headers = [*answer.raw_headers, (b"connection", b"close")]
    head = b"".join(b"%b: %b\r\n" % pair for pair in headers)
    return (
        b"HTTP/1.1 %d %b\r\n" % (error.status, HTTPStatus(error.status).phrase.encode()) + head + b"\r\n" + answer.body
    )


class HttpServer(uvicorn.Server):
    """Runs an application until a signal, or `drain`, and what is running then has ended.

    - drain_seconds: how long that may take
    """

    def __init__(self, server: Server, *, drain_seconds: float = 60.0):
        limits = server.settings.limits
        bounds = {"header_seconds": limits.header_seconds, "most_connections": limits.connections}
        protocol = type("Protocol", (_Protocol,), bounds)
        super().__init__(
            uvicorn.Config(
                server.app,
                http=protocol,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=64 * 1024,
                timeout_graceful_shutdown=2,
            )
        )
        self._server = server
        self._drain_seconds = drain_seconds
        self._drain_until: float | None = None

    def drain(self) -> None:
        """May be called from any thread."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._drain_seconds
            self._server.drain()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_until is None:
            name, active = signal.Signals(sig).name, self._server.active
            log.warning("%s: no new requests, and %d being answered", name, active)
            self.drain()
        else:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        over = self._drain_until is not None and (not self._server.active or time.monotonic() > self._drain_until)
        return await super().on_tick(counter) or over

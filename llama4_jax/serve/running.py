"""A request while the engine works on it: what comes from the engine's thread, and a client that may leave or not read.

Tokens come by `call_soon_threadsafe`. Whoever goes away is noticed by reading on from the connection, also where
nothing is streamed; whoever does not read, by how much waits for it, and for how long.
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from llama4_jax.infer.engine import Handle, Sampled
from llama4_jax.processor import Prompt
from llama4_jax.serve.grammar import Grammar
from llama4_jax.serve.metrics import Metrics
from llama4_jax.serve.reply import ReplyReader

log = logging.getLogger(__name__)


class Gone(Exception):
    """The client closed the connection."""


class TooSlow(Exception):
    """The client does not read."""


@dataclasses.dataclass
class Choice:
    """One reply, while it is written."""

    index: int
    prompt: Prompt
    handle: Handle
    reader: ReplyReader
    grammar: Grammar | None
    finish_reason: str | None = None
    tokens: int = 0
    first: float | None = None  # when its first token came
    last: float = 0.0


class Running:
    """What the engine's thread tells of a request's handles, for the loop.

    - most_unread: tokens that may wait to be read; beyond it the request is cancelled, and `too_slow`
    """

    def __init__(self, most_unread: int | None):
        self.handles: list[Handle] = []
        self.too_slow = False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, list[Sampled], str | None, BaseException | None]] = asyncio.Queue()
        self._unread, self._most_unread, self._lock = 0, most_unread, threading.Lock()

    def add(self, handle: Handle) -> None:
        index = len(self.handles)
        self.handles.append(handle)

        def hear(handle: Handle, tokens: list[Sampled]) -> None:  # in the engine's thread
            with self._lock:
                self._unread += len(tokens)
                over = self._most_unread is not None and self._unread > self._most_unread and not self.too_slow
                self.too_slow |= over
            with contextlib.suppress(RuntimeError):  # the loop is closed
                news = (index, list(tokens), handle.finish_reason, handle.error)
                self._loop.call_soon_threadsafe(self._queue.put_nowait, news)
                if over:
                    self._loop.call_soon_threadsafe(self.cancel)

        handle.listen(hear)

    async def next(self) -> tuple[int, list[Sampled], str | None, BaseException | None]:
        news = await self._queue.get()
        with self._lock:
            self._unread -= len(news[1])
        if self.too_slow:
            raise TooSlow
        return news

    def cancel(self) -> None:
        """Ends what has not ended. Harmless at any time."""
        for handle in self.handles:
            if handle.finish_reason is None:
                handle.cancel()


class EventStream(Response):
    """A stream of events to a client that may go away, or not read.

    - send_seconds: that it may read nothing
    """

    def __init__(self, events: AsyncIterator[bytes], running: Running, metrics: Metrics, send_seconds: float):
        super().__init__(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events, self._running, self._metrics, self._seconds = events, running, metrics, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def deliver(message: Message) -> None:
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                raise TooSlow from None

        async def write() -> None:
            await deliver({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await deliver({"type": "http.response.body", "body": event, "more_body": True})
            await deliver({"type": "http.response.body", "body": b"", "more_body": False})

        slow = True
        try:
            await while_there(receive, write())
            slow = False
        except Gone:
            self._metrics.gone.inc()
            slow = False
        except TooSlow:
            self._metrics.slow.inc()
            log.warning("a stream ended, as its client did not read it")
        except Exception:
            log.exception("a stream failed")
        finally:
            self._running.cancel()
            abort = scope.get("state", {}).get("abort")
            if slow and abort is not None:  # what it has not read would wait for it forever
                abort()


async def while_there(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work gives, unless the client goes away: then it is cancelled, and Gone raised."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)

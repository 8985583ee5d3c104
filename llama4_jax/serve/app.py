"""The HTTP side: OpenAI's API over an engine, as an ASGI application.

One asyncio loop does what is quick. What takes time on a CPU (reading pictures, cutting text into tokens, compiling a
grammar) runs in a few threads, and the model in the engine's own. Tokens come from there by `call_soon_threadsafe`, and
each request reads its own (`Running`).

Every request is a stranger's. Bodies, pictures, choices and times are bounded; nothing that a request names is opened,
but pictures in one folder if the user said so. Whoever goes away or does not read loses the slots that work for them,
at once, and nobody else notices.
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama4_jax.infer.engine import Engine, EngineDied, Full
from llama4_jax.processor import Processor
from llama4_jax.serve.answers import ChatWriter, CompletionWriter, error_response, event, json_response, usage_of
from llama4_jax.serve.gate import Gate, is_draining
from llama4_jax.serve.jobs import Job, Jobs
from llama4_jax.serve.metrics import Metrics
from llama4_jax.serve.protocol import ApiError, ChatRequest, CompletionRequest, bad_request, pictures_in
from llama4_jax.serve.reply import Piece, ReplyReader
from llama4_jax.serve.running import Choice, EventStream, Gone, Running, while_there
from llama4_jax.serve.settings import Settings
from llama4_jax.untrusted_json import shortened, shown

log = logging.getLogger(__name__)

_PAGE = Path(__file__).with_name("page.html")


class Server:
    """The application: `app` is what an ASGI server runs.

    - bodies: bytes of requests that are being read and prepared
    """

    def __init__(self, engine: Engine, processor: Processor, settings: Settings):
        self.engine, self.processor, self.settings = engine, processor, settings
        self.tokenizer = processor.tokenizer
        self.jobs = Jobs(processor, settings)
        self.metrics = Metrics(settings.model, lambda: engine.stats)
        self.created = int(time.time())
        self.bodies = 0
        self._text_threads, self._picture_threads = anyio.CapacityLimiter(4), anyio.CapacityLimiter(2)
        self._page, self._page_headers = _read_page()
        posts = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        gets = {
            "/": self._show_page,
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/v1/models": self._models,
            "/v1/models/{model:path}": self._model,
        }
        routes = [Route(path, self._answering(answer, path), methods=["POST"]) for path, answer in posts.items()]
        routes += [Route(path, self._answering(answer, path), methods=["GET"]) for path, answer in gets.items()]
        handlers = {404: self._no_such_path, 405: self._no_such_method}
        inner = Starlette(routes=routes, exception_handlers=handlers)
        inner.router.redirect_slashes = False  # to where a Host header says
        self.app = Gate(inner, settings, self.metrics)

    def drain(self) -> None:
        """From now on new requests are refused; those that run go on."""
        self.app.draining = True

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return self.app.active

    # What each path answers.

    async def _show_page(self, request: Request) -> Response:
        return Response(self._page, headers=self._page_headers, media_type="text/html")

    async def _health(self, request: Request) -> Response:
        if not self.engine.alive:
            raise ApiError(500, "the engine has died: start the server anew.")
        return json_response({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if not self.engine.alive:
            raise ApiError(500, "the engine has died: start the server anew.")
        if self.app.draining:
            raise is_draining()
        return json_response({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self.jobs.check_model(request.path_params["model"])
        return json_response(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "llama4-jax",
            "max_model_len": self.settings.context,
            "pictures": self.processor.pictures is not None,
        }

    async def _tokenize(self, request: Request) -> Response:
        async with self._body(request) as body:
            said = await self._in_thread(self.jobs.tokenized, body)
        return json_response(said)

    async def _detokenize(self, request: Request) -> Response:
        async with self._body(request) as body:
            said = await self._in_thread(self.jobs.detokenized, body)
        return json_response(said)

    async def _chat(self, request: Request) -> Response:
        began = time.monotonic()
        async with self._body(request) as body:
            asked, said = await self._in_thread(self.jobs.read_chat, body)
            # Pictures take longer, and wait for threads of their own.
            job = await self._in_thread(self.jobs.chat, asked, said, pictures=bool(pictures_in(said)))
        write = ChatWriter(self.tokenizer, self.settings.model, asked)
        return await self._answer(request, asked, job, write, began)

    async def _completions(self, request: Request) -> Response:
        began = time.monotonic()
        async with self._body(request) as body:
            asked, job = await self._in_thread(self.jobs.completions, body)
        return await self._answer(
            request, asked, job, CompletionWriter(self.tokenizer, self.settings.model, asked), began
        )

    def _start(self, job: Job, running: Running) -> list[Choice]:
        """Everything of a job is begun, or nothing of it."""
        choices = []
        try:
            for prompt, room, seeds in zip(job.prompts, job.new_tokens, job.seeds, strict=True):
                for seed in seeds:
                    grammar = job.grammar
                    if grammar is not None and choices:
                        grammar = grammar.again()
                    handle = self.engine.submit(
                        prompt.tokens,
                        tiles=prompt.tiles,
                        max_new_tokens=room,
                        seed=seed,
                        constraint=grammar,
                        **job.sampling,
                    )
                    reader = ReplyReader(self.tokenizer, stops=job.stops, tools=job.tools)
                    choices.append(Choice(len(choices), prompt, handle, reader, grammar))
                    running.add(handle)
        except BaseException as error:
            running.cancel()
            if isinstance(error, Full):
                raise ApiError(
                    429,
                    f"the queue of waiting requests is full: {shortened(str(error), 200)}",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                ) from None
            if isinstance(error, EngineDied):
                raise ApiError(500, "the engine has died: start the server anew.", code="engine_died") from None
            if isinstance(error, ValueError):
                raise bad_request(error) from None
            raise
        return choices

    async def _pieces(
        self, job: Job, running: Running, choices: list[Choice], began: float
    ) -> AsyncIterator[tuple[Choice, Piece]]:
        """What is certain of the choices, as it comes; `finish_reason` is set with the last piece of each."""
        left = len(choices)
        while left:
            index, tokens, reason, error = await running.next()
            choice = choices[index]
            if choice.finish_reason is not None:
                continue
            if error is not None:
                died = isinstance(error, EngineDied) or not self.engine.alive
                why = "the engine has died: start the server anew." if died else shortened(str(error), 200)
                raise ApiError(500, why, code="engine_died" if died else "engine_error")
            self._time(choice, len(tokens), began)
            if job.discard:
                piece = Piece()
                choice.finish_reason = "length" if reason is not None else None
            else:
                piece = choice.reader.feed(tokens)
                if choice.reader.stopped or reason is not None:
                    self._finish(choice, reason, piece)
            if choice.finish_reason is not None:
                left -= 1
                self._count(choice, began, job.discard)
            yield choice, piece

    def _finish(self, choice: Choice, reason: str | None, piece: Piece) -> None:
        rest = choice.reader.flush()
        piece.events += rest.events
        piece.tokens += rest.tokens
        if choice.grammar is not None and choice.grammar.problem is not None:
            raise ApiError(500, f"the reply could not go on as its format demands: {choice.grammar.problem}.")
        if choice.reader.stopped:
            if reason is None:
                choice.handle.cancel()
            reason = "stop"
        elif reason == "cancelled":
            raise ApiError(503, "the server is going down.", headers={"Retry-After": "5"})
        choice.finish_reason = "tool_calls" if reason == "stop" and choice.reader.calls else reason

    def _time(self, choice: Choice, count: int, began: float) -> None:
        if not count:
            return
        now = time.monotonic()
        if choice.first is None:
            choice.first = now
            self.metrics.first_token.observe(now - began)
        else:
            for _ in range(count):  # those of one call come together
                self.metrics.between_tokens.observe((now - choice.last) / count)
        choice.last = now

    def _count(self, choice: Choice, began: float, discard: bool) -> None:
        choice.tokens = 0 if discard else choice.reader.taken
        self.metrics.ended(choice.finish_reason)
        self.metrics.prompt_tokens.inc(len(choice.prompt.tokens))
        self.metrics.generated_tokens.inc(choice.tokens)
        self.metrics.prefix_queries.inc(len(choice.prompt.tokens))
        self.metrics.prefix_hits.inc(choice.handle.cached_tokens or 0)
        self.metrics.whole.observe(time.monotonic() - began)

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        job: Job,
        writer: "ChatWriter | CompletionWriter",
        began: float,
    ) -> Response:
        limits = self.settings.limits
        running = Running(limits.unread_tokens if asked.stream else None)
        choices = self._start(job, running)
        if asked.stream:
            events = self._events(asked, job, running, choices, writer, began)
            return EventStream(events, running, self.metrics, limits.send_seconds)

        async def whole() -> Response:
            async for choice, piece in self._pieces(job, running, choices, began):
                writer.keep(choice, piece)
            return json_response(writer.whole(choices))

        try:
            return await while_there(request.receive, whole())
        finally:
            running.cancel()

    async def _events(
        self,
        asked: ChatRequest | CompletionRequest,
        job: Job,
        running: Running,
        choices: list[Choice],
        writer: "ChatWriter | CompletionWriter",
        began: float,
    ) -> AsyncIterator[bytes]:
        """Server-sent events; an error on the way is one of them."""
        usage = asked.stream_options.include_usage
        try:
            for chunk in writer.begin(choices):
                yield event(chunk, usage)
            async for choice, piece in self._pieces(job, running, choices, began):
                for chunk in writer.chunks(choice, piece):
                    yield event(chunk, usage)
            if usage:
                yield event(writer.chunk([], usage_of(choices)), usage)
        except ApiError as error:
            yield event(error.as_json(), False)
        yield b"data: [DONE]\n\n"

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, within the bounds of one and of all; it counts until it has been prepared."""
        limits = self.settings.limits
        said = request.headers.get("content-length", "0")
        too_large = ApiError(
            413, f"a request may have {limits.body_bytes:,} bytes.", code="too_large", headers={"Connection": "close"}
        )
        if said.isdecimal() and int(said) > limits.body_bytes:
            raise too_large
        parts, held = [], 0
        try:
            try:
                async with asyncio.timeout(limits.body_seconds):
                    more = True
                    while more:
                        message = await request.receive()
                        if message["type"] == "http.disconnect":
                            raise Gone
                        part = message.get("body", b"")
                        held += len(part)
                        self.bodies += len(part)
                        if held > limits.body_bytes:
                            raise too_large
                        if self.bodies > limits.all_bodies_bytes:
                            raise ApiError(
                                429,
                                "too many large requests at once: try again.",
                                headers={"Retry-After": "2", "Connection": "close"},
                            )
                        parts.append(part)
                        more = message.get("more_body", False)
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the request did not come within {limits.body_seconds:g} seconds.",
                    headers={"Connection": "close"},
                ) from None
            body = b"".join(parts)
            parts.clear()
            yield body
        finally:
            self.bodies -= held

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any, pictures: bool = False) -> Any:
        limiter = self._picture_threads if pictures else self._text_threads
        return await anyio.to_thread.run_sync(work, *arguments, limiter=limiter)

    def _answering(
        self, answer: Callable[[Request], Awaitable[Response]], path: str
    ) -> Callable[[Request], Awaitable[Response]]:
        """Whatever goes wrong is an answer in OpenAI's form, and counted."""

        async def answering(request: Request) -> Response:
            try:
                response = await answer(request)
            except ApiError as error:
                response = error_response(error)
            except Gone:
                self.metrics.gone.inc()
                response = Response(status_code=499)
            except Exception:
                log.exception("%s failed", path)
                response = error_response(ApiError(500, "this failed inside of the server; its log says where."))
            self.metrics.answered(path, response.status_code)
            return response

        return answering

    async def _no_such_path(self, request: Request, error: Exception) -> Response:
        return error_response(ApiError(404, f"there is no {shown(request.url.path)} here.", code="unknown_url"))

    async def _no_such_method(self, request: Request, error: Exception) -> Response:
        headers = {"Allow": "GET" if request.method == "POST" else "POST"}
        return error_response(
            ApiError(405, f"{shown(request.url.path)} does not take {request.method}.", headers=headers)
        )


def _read_page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers by which a browser runs nothing but what stands in it, and asks nobody but this server."""
    page = _PAGE.read_bytes()
    inline = {}
    for tag in ("script", "style"):
        begin, end = page.index(b"<%b>" % tag.encode()) + len(tag) + 2, page.index(b"</%b>" % tag.encode())
        inline[tag] = base64.b64encode(hashlib.sha256(page[begin:end]).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{inline['script']}'; style-src 'sha256-{inline['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

"""The HTTP side: OpenAI's API over an engine, as an ASGI application.

One asyncio loop does what is quick. What takes time on a CPU (reading pictures, cutting text into tokens, compiling a
grammar) runs in a few threads, and the model in the engine's own. Tokens come from there by `call_soon_threadsafe`, and
each request reads its own (`_Running`).

Every request is a stranger's. Bodies, pictures, choices and times are bounded; nothing that a request names is opened,
but pictures in one folder if the user said so. Whoever goes away or does not read loses the slots that work for them,
at once, and nobody else notices.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama4_jax.infer.engine import Engine, EngineDied, Full, Handle, Sampled
from llama4_jax.inputs import messages as conversation
from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.messages import Picture, Tool, ToolCall, read_messages, read_tools
from llama4_jax.inputs.picture_files import file_in
from llama4_jax.inputs.tokenizer import Tokenizer
from llama4_jax.processor import Processor, Prompt
from llama4_jax.serve.grammar import Grammar, Grammars
from llama4_jax.serve.metrics import Metrics
from llama4_jax.serve.protocol import (
    MOST_CHOICES,
    MOST_PICTURES,
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    JsonSchemaFormat,
    NamedChoice,
    TextFormat,
    TokenizeRequest,
    bad_request,
    check_details,
    pictures_in,
    read_request,
    results_in_order,
)
from llama4_jax.serve.reply import Piece, ReplyReader
from llama4_jax.untrusted_json import shortened, shown

log = logging.getLogger(__name__)

_PAGE = Path(__file__).with_name("page.html")
_LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client, or all of them, may take."""

    body_bytes: int = 32 * 2**20  # of a request
    all_bodies_bytes: int = 256 * 2**20  # of those that are being read and prepared
    body_seconds: float = 60.0  # until a body has come
    header_seconds: float = 20.0  # until the headers of a request have come
    unread_tokens: int = 1024  # of a stream whose client reads too slowly
    send_seconds: float = 60.0  # that a client may read nothing at all
    connections: int = 2048


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is told.

    - model: the name that requests and replies call the model by
    - context: tokens of a prompt and its reply together
    - vocab_size: of the model
    - api_keys: one of which each request must have; none: anybody may ask
    - images_under: the folder that pictures may be read from; None: data: URLs alone
    - local: it listens to this machine alone, so no other name than this machine's can be right in a Host header
    - hosts: but these, by which a proxy leads to it
    """

    model: str
    context: int
    vocab_size: int
    api_keys: tuple[str, ...] = ()
    images_under: Path | None = None
    local: bool = True
    hosts: tuple[str, ...] = ()
    limits: Limits = Limits()


class _Gone(Exception):
    """The client closed the connection."""


@dataclasses.dataclass
class _Job:
    """What the engine is to do for a request: prompts, each answered by so many choices."""

    prompts: list[Prompt]
    seeds: list[list[int]]  # of each prompt's choices
    new_tokens: list[int]  # of each prompt
    sampling: dict[str, Any]
    stops: list[str]
    tools: tuple[Tool, ...] | None = None  # whose calls are read
    grammar: Grammar | None = None
    discard: bool = False  # the new tokens: only the prompt's scores are asked for


@dataclasses.dataclass
class _Choice:
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


class _Running:
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
            raise _TooSlow
        return news

    def cancel(self) -> None:
        """Ends what has not ended. Harmless at any time."""
        for handle in self.handles:
            if handle.finish_reason is None:
                handle.cancel()


class _TooSlow(Exception):
    """The client does not read."""


class Server:
    """The application: `app` is what an ASGI server runs.

    - draining: new requests get 503; set by `drain`
    - active: requests that are being answered
    """

    def __init__(self, engine: Engine, processor: Processor, settings: Settings):
        self.engine, self.processor, self.settings = engine, processor, settings
        self.tokenizer: Tokenizer = processor.tokenizer
        self.grammars = Grammars(self.tokenizer, settings.vocab_size)
        self.metrics = Metrics(settings.model, engine.stats)
        self.created = int(time.time())
        self.draining = False
        self.active = 0
        self.bodies = 0  # bytes
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
        self.app: ASGIApp = _Gate(self, Starlette(routes=routes, exception_handlers=handlers))

    def drain(self) -> None:
        """From now on new requests are refused; those that run go on."""
        self.draining = True

    # What each path answers.

    async def _show_page(self, request: Request) -> Response:
        return Response(self._page, headers=self._page_headers, media_type="text/html")

    async def _health(self, request: Request) -> Response:
        if not self.engine.alive:
            raise ApiError(500, "the engine has died: start the server anew.")
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        if not self.engine.alive:
            raise ApiError(500, "the engine has died: start the server anew.")
        if self.draining:
            raise _is_draining()
        return _json({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._described())

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
            said = await self._in_thread(self._tokenized, body)
        return _json(said)

    def _tokenized(self, body: bytes) -> dict[str, Any]:
        asked = read_request(body, TokenizeRequest)
        self._check_model(asked.model)
        if asked.prompt is not None:
            tokens = self.tokenizer.encode(asked.prompt, bos=asked.add_special_tokens)
        else:
            with _as_bad_request():
                tools = read_tools(asked.tools)
                said = self._with_pictures(read_messages(results_in_order(asked.messages)))
                tokens = self.processor.prompt(said, tools=tools, generation_prompt=asked.add_generation_prompt).tokens
        names = [self._name(token) for token in tokens] if asked.return_token_strs else None
        return {"count": len(tokens), "max_model_len": self.settings.context, "tokens": tokens, "token_strs": names}

    async def _detokenize(self, request: Request) -> Response:
        async with self._body(request) as body:
            said = await self._in_thread(self._detokenized, body)
        return _json(said)

    def _detokenized(self, body: bytes) -> dict[str, Any]:
        asked = read_request(body, DetokenizeRequest)
        self._check_model(asked.model)
        with _as_bad_request("tokens"):
            return {"prompt": self.tokenizer.decode(asked.tokens)}

    async def _chat(self, request: Request) -> Response:
        began = time.monotonic()
        async with self._body(request) as body:
            asked, said = await self._in_thread(self._read_chat, body)
            # Pictures take longer, and wait for threads of their own.
            job = await self._in_thread(self._chat_job, asked, said, pictures=bool(pictures_in(said)))
        write = _ChatWriter(self, asked)
        return await self._answer(request, asked, job, write, began)

    async def _completions(self, request: Request) -> Response:
        began = time.monotonic()
        async with self._body(request) as body:
            asked, job = await self._in_thread(self._completion_job, body)
        return await self._answer(request, asked, job, _CompletionWriter(self, asked, job), began)

    # From a request to what the engine is to do.

    def _read_chat(self, body: bytes) -> tuple[ChatRequest, tuple[conversation.Message, ...]]:
        asked = read_request(body, ChatRequest)
        self._check_model(asked.model)
        check_details(asked.messages)
        with _as_bad_request():
            return asked, read_messages(results_in_order(asked.messages))

    def _chat_job(self, asked: ChatRequest, said: tuple[conversation.Message, ...]) -> _Job:
        with _as_bad_request():
            declared = read_tools(asked.tools)
            tools = () if asked.tool_choice == "none" else declared
            called = tools
            if isinstance(asked.tool_choice, NamedChoice):
                name = asked.tool_choice.function.name
                called = tuple(tool for tool in tools if tool.name == name)
                if not called:
                    raise ApiError(
                        400, f"tool_choice names {shown(name)}, and no tool is called that.", param="tool_choice"
                    )
            prompt = self.processor.prompt(self._with_pictures(said), tools=tools)
        return _Job(
            [prompt],
            [asked.seeds()],
            [self._room(prompt, asked.new_tokens, field="max_completion_tokens", of="messages")],
            self._sampling(asked, asked.top_logprobs if asked.logprobs else 0),
            asked.stops,
            tools or None,
            self._grammar(asked, tools, called),
        )

    def _grammar(self, asked: ChatRequest, tools: tuple[Tool, ...], called: tuple[Tool, ...]) -> Grammar | None:
        """What the reply must look like: calls, if they are required; JSON, or else a call where tools are there."""
        form = asked.response_format
        schema = None
        if not isinstance(form, TextFormat):
            schema = form.json_schema.schema if isinstance(form, JsonSchemaFormat) else {"type": "object"}
        required = asked.tool_choice not in (None, "auto", "none")
        strict = any(isinstance(one, dict) and (one.get("function") or one).get("strict") for one in asked.tools)
        if schema is None and not required and not (tools and strict):
            if tools and not asked.parallel_tool_calls:
                raise ApiError(
                    400,
                    "parallel_tool_calls may be false where calls are held to a grammar: with tool_choice required or "
                    "a named function, with strict tools, or with a response_format.",
                    param="parallel_tool_calls",
                )
            return None
        try:
            if schema is not None:
                schema = conversation.json_values(schema, "schema")
            return self.grammars.compile(
                schema=None if required else schema,
                tools=called,
                parallel=asked.parallel_tool_calls and not isinstance(asked.tool_choice, NamedChoice),
                notation="pythonic" if isinstance(self.processor.chat, ChatFormat) else "json",
                text=schema is None and not required,
            )
        except ValueError as error:
            of_schema = str(error).startswith("schema")
            message = f"response_format.json_schema.{error}" if of_schema else str(error)
            raise bad_request(message, "response_format" if of_schema else "tools") from None

    def _with_pictures(self, found: Sequence[conversation.Message]) -> tuple[conversation.Message, ...]:
        """The messages, with no picture but those that came with them, or lie where the user allowed it."""
        pictures = pictures_in(found)
        if len(pictures) > MOST_PICTURES:
            raise ValueError(f"messages have {len(pictures)} pictures, and may have {MOST_PICTURES}.")
        opened = {}
        for i, j, picture in pictures:
            place = f"messages[{i}].content[{j}]"
            if picture.source is None:
                raise ValueError(f"{place} has no picture: give it as image_url with a data: URL.")
            if isinstance(picture.source, str):
                if self.settings.images_under is None:
                    raise ValueError(
                        f"{place} is the path of a file, and this server opens none: give the picture as a data: URL."
                    )
                inside = self.settings.images_under
                opened[i, j] = Picture(file_in(inside, inside / picture.source, name=place))
        return tuple(
            dataclasses.replace(
                message, content=tuple(opened.get((i, j), part) for j, part in enumerate(message.content))
            )
            for i, message in enumerate(found)
        )

    def _completion_job(self, body: bytes) -> tuple[CompletionRequest, _Job]:
        asked = read_request(body, CompletionRequest)
        self._check_model(asked.model)
        prompts = []
        for i, said in enumerate(asked.prompts()):
            ids = self.tokenizer.encode(said, bos=True) if isinstance(said, str) else said
            wrong = next((token for token in ids if not 0 <= token < self.settings.vocab_size), None)
            if wrong is not None:
                raise ApiError(
                    400,
                    f"prompt {i} has the token {shown(wrong)}: ids are 0 to {self.settings.vocab_size - 1}.",
                    param="prompt",
                )
            prompts.append(Prompt(ids, None))
        if len(prompts) * asked.n > MOST_CHOICES:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n = {asked.n} are {len(prompts) * asked.n} choices: {MOST_CHOICES} at "
                f"most.",
                param="n" if asked.n > 1 else "prompt",
            )
        sampling = self._sampling(asked, asked.logprobs or 0)
        if asked.echo and asked.logprobs is not None:
            sampling["prompt_scores"] = True
        new = max(asked.max_tokens, 1)
        room = [self._room(prompt, new, field="max_tokens", of="prompt") for prompt in prompts]
        return asked, _Job(
            prompts, [asked.seeds() for _ in prompts], room, sampling, asked.stops, discard=asked.max_tokens == 0
        )

    def _sampling(self, asked: ChatRequest | CompletionRequest, top_logprobs: int) -> dict[str, Any]:
        return {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k if asked.top_k > 0 else None,
            "frequency_penalty": asked.frequency_penalty,
            "presence_penalty": asked.presence_penalty,
            "logit_bias": asked.biases(self.settings.vocab_size),
            "top_logprobs": top_logprobs,
            "stop_ids": self.tokenizer.stop_ids,
        }

    def _room(self, prompt: Prompt, asked: int | None, *, field: str, of: str) -> int:
        """How many tokens may follow a prompt. `field` says how many should, and `of` holds the prompt."""
        left = self.settings.context - len(prompt.tokens)
        wanted = 1 if asked is None else asked
        if wanted > left:
            raise ApiError(
                413,
                f"the prompt has {len(prompt.tokens)} tokens, and with {wanted} new ones ({field}) these are "
                f"{len(prompt.tokens) + wanted}: more than the context of {self.settings.context}.",
                param=field if left >= 1 else of,
                code="context_length_exceeded",
            )
        return left if asked is None else asked

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model:
            raise ApiError(
                404,
                f"there is no model {shown(name)}: this server has {self.settings.model}.",
                param="model",
                code="model_not_found",
            )

    # From what the engine does to an answer.

    def _start(self, job: _Job, running: _Running) -> list[_Choice]:
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
                    choices.append(_Choice(len(choices), prompt, handle, reader, grammar))
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
        self, job: _Job, running: _Running, choices: list[_Choice], began: float
    ) -> AsyncIterator[tuple[_Choice, Piece]]:
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

    def _finish(self, choice: _Choice, reason: str | None, piece: Piece) -> None:
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

    def _time(self, choice: _Choice, count: int, began: float) -> None:
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

    def _count(self, choice: _Choice, began: float, discard: bool) -> None:
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
        job: _Job,
        writer: "_ChatWriter | _CompletionWriter",
        began: float,
    ) -> Response:
        limits = self.settings.limits
        running = _Running(limits.unread_tokens if asked.stream else None)
        choices = self._start(job, running)
        if asked.stream:
            events = self._events(asked, job, running, choices, writer, began)
            return _EventStream(self, running, events)

        async def whole() -> Response:
            async for choice, piece in self._pieces(job, running, choices, began):
                writer.keep(choice, piece)
            return _json(writer.whole(choices))

        try:
            return await _while_there(request.receive, whole())
        finally:
            running.cancel()

    async def _events(
        self,
        asked: ChatRequest | CompletionRequest,
        job: _Job,
        running: _Running,
        choices: list[_Choice],
        writer: "_ChatWriter | _CompletionWriter",
        began: float,
    ) -> AsyncIterator[bytes]:
        """Server-sent events; an error on the way is one of them."""
        usage = asked.stream_options.include_usage
        try:
            for chunk in writer.begin(choices):
                yield _event(chunk, usage)
            async for choice, piece in self._pieces(job, running, choices, began):
                for chunk in writer.chunks(choice, piece):
                    yield _event(chunk, usage)
            if usage:
                yield _event(writer.chunk([], _usage(choices)), usage)
        except ApiError as error:
            yield _event(error.as_json(), False)
        yield b"data: [DONE]\n\n"

    def _name(self, token: int) -> str:
        """A token as text, also where it is no whole character."""
        data = self._bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, token: int) -> bytes:
        """Ids that the model has, and the tokenizer has not, are nothing."""
        return self.tokenizer.decode_bytes([token]) if token < self.tokenizer.vocab_size else b""

    # Around all of them.

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
                            raise _Gone
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
                response = _error(error)
            except _Gone:
                self.metrics.gone.inc()
                response = Response(status_code=499)
            except Exception:
                log.exception("%s failed", path)
                response = _error(ApiError(500, "this failed inside of the server; its log says where."))
            self.metrics.answered(path, response.status_code)
            return response

        return answering

    async def _no_such_path(self, request: Request, error: Exception) -> Response:
        return _error(ApiError(404, f"there is no {shown(request.url.path)} here.", code="unknown_url"))

    async def _no_such_method(self, request: Request, error: Exception) -> Response:
        headers = {"Allow": "GET" if request.method == "POST" else "POST"}
        return _error(ApiError(405, f"{shown(request.url.path)} does not take {request.method}.", headers=headers))


class _Gate:
    """In front of everything: who may ask, and whether anything is still taken."""

    def __init__(self, server: Server, app: ASGIApp):
        self._server, self._app = server, app
        self._keys = [_digest(key) for key in server.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this answers HTTP alone, and not {scope['type']}")
        try:
            self._check(scope)
        except ApiError as error:
            self._server.metrics.answered("refused", error.status)
            await _error(error)(scope, receive, send)
            return
        self._server.active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._server.active -= 1

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        known = ("localhost", "127.0.0.1", "[::1]", *map(str.lower, self._server.settings.hosts))
        if self._server.settings.local and _without_port(host) not in known:
            raise ApiError(
                403,
                f"this server is for this machine, as localhost, and not as {shown(host)}: --allow-host adds a name.",
                code="wrong_host",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "requests from pages of other sites are refused.", code="wrong_origin")
        open_to_all = scope["path"] in ("/", "/health", "/ready")
        if self._keys and not open_to_all:
            kind, _, key = headers.get(b"authorization", "").partition(" ")
            given = _digest(key.strip() if kind.lower() == "bearer" else "")
            # All are compared, and in constant time: how long it takes tells nothing.
            if not sum(hmac.compare_digest(given, known) for known in self._keys):
                raise ApiError(
                    401,
                    "a key is needed that this server knows: Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self._server.draining and scope["method"] == "POST":
            raise _is_draining()


def _is_draining() -> ApiError:
    return ApiError(
        503, "the server is going down.", code="draining", headers={"Retry-After": "5", "Connection": "close"}
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


class _EventStream(Response):
    """A stream of events to a client that may go away, or not read."""

    def __init__(self, server: Server, running: _Running, events: AsyncIterator[bytes]):
        super().__init__(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._server, self._running, self._events = server, running, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self._server.settings.limits.send_seconds

        async def deliver(message: Message) -> None:
            try:
                async with asyncio.timeout(seconds):
                    await send(message)
            except TimeoutError:
                raise _TooSlow from None

        async def write() -> None:
            await deliver({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await deliver({"type": "http.response.body", "body": event, "more_body": True})
            await deliver({"type": "http.response.body", "body": b"", "more_body": False})

        slow = True
        try:
            await _while_there(receive, write(), stop=self._running)
            slow = False
        except _Gone:
            self._server.metrics.gone.inc()
            slow = False
        except _TooSlow:
            self._server.metrics.slow.inc()
            log.warning("a stream ended, as its client did not read it")
        except Exception:
            log.exception("a stream failed")
        finally:
            self._running.cancel()
            abort = scope.get("state", {}).get("abort")
            if slow and abort is not None:  # what it has not read would wait for it forever
                abort()


async def _while_there(receive: Receive, work: Coroutine[Any, Any, Any], stop: _Running | None = None) -> Any:
    """What the work gives, unless the client goes away: then it is cancelled, and _Gone raised."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Writer:
    """Replies in OpenAI's form, whole or in chunks."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, server: Server):
        self._server = server
        self._head = {
            "id": f"{self.prefix}{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": server.settings.model,
        }
        self._kept: dict[int, list[Piece]] = {}

    def keep(self, choice: _Choice, piece: Piece) -> None:
        self._kept.setdefault(choice.index, []).append(piece)

    def _all(self, choice: _Choice) -> Piece:
        pieces = self._kept.get(choice.index, [])
        return Piece([event for piece in pieces for event in piece.events], [t for p in pieces for t in p.tokens])

    def whole(self, choices: list[_Choice]) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.kind,
            "choices": [self._whole(choice, self._all(choice)) for choice in choices],
            "usage": _usage(choices),
        }

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices, "usage": usage}


class _ChatWriter(_Writer):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, server: Server, asked: ChatRequest):
        super().__init__(server)
        self._logprobs, self._top = asked.logprobs, asked.top_logprobs
        self._calls: dict[int, int] = {}

    def begin(self, choices: list[_Choice]) -> Iterator[dict[str, Any]]:
        for choice in choices:
            yield self.chunk([self._delta(choice, {"role": "assistant", "content": ""}, None)])

    def chunks(self, choice: _Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs = self._of_tokens(piece.tokens) if piece.tokens else None
        for event in piece.events:
            if isinstance(event, str):
                delta: dict[str, Any] = {"content": event}
            else:
                index = self._calls.get(choice.index, 0)
                self._calls[choice.index] = index + 1
                delta = {"tool_calls": [{"index": index, **_call(event)}]}
            yield self.chunk([self._delta(choice, delta, logprobs)])
            logprobs = None
        if choice.finish_reason is not None or logprobs is not None:
            last = self._delta(choice, {}, logprobs)
            last["finish_reason"] = choice.finish_reason
            if choice.finish_reason is not None and choice.reader.problem is not None:
                last["problem"] = choice.reader.problem
            yield self.chunk([last])

    def _delta(self, choice: _Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _whole(self, choice: _Choice, piece: Piece) -> dict[str, Any]:
        calls = [event for event in piece.events if isinstance(event, ToolCall)]
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if calls:
            message["content"] = piece.text or None
            message["tool_calls"] = [_call(call) for call in calls]
        problem = {} if choice.reader.problem is None else {"problem": choice.reader.problem}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._of_tokens(piece.tokens),
            "finish_reason": choice.finish_reason,
            **problem,
        }

    def _of_tokens(self, tokens: Sequence[Sampled]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {
                    **self._entry(token.id, token.logprob),
                    "top_logprobs": [self._entry(*pair) for pair in token.top[: self._top]],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._server._bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


class _CompletionWriter(_Writer):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, server: Server, asked: CompletionRequest, job: _Job):
        super().__init__(server)
        self._logprobs, self._echo, self._texts = asked.logprobs, asked.echo, asked.prompts()
        self._n = asked.n
        self._echoed: set[int] = set()
        self._offsets: dict[int, int] = {}

    def begin(self, choices: list[_Choice]) -> Iterator[dict[str, Any]]:
        return iter(())

    def chunks(self, choice: _Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        said = self._said(choice, piece)
        if said["text"] or said["logprobs"] or choice.finish_reason is not None:
            yield self.chunk([said])

    def _whole(self, choice: _Choice, piece: Piece) -> dict[str, Any]:
        return self._said(choice, piece)

    def _said(self, choice: _Choice, piece: Piece) -> dict[str, Any]:
        text, tokens = piece.text, [(token.id, token) for token in piece.tokens]
        if self._echo and choice.index not in self._echoed:
            self._echoed.add(choice.index)
            prompt, echoed = self._prompt(choice)
            text, tokens = prompt + text, echoed + tokens
        logprobs = None
        if self._logprobs is not None and (tokens or choice.finish_reason is not None):
            logprobs = self._of_tokens(choice, tokens)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _prompt(self, choice: _Choice) -> tuple[str, list[tuple[int, Sampled | None]]]:
        """The prompt's text, and its tokens, without the begin_of_text that no text said."""
        given, ids = self._texts[choice.index // self._n], choice.prompt.tokens
        scores = choice.handle.prompt_scores or [None] * len(ids)
        tokens = list(zip(ids, scores, strict=True))
        if isinstance(given, str):
            return given, tokens[1:]
        return b"".join(map(self._server._bytes, ids)).decode(errors="replace"), tokens

    def _of_tokens(self, choice: _Choice, tokens: Sequence[tuple[int, Sampled | None]]) -> dict[str, Any]:
        name = self._server._name
        names = [name(token) for token, _ in tokens]
        offset = self._offsets.get(choice.index, 0)
        offsets = []
        for one in names:
            offsets.append(offset)
            offset += len(one)
        self._offsets[choice.index] = offset
        top = [
            None if token is None else {name(i): _finite(p) for i, p in reversed(token.top[: self._logprobs])}
            for _, token in tokens
        ]
        return {
            "tokens": names,
            "token_logprobs": [None if token is None else _finite(token.logprob) for _, token in tokens],
            "top_logprobs": top if self._logprobs else None,
            "text_offset": offsets,
        }


def _usage(choices: list[_Choice]) -> dict[str, Any]:
    """Each prompt counts once, however many choices it has."""
    prompts = {id(choice.prompt): choice for choice in reversed(choices)}.values()
    prompt, new = sum(len(choice.prompt.tokens) for choice in prompts), sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(choice.handle.cached_tokens or 0 for choice in prompts)},
    }


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _finite(logprob: float) -> float:
    return max(float(logprob), _LEAST_LOGPROB) if logprob == logprob else _LEAST_LOGPROB


def _json(value: Any) -> Response:
    # Half of a surrogate pair, which a tool's arguments may hold, is no UTF-8: it stays an escape.
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False).encode()
    return Response(text, media_type="application/json")


def _event(value: dict[str, Any], usage: bool) -> bytes:
    if not usage:
        value = {name: inner for name, inner in value.items() if name != "usage"}
    return b"data: " + _json(value).body + b"\n\n"


def _error(error: ApiError) -> Response:
    response = _json(error.as_json())
    response.status_code = error.status
    response.headers.update(error.headers)
    return response


@contextlib.contextmanager
def _as_bad_request(param: str | None = None) -> Iterator[None]:
    """What the project's own readers refuse is a 400, and names the field."""
    try:
        yield
    except (ValueError, OSError, RecursionError) as error:
        raise bad_request(error, param) from None


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

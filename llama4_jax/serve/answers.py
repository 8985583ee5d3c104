"""Replies in OpenAI's form: whole, or in chunks of a stream; and errors."""

import functools
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.responses import Response

from llama4_jax.infer.engine import Sampled
from llama4_jax.inputs.messages import ToolCall
from llama4_jax.inputs.tokenizer import Tokenizer
from llama4_jax.serve.protocol import ApiError, ChatRequest, CompletionRequest
from llama4_jax.serve.reply import Piece
from llama4_jax.serve.running import Choice

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Ids that the model has, and the tokenizer has not, are nothing."""
    return tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b""


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text, also where it is no whole character."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class _Writer:
    """Replies in OpenAI's form, whole or in chunks."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, tokenizer: Tokenizer, model: str):
        self._tokenizer = tokenizer
        self._head = {
            "id": f"{self.prefix}{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._kept: dict[int, list[Piece]] = {}

    def keep(self, choice: Choice, piece: Piece) -> None:
        self._kept.setdefault(choice.index, []).append(piece)

    def _all(self, choice: Choice) -> Piece:
        pieces = self._kept.get(choice.index, [])
        return Piece([part for piece in pieces for part in piece.events], [t for p in pieces for t in p.tokens])

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.kind,
            "choices": [self._whole(choice, self._all(choice)) for choice in choices],
            "usage": usage_of(choices),
        }

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices, "usage": usage}


class ChatWriter(_Writer):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, tokenizer: Tokenizer, model: str, asked: ChatRequest):
        super().__init__(tokenizer, model)
        self._logprobs, self._top = asked.logprobs, asked.top_logprobs
        self._calls: dict[int, int] = {}

    def begin(self, choices: list[Choice]) -> Iterator[dict[str, Any]]:
        for choice in choices:
            yield self.chunk([self._delta(choice, {"role": "assistant", "content": ""}, None)])

    def chunks(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs = self._of_tokens(piece.tokens) if piece.tokens else None
        for part in piece.events:
            if isinstance(part, str):
                delta: dict[str, Any] = {"content": part}
            else:
                index = self._calls.get(choice.index, 0)
                self._calls[choice.index] = index + 1
                delta = {"tool_calls": [{"index": index, **_call(part)}]}
            yield self.chunk([self._delta(choice, delta, logprobs)])
            logprobs = None
        if choice.finish_reason is not None or logprobs is not None:
            last = self._delta(choice, {}, logprobs)
            last["finish_reason"] = choice.finish_reason
            if choice.finish_reason is not None and choice.reader.problem is not None:
                last["problem"] = choice.reader.problem
            yield self.chunk([last])

    def _delta(self, choice: Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        calls = [part for part in piece.events if isinstance(part, ToolCall)]
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
        data = token_bytes(self._tokenizer, token)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


class CompletionWriter(_Writer):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, tokenizer: Tokenizer, model: str, asked: CompletionRequest):
        super().__init__(tokenizer, model)
        self._logprobs, self._echo, self._texts = asked.logprobs, asked.echo, asked.prompts()
        self._n = asked.n
        self._echoed: set[int] = set()
        self._offsets: dict[int, int] = {}

    def begin(self, choices: list[Choice]) -> Iterator[dict[str, Any]]:
        return iter(())

    def chunks(self, choice: Choice, piece: Piece) -> Iterator[dict[str, Any]]:
        said = self._said(choice, piece)
        if said["text"] or said["logprobs"] or choice.finish_reason is not None:
            yield self.chunk([said])

    def _whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return self._said(choice, piece)

    def _said(self, choice: Choice, piece: Piece) -> dict[str, Any]:
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

    def _prompt(self, choice: Choice) -> tuple[str, list[tuple[int, Sampled | None]]]:
        """The prompt's text, and its tokens, without the begin_of_text that no text said."""
        given, ids = self._texts[choice.index // self._n], choice.prompt.tokens
        scores = choice.handle.prompt_scores or [None] * len(ids)
        tokens = list(zip(ids, scores, strict=True))
        if isinstance(given, str):
            return given, tokens[1:]
        return b"".join(token_bytes(self._tokenizer, token) for token in ids).decode(errors="replace"), tokens

    def _of_tokens(self, choice: Choice, tokens: Sequence[tuple[int, Sampled | None]]) -> dict[str, Any]:
        name = functools.partial(token_name, self._tokenizer)
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


def usage_of(choices: list[Choice]) -> dict[str, Any]:
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


def json_response(value: Any) -> Response:
    # Half of a surrogate pair, which a tool's arguments may hold, is no UTF-8: it stays an escape.
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False).encode()
    return Response(text, media_type="application/json")


def event(value: dict[str, Any], usage: bool) -> bytes:
    if not usage:
        value = {name: inner for name, inner in value.items() if name != "usage"}
    return b"data: " + json_response(value).body + b"\n\n"


def error_response(error: ApiError) -> Response:
    response = json_response(error.as_json())
    response.status_code = error.status
    response.headers.update(error.headers)
    return response

"""Many requests from a file, their replies into another; an interrupted run goes on by the same call.

A request is a line of JSON as OpenAI's API takes it: {"messages": […], "tools": […], "max_tokens": 100, "temperature":
0.7, "top_p": 0.9, "top_k": 40, "seed": 0}, or with that as "body", as in OpenAI's batches ("custom_id" is kept). Paths
of pictures are relative to the file, and only files in its folder, or in another that the caller names, are opened:
whoever writes requests need not be whoever runs them. The reply stands in a line of its own, always of valid JSON:

    {"line": 1, "custom_id": …, "message": {"role": "assistant", …}, "finish_reason": "stop", "usage": …, "request": …}
    {"line": 2, "error": "line 2: messages[0].role should be …", "request": …}

"request" tells which request, under which settings, it is the reply to. "problem", if it is there, is why something
that looks like a call is none.

Requests share an engine: when one is done, the next takes its place. Replies are written in the order of the requests.
What a reply is depends on its line and the settings alone, and not on what is answered beside it, so that replies are
the same whether the run was interrupted or not. A line without a seed draws other numbers than the lines around it.
"""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama4_jax.infer import interrupt
from llama4_jax.infer.checks import check_cache
from llama4_jax.infer.engine_core import EngineCore, Handle
from llama4_jax.infer.rows import STOPS
from llama4_jax.infer.sampling import MOST_ROWS, check_sampling, check_whole
from llama4_jax.inputs.messages import Message, Picture, Tool, json_values, read_messages, read_tools
from llama4_jax.inputs.picture_files import file_in
from llama4_jax.inputs.tokenizer import Tokenizer, utf8
from llama4_jax.inputs.tool_calls import ParsedReply, parse_reply
from llama4_jax.model.llama4 import Llama4
from llama4_jax.processor import Processor, Prompt
from llama4_jax.untrusted_json import parse_json, shown

_SAMPLING = {"temperature": float, "top_p": float, "top_k": int}
_DEFAULTS = {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "top_k": None, "seed": 0}
_LIMITS = ("max_tokens", "max_completion_tokens")  # OpenAI's two names of one thing
_READ = ("messages", "tools", *_LIMITS, *_SAMPLING, "seed")
_IGNORED = (  # of what OpenAI's API takes, what makes no difference here
    "n", "model", "stream", "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
)  # fmt: skip
# What clients write although it is the default, and is not supported otherwise.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "tool_choice": ("auto",), "parallel_tool_calls": (True,), "stop": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "best_of": (1,), "repetition_penalty": (1,),
    "min_p": (0,), "functions": ([],), "suffix": ("",),
}  # fmt: skip
_AROUND = ("custom_id", "id", "method", "url")
_AHEAD = 256  # lines that may be answered while one before them is not


class Request(NamedTuple):
    """One line: what it asks for, and how its reply is sampled; or why it is no request."""

    line: int
    custom_id: Any
    body: dict[str, Any]
    sampling: dict[str, Any]  # arguments of `generate`; seed is None where the line says none
    error: str | None


class _Asked(NamedTuple):
    """A request on its way, and what of its reply is known."""

    request: Request
    reply: dict[str, Any]
    handle: Handle | None  # None: it is answered by an error
    tools: tuple[Tool, ...]


class Progress(NamedTuple):
    """Of the lines of the file: answered now, answered before, and those of all of them with an error."""

    done: int
    earlier: int
    errors: int


def answer_file(
    model: Llama4,
    processor: Processor,
    source: Path,
    destination: Path,
    *,
    images_under: Path | None = None,
    batch_size: int = 8,
    cache: str = "float",
    report: Callable[[Progress], None] = lambda progress: None,
    **defaults: Any,
) -> Progress:
    """Answers the requests of `source` that `destination` does not answer yet.

    - images_under: the folder in which pictures must be; that of `source` if it is None
    - batch_size: requests answered at the same time
    - cache: of keys and values, as in `generate`
    - report: is called when replies have been written
    - defaults: for requests that do not say: max_new_tokens (512), temperature (0), top_p (1), top_k (None), seed (0)

    A line that is no request gets an error as its reply, and the others are answered. Raises as `check_files` and
    `check_cache`.
    """
    check_cache(cache)
    answered = check_files(source, destination, images_under=images_under, batch_size=batch_size, **defaults)
    defaults = {**_DEFAULTS, **defaults}
    lines = _lines(source)
    digests = {number: _digest(line, defaults) for number, line in lines}
    _cut_off_half_a_line(destination)
    folders = (source.parent, images_under or source.parent)
    stop_ids = tuple(processor.tokenizer.stop_ids)
    core = EngineCore(model, slots=batch_size, cache=cache, plain=True, most_stops=max(STOPS, len(stop_ids)))
    earlier, done, errors = len(answered), 0, sum(answered.values())
    coming = collections.deque((number, line) for number, line in lines if number not in answered)
    asked: collections.deque[_Asked] = collections.deque()
    with destination.open("ab") as out, core.placed():
        while coming or asked:
            interrupt.check()
            while coming and len(asked) < _AHEAD and sum(not _is_done(one) for one in asked) < 2 * batch_size:
                request = _read(*coming.popleft(), defaults)
                asked.append(_ask(core, processor, request, folders, defaults["seed"], stop_ids))
            core.turn()
            replies = []
            while asked and _is_done(asked[0]):
                reply = _reply(asked.popleft(), processor.tokenizer)
                replies.append({**reply, "request": digests[reply["line"]]})
            if replies:
                out.write(
                    b"".join(utf8(json.dumps(reply, ensure_ascii=False, allow_nan=False)) + b"\n" for reply in replies)
                )
                out.flush()
                os.fsync(out.fileno())
                done += len(replies)
                errors += sum("error" in reply for reply in replies)
                report(Progress(done, earlier, errors))
    return Progress(done, earlier, errors)


def check_files(
    source: Path, destination: Path, *, images_under: Path | None = None, batch_size: int = 8, **defaults: Any
) -> dict[int, bool]:
    """What `answer_file` can check without a model. Returns the lines that are answered → whether by an error.

    Raises FileNotFoundError without a source, a directory for the destination or one of pictures; ValueError for
    settings out of range, and if the destination is no file, or holds what answers other requests, or the same under
    other settings.
    """
    check_whole("batch_size", batch_size, 1, MOST_ROWS)
    defaults = {**_DEFAULTS, **defaults}
    check_sampling(**defaults)
    if not source.is_file():
        raise FileNotFoundError(f"no such file of requests: {source}")
    if images_under is not None and not images_under.is_dir():
        raise FileNotFoundError(f"images_under: there is no directory {images_under}")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"{destination} cannot be written: there is no directory {destination.parent}")
    if destination.exists() and not destination.is_file():
        raise ValueError(f"{destination} cannot be written: it is no file.")
    digests = {number: _digest(line, defaults) for number, line in _lines(source)}
    found: dict[int, bool] = {}
    content = destination.read_bytes() if destination.exists() else b""
    for number, text in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            reply = parse_json(text, where="it", of=dict)
            line, request = int(reply["line"]), reply["request"]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{destination}, line {number} is no reply of this command: give another --out, or remove it."
            ) from error
        if digests.get(line, "") != request:
            raise ValueError(
                f"{destination}, line {number} answers line {line} of the requests as it was, or under other settings: "
                f"give another --out, or remove it to answer all of them anew."
            )
        found[line] = "error" in reply
    return found


def _cut_off_half_a_line(destination: Path) -> None:
    """What a run wrote last, when it was killed."""
    if destination.exists():
        os.truncate(destination, destination.read_bytes().rfind(b"\n") + 1)


def _lines(source: Path) -> list[tuple[int, bytes]]:
    """Numbered from 1; empty ones are none."""
    return [(n, line) for n, line in enumerate(source.read_bytes().splitlines(), 1) if line.strip()]


def _digest(line: bytes, defaults: Mapping[str, Any]) -> str:
    settings = json.dumps(defaults, sort_keys=True).encode()
    return hashlib.blake2b(settings + b"\n" + line.strip(), digest_size=6).hexdigest()


def _read(number: int, line: bytes, defaults: Mapping[str, Any]) -> Request:
    """What can be read of a line without opening its pictures."""
    custom_id = None
    try:
        row = parse_json(line, where="this")
        if not isinstance(row, dict):
            raise ValueError(f"a request should be a JSON object, and this is {shown(row)}.")
        custom_id = _custom_id(row)
        body = row
        if "body" in row:
            _only(row, (*_AROUND, "body"), "what stands around a body")
            body = row["body"]
            if not isinstance(body, dict):
                raise ValueError(f"body should be a JSON object, and is {shown(body)}.")
        for name, values in _HARMLESS.items():
            said = body.get(name)
            if not any((type(said) is not bool and said == value) or said is value for value in (None, *values)):
                raise ValueError(f"{name} is {shown(said)}, and only {json.dumps(values[0])} is supported here.")
        _only(body, (*_READ, *_IGNORED, *_HARMLESS, *_AROUND), "a request")
        if body.get("n") not in (None, 1):
            raise ValueError(
                f"n is {shown(body['n'])}, and there is one reply to a line: repeat the line with other seeds."
            )
        sampling = {name: _number(body, name, kind, defaults[name]) for name, kind in _SAMPLING.items()}
        sampling["seed"] = _number(body, "seed", int, None)
        limit = next((name for name in _LIMITS if body.get(name) is not None), _LIMITS[0])
        sampling["max_new_tokens"] = check_whole(limit, _number(body, limit, int, defaults["max_new_tokens"]), 1)
        check_sampling(**{**sampling, "seed": sampling["seed"] or 0})
        if body.get("messages") is None:
            raise ValueError(f"it has no messages, but {', '.join(map(shown, list(body)[:8])) or 'nothing'}.")
        return Request(number, custom_id, body, sampling, None)
    except (ValueError, RecursionError) as error:
        return Request(number, custom_id, {}, {}, str(error))


def _custom_id(row: Mapping[str, Any]) -> Any:
    """What a request is called: any JSON value, which is given back. Raises ValueError for NaN and its like."""
    name = "custom_id" if "custom_id" in row else "id"
    return json_values(row.get(name), name)


def _only(value: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key, said in value.items():
        if key not in known and said is not None:
            raise ValueError(f"{shown(key)} is not known: {what} may have {', '.join(known)}.")


def _number(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 63
    if not fits or (kind is int and value != int(value)):
        raise ValueError(f"{name} should be {'a whole number' if kind is int else 'a number'}, and is {shown(value)}.")
    return kind(value)


def _is_done(asked: _Asked) -> bool:
    return asked.handle is None or asked.handle.done


def _ask(
    core: EngineCore,
    processor: Processor,
    request: Request,
    folders: tuple[Path, Path],
    seed: int,
    stop_ids: tuple[int, ...],
) -> _Asked:
    """Submits what can be submitted."""
    reply: dict[str, Any] = {"line": request.line}
    if request.custom_id is not None:
        reply["custom_id"] = request.custom_id
    try:
        if request.error is not None:
            raise ValueError(request.error)
        prompt, tools = _prompt(request, processor, folders, core.context)
    except (ValueError, OSError, RecursionError) as error:
        return _Asked(request, {**reply, "error": f"line {request.line}: {error}"}, None, ())
    sampling = dict(request.sampling)
    if sampling["seed"] is None:
        sampling["seed"] = (seed + request.line) % (1 << 31)
    handle = core.submit(prompt.tokens, tiles=prompt.tiles, stop_ids=stop_ids, **sampling)
    return _Asked(request, reply, handle, tools)


def _prompt(
    request: Request, processor: Processor, folders: tuple[Path, Path], context: int
) -> tuple[Prompt, tuple[Tool, ...]]:
    tools = request.body.get("tools")
    tools = () if tools is None else read_tools(tools)
    prompt = processor.prompt(_beside(request.body["messages"], *folders), tools=tools)
    new = request.sampling["max_new_tokens"]
    if len(prompt.tokens) + new > context:
        raise ValueError(
            f"the conversation has {len(prompt.tokens)} tokens, and with {new} new ones it exceeds the model's "
            f"context_length of {context}: shorten it, or lower max_tokens."
        )
    return prompt, tools


def _beside(messages: Any, folder: Path, within: Path) -> list[Message]:
    """Paths of pictures are relative to the file of requests, and lead nowhere but into one folder."""

    def beside(part: str | Picture, where: str) -> str | Picture:
        if not isinstance(part, Picture) or not isinstance(part.source, str):
            return part
        return Picture(file_in(within, folder / part.source, name=where, hint="or say --images-under DIR"))

    said = []
    for i, message in enumerate(read_messages(messages)):
        content = tuple(beside(part, f"messages[{i}].content[{j}]") for j, part in enumerate(message.content))
        said.append(dataclasses.replace(message, content=content))
    return said


def _reply(asked: _Asked, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokens of a reply say, as OpenAI's API gives it; or why there are none."""
    if asked.handle is None:
        return asked.reply
    row, line = [token.id for token in asked.handle.so_far()], asked.request.line
    stopped = asked.handle.finish_reason == "stop"
    text = tokenizer.decode(row[:-1] if stopped else row)
    parsed = parse_reply(text, asked.tools) if asked.tools else ParsedReply(text, (), None)
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
    if parsed.tool_calls:
        message["tool_calls"] = [
            {
                "id": f"call_{line}_{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for i, call in enumerate(parsed.tool_calls)
        ]
    reason = ("tool_calls" if parsed.tool_calls else "stop") if stopped else "length"
    problem = {} if parsed.problem is None else {"problem": parsed.problem}
    usage = {"prompt_tokens": asked.handle.prompt_tokens, "completion_tokens": len(row)}
    return {**asked.reply, "message": message, "finish_reason": reason, **problem, "usage": usage}

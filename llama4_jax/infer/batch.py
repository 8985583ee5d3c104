"""Many requests from a file, their replies into another; an interrupted run goes on by the same call.

A request is a line of JSON as OpenAI's API takes it: {"messages": […], "tools": […], "max_tokens": 100, "temperature":
0.7, "top_p": 0.9, "top_k": 40, "seed": 0}, or with that as "body", as in OpenAI's batches ("custom_id" is kept). The
reply stands in a line of its own:

    {"line": 1, "custom_id": …, "message": {"role": "assistant", …}, "finish_reason": "stop", "usage": {…}}
    {"line": 2, "error": "messages[0].role should be …"}

Requests that follow one another and are sampled alike are answered together. Which ones these are depends on the file
alone, and so do the numbers that sampling draws: the replies are the same whether the run was interrupted or not.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama4_jax.infer.generate import generate
from llama4_jax.infer.sampling import make_sampling
from llama4_jax.inputs.messages import Picture, Tool, read_messages, read_tools
from llama4_jax.inputs.tool_calls import parse_reply
from llama4_jax.model.llama4 import Llama4
from llama4_jax.processor import Processor, Prompt

_SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "seed": int}
_READ = ("messages", "tools", "max_tokens", "max_completion_tokens", "model", "stream", "n", "user", *_SAMPLING)


class Request(NamedTuple):
    """One line that can be answered; or an error, and nothing else."""

    line: int
    custom_id: Any
    prompt: Prompt | None
    tools: tuple[Tool, ...]
    sampling: tuple[tuple[str, Any], ...]  # arguments of `generate`, max_new_tokens among them
    error: str | None


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
    batch_size: int = 8,
    report: Callable[[Progress], None] = lambda progress: None,
    **defaults: Any,
) -> Progress:
    """Answers the requests of `source` that `destination` does not answer yet.

    - batch_size: requests answered together
    - report: is called after each of these batches
    - defaults: for requests that do not say: max_new_tokens, temperature, top_p, top_k, seed

    A line that is no request gets an error as its reply, and the others are answered. Raises FileNotFoundError without
    a source; ValueError if the destination holds replies to other requests.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    defaults = {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "top_k": None, "seed": 0, **defaults}
    model = model.unscanned()
    lines = [(n, line) for n, line in enumerate(source.read_bytes().splitlines(), 1) if line.strip()]
    digests = {n: _digest(line) for n, line in lines}
    answered = _answered(destination, digests)
    earlier, done, errors = len(answered), 0, sum(answered.values())
    context = model.config.context_length
    with destination.open("ab") as out:
        requests = (_read_request(n, line, processor, context, source.parent, defaults) for n, line in lines)
        for batch in _batches(requests, batch_size):
            missing = [request for request in batch if request.line not in answered]
            if not missing:
                continue
            replies = _answer(model, processor, batch)
            wanted = [reply for reply in replies if reply["line"] not in answered]
            for reply in wanted:
                reply["request"] = digests[reply["line"]]
            out.write(b"".join(json.dumps(reply, ensure_ascii=False).encode() + b"\n" for reply in wanted))
            out.flush()
            os.fsync(out.fileno())
            done += len(wanted)
            errors += sum("error" in reply for reply in wanted)
            report(Progress(done, earlier, errors))
    return Progress(done, earlier, errors)


def _digest(line: bytes) -> str:
    return hashlib.blake2b(line.strip(), digest_size=6).hexdigest()


def _answered(destination: Path, digests: dict[int, str]) -> dict[int, bool]:
    """Lines that are answered already → whether by an error. A reply that was cut off is taken out of the file."""
    found: dict[int, bool] = {}
    if not destination.exists():
        return found
    content = destination.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            reply = json.loads(text)
            line, request = reply["line"], reply["request"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{destination}, line {number} is no reply of this command: give another --out, or remove it."
            ) from error
        if digests.get(line) != request:
            raise ValueError(
                f"{destination}, line {number} answers another request than line {line} of the input is now: give "
                f"another --out, or remove it to answer all of them anew."
            )
        found[line] = "error" in reply
    if len(whole) < len(content):
        os.truncate(destination, len(whole))
    return found


def _read_request(
    number: int, line: bytes, processor: Processor, context: int, folder: Path, defaults: dict[str, Any]
) -> Request:
    custom_id = None
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"should be a JSON object, and is a {type(row).__name__}.")
        custom_id = row.get("custom_id", row.get("id"))
        body = row.get("body", row)
        if not isinstance(body, dict):
            raise ValueError(f"body should be a JSON object, and is a {type(body).__name__}.")
        unknown = body.keys() - {*_READ, "custom_id", "id", "method", "url"}
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is not known: a request may have {', '.join(_READ)}.")
        if body.get("n") not in (None, 1):
            raise ValueError(f"n is {body['n']!r}, and only one reply is given: repeat the line with other seeds.")
        sampling = {name: _number(body, name, kind, defaults[name]) for name, kind in _SAMPLING.items()}
        make_sampling(**{name: sampling[name] for name in ("temperature", "top_p", "top_k")})
        if not 0 <= sampling["seed"] < 1 << 31:
            raise ValueError(f"seed must be from 0 to {(1 << 31) - 1}, got {sampling['seed']}.")
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        sampling["max_new_tokens"] = _number(body, limit, int, defaults["max_new_tokens"])
        if sampling["max_new_tokens"] < 1:
            raise ValueError(f"{limit} must be at least 1, got {sampling['max_new_tokens']}.")
        if "messages" not in body:
            raise ValueError(f"has no messages, but {', '.join(map(repr, body)) or 'nothing'}.")
        tools = read_tools(body.get("tools") or [])
        prompt = processor.prompt(_beside(body["messages"], folder), tools=tools)
        if len(prompt.tokens) + sampling["max_new_tokens"] > context:
            raise ValueError(
                f"the conversation has {len(prompt.tokens)} tokens, which with {limit}={sampling['max_new_tokens']} "
                f"exceeds the model's context_length of {context}."
            )
        return Request(number, custom_id, prompt, tools, tuple(sampling.items()), None)
    except (ValueError, OSError, RecursionError) as error:
        said = f"no JSON: {error}" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
        return Request(number, custom_id, None, (), (), f"line {number}: {said}")


def _number(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != int(value)):
        raise ValueError(f"{name} should be a number, and is {value!r:.40}.")
    return kind(value)


def _beside(messages: Any, folder: Path) -> Any:
    """Paths of pictures are relative to the file of requests."""

    def beside(part: str | Picture) -> str | Picture:
        return Picture(folder / part.source) if isinstance(part, Picture) and isinstance(part.source, str) else part

    return [dataclasses.replace(m, content=tuple(map(beside, m.content))) for m in read_messages(messages)]


def _batches(requests: Iterator[Request], size: int) -> Iterator[list[Request]]:
    """Requests that follow one another and are sampled alike, so many at most."""
    for _, alike in itertools.groupby(requests, key=lambda request: (request.sampling, request.error is None)):
        while batch := list(itertools.islice(alike, size)):
            yield batch


def _answer(model: Llama4, processor: Processor, batch: Sequence[Request]) -> list[dict[str, Any]]:
    if batch[0].error is not None:
        return [_reply(request, error=request.error) for request in batch]
    tokenizer = processor.tokenizer
    rows = generate(
        model,
        [request.prompt.tokens for request in batch],
        images=[request.prompt.tiles for request in batch],
        stop_ids=tokenizer.stop_ids,
        **dict(batch[0].sampling),
    )
    replies = []
    for request, row in zip(batch, rows, strict=True):
        stopped = row[-1] in tokenizer.stop_ids
        parsed = parse_reply(tokenizer.decode(row[:-1] if stopped else row), request.tools)
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{request.line}_{i}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for i, call in enumerate(parsed.tool_calls)
            ]
        reason = ("tool_calls" if parsed.tool_calls else "stop") if stopped else "length"
        usage = {"prompt_tokens": len(request.prompt.tokens), "completion_tokens": len(row)}
        reply = _reply(request, message=message, finish_reason=reason, usage=usage)
        if parsed.problem is not None:
            reply["problem"] = parsed.problem
        replies.append(reply)
    return replies


def _reply(request: Request, **fields: Any) -> dict[str, Any]:
    named = {} if request.custom_id is None else {"custom_id": request.custom_id}
    return {"line": request.line, **named, **fields}

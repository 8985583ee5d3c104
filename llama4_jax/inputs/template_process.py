"""Jinja templates, rendered in a process of its own: a template is somebody's program, and may never end.

Run as a script by `chat_template`, which imports none of it. It needs Jinja alone, and lets itself be held to `MEMORY`
bytes and `CPU_SECONDS` for each request, where the system has such limits (Linux has both, macOS the second). A request
is a line of JSON, {"template": …, "variables": …, "most": …}, and so is its answer, {"text": …}, {"error": …} or
{"syntax": …, "line": …}; variables that are null: whether the template is Jinja at all. `most`: characters of the text.

The environment is that of transformers 5.23: the immutable sandbox, `tojson` without HTML's escapes, `raise_exception`,
`strftime_now`, loop controls and the `generation` block.
"""

import datetime
import functools
import json
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

MEMORY = 1 << 30
CPU_SECONDS = 5


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks replies for training: what is inside is rendered."""

    tags: set[str] = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        template = _compiled(request["template"])
    except jinja2.TemplateSyntaxError as error:
        return {"syntax": str(error.message)[:200], "line": error.lineno}
    if request["variables"] is None:
        return {"text": ""}
    pieces, size = [], 0
    for piece in template.generate(request["variables"]):
        pieces.append(piece)
        size += len(piece)
        if size > request["most"]:
            return {"error": f"it writes more than {request['most']:,} characters, many times what it was given"}
    return {"text": "".join(pieces)}


def _limit(seconds: int) -> None:
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    except (ImportError, ValueError, OSError):  # the system has no such limit: the caller's clock is left
        pass


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the caller's to stop
    for line in sys.stdin.buffer:
        _limit(CPU_SECONDS)
        try:
            answer = _answer(json.loads(line))
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except RecursionError:
            answer = {"error": "it is nested too deeply, or calls itself without end"}
        except Exception as error:  # whatever a template may raise
            answer = {"error": str(error)[:300] or type(error).__name__}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

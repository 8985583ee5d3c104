"""`llama4 serve`: checks what it was told, takes the port, loads and compiles, and answers until it is told to end."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from llama4_jax.infer.engine import Engine
from llama4_jax.model.llama4 import Llama4
from llama4_jax.processor import Processor
from llama4_jax.serve.app import Server
from llama4_jax.serve.http import HttpServer, is_local, listening, most_connections
from llama4_jax.serve.settings import Limits, Settings
from llama4_jax.serve_options import ServeOptions

_CONTEXT = 8192
_MAX_KEYS = 2**20  # bytes of the file


def serve(options: ServeOptions, *, read_processor: Callable[[], Processor], load: Callable[[], Llama4]) -> None:
    """Runs a server until SIGTERM or SIGINT, and what is then running has ended.

    Raises ValueError or OSError, before anything is loaded, for files and folders that are not there, keys that are
    none and a port that is taken; and as the two functions and `Engine` do.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    keys = () if options.api_key_file is None else read_keys(options.api_key_file)
    if options.allow_images_under is not None and not options.allow_images_under.is_dir():
        raise FileNotFoundError(f"--allow-images-under: there is no directory {options.allow_images_under}")
    if options.context is not None and options.context < 2:
        raise ValueError(f"--context must be at least 2, a prompt's token and a reply's, got {options.context}.")
    if not 0 <= options.drain_seconds < float("inf"):
        raise ValueError(f"--drain-seconds must be a number that is not negative, got {options.drain_seconds}.")
    for name, gib in (("prefix-gib", options.prefix_gib), ("device-prefix-gib", options.device_prefix_gib)):
        if not 0 <= gib < 2**30:
            raise ValueError(f"--{name} must be a number of GiB, 0 or more, got {gib}.")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 (a free one) to {2**16 - 1}, got {options.port}.")
    name = options.model.name or options.model.resolve().name
    with listening(options.host, options.port) as taken:
        port = taken.getsockname()[1]
        processor = read_processor()
        model = load()
        context = min(options.context or _CONTEXT, model.config.context_length)
        if options.context is not None and context < options.context:
            print(f"{name} is meant for {context:,} tokens at most: so long is the context.", file=sys.stderr)
        with _Bar(f"{name}: compiling for {options.slots} slots of {context:,} tokens") as report:
            engine = Engine(
                model,
                processor,
                slots=options.slots,
                context=context,
                cache=options.cache,
                max_waiting=options.max_waiting,
                device_prefix_bytes=int(options.device_prefix_gib * 2**30),
                host_prefix_bytes=int(options.prefix_gib * 2**30),
                report=report,
            )
        try:
            local = is_local(options.host)
            settings = Settings(
                model=name,
                context=context,
                vocab_size=model.config.vocab_size,
                api_keys=keys,
                images_under=options.allow_images_under,
                local=local,
                hosts=options.allow_host,
                limits=Limits(connections=most_connections(Limits.connections)),
            )
            server = Server(engine, processor, settings)
            server.jobs.grammars.prepare()
            if not local and not keys:
                print(f"anybody who can reach {options.host} may ask: --api-key-file limits that.", file=sys.stderr)
            host = f"[{options.host}]" if ":" in options.host else options.host
            print(f"ready: {name} at http://{host}:{port}/ (OpenAI's API: http://{host}:{port}/v1)", flush=True)
            HttpServer(server, drain_seconds=options.drain_seconds).run([taken])
        finally:
            engine.close()
    print(f"{name}: ended.", file=sys.stderr)


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line. Raises FileNotFoundError, and ValueError if it holds none."""
    if not path.is_file():
        raise FileNotFoundError(f"--api-key-file: no such file: {path}")
    with path.open("rb") as file:
        data = file.read(_MAX_KEYS + 1)
    try:
        keys = tuple(dict.fromkeys(line.strip() for line in data.decode().splitlines() if line.strip()))
    except UnicodeDecodeError:
        keys = ()
    if not keys or len(data) > _MAX_KEYS:
        raise ValueError(
            f"--api-key-file {path} should hold keys, one a line, in UTF-8 and at most {_MAX_KEYS:,} bytes."
        )
    return keys


class _Bar:
    """How many of how many are done, on stderr."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_) -> None:
        self._bar.stop()

"""Use a model: continue a prompt, talk with it, answer a file of requests, or score a text.

    python infer.py generate runs/tiny --prompt "def " --max-new-tokens 200 --temperature 0.7 --top-p 0.9
    python infer.py generate RUN --image a.jpg --image b.png --prompt "<|image|> <|image|> What changed?"
    python infer.py chat     RUN --image digit.png
    python infer.py batch    RUN --in requests.jsonl --out replies.jsonl
    python infer.py score    runs/tiny --file some.txt
    python infer.py generate runs/scout-int4 --cache int8 --prompt "def "  # what `llama4 quantize` made

The model is a run of train.py, what `llama4 convert` or `llama4 quantize` made, or a directory of Hugging Face's or
Meta's with a tokenizer in it. Results go to stdout, all else to stderr. When the arguments or files do not serve, one
line says why, and the exit code is 2. Where the package is installed without this file, `llama4 generate`, `chat`,
`batch` and `score` are the same commands.
"""

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llama4_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and how it is held."""

    model: tyro.conf.Positional[Path]  # directory of a run, or of Hugging Face's or Meta's
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16, but float32 on a CPU, where it is faster
    mesh: MeshConfig = dataclasses.field(
        default_factory=lambda: MeshConfig(data=1)
    )  # one device, or as many as it says
    keep_quantized: bool = False  # a published checkpoint's weights of few bits stay so; those of ours always do
    activations: Literal["auto", "float", "int8"] = "auto"  # what weights of few bits are multiplied with
    template: Literal["meta", "checkpoint"] = "meta"  # of messages: Meta's format, or the directory's Jinja template


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 200  # of a reply, at most
    temperature: float = 0.7  # 0: always the most likely token
    top_p: float = 1.0  # draw among the fewest tokens whose probabilities sum to this
    top_k: int | None = None  # draw among this many of the most likely tokens
    seed: int = 0  # of what is drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """How the past is held."""

    cache: Literal["float", "int8"] = "float"  # keys and values in --dtype, or in int8, of half bfloat16's size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Model, Sampling, Cache):
    """Continue a prompt, writing as it goes. With --image, --tools or --system, answer it instead: it is then a user's
    message. Each <|image|> in it is the place of an --image."""

    prompt: str
    num_samples: int = 1  # made together, written one after another
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()  # a picture, or with --frames a clip
    frames: int = 1  # at most so many stills of each clip: an animated picture, or a directory of frames
    system: str | None = None  # what the system says first
    tools: Path | None = None  # JSON file: a list of functions that the model may call, as OpenAI's API has them
    raw: bool = False  # continue the prompt in any case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Model, Sampling, Cache):
    """Talk with the model, a line at a time. /help says what else can be typed; Ctrl-C stops a reply."""

    max_new_tokens: int = 512  # of a reply, at most
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()  # a picture, which comes before the first message
    system: str | None = None  # what the system says first
    tools: Path | None = None  # JSON file: functions that the model may call, and you are asked for the results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(Model, Sampling, Cache):
    """Answer a file of requests, a line each, as OpenAI's API has them. The same command goes on where it stopped. The
    exit code is 1 if a line could not be answered; its reply says why."""

    in_: Annotated[Path, tyro.conf.arg(name="in")]  # JSON Lines of requests; what they do not say is as the flags here
    out: Path  # JSON Lines of replies
    images_under: Path | None = None  # pictures are read from this folder alone; else from that of the requests
    batch_size: int = 8  # requests answered together
    max_new_tokens: int = 512  # of a reply, at most
    temperature: float = 0.0  # 0: always the most likely token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Model):
    """Measure how well the model predicts a text: bits per byte, and nats a token by position."""

    file: Path  # of UTF-8 text
    json: bool = False  # write JSON


def main(arguments: list[str], prog: str = "infer.py") -> int:
    commands = {"generate": Generate, "chat": Chat, "batch": Batch, "score": Score}
    command = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog=prog, description=__doc__)
    make_devices(command.mesh)
    from llama4_jax.infer import interrupt

    try:
        if isinstance(command, Chat):
            with interrupt.watched(always=sys.stdin.isatty()):
                chat(command, prog)
            return 0
        with interrupt.watched(), interrupt.stoppable():
            match command:
                case Generate():
                    generate(command)
                case Batch():
                    return batch(command)
                case Score():
                    score(command)
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def make_devices(mesh: MeshConfig) -> None:
    """On a CPU a mesh is made of virtual devices. This must be said before the first device is asked for."""
    if mesh.named_size > 1:
        import jax

        with contextlib.suppress(RuntimeError):  # it was asked for: then there are as many as there are
            jax.config.update("jax_num_cpu_devices", mesh.named_size)


def read_processor(options: Model):
    """The model's processor. It is read fast, and most mistakes show in what it makes, so it comes before the model."""
    from llama4_jax import Processor

    return Processor.from_pretrained(options.model, template=options.template)


def load(options: Model):
    """The model, and the mesh it is on."""
    import jax
    from absl import logging

    from llama4_jax import from_pretrained
    from llama4_jax.compilation_cache import keep_compiled
    from llama4_jax.sharding import make_mesh

    logging.set_verbosity(logging.ERROR)  # Orbax warns that what is opened to be read is read-only
    keep_compiled()  # compiling takes longer than most replies
    devices = jax.devices()
    if -1 not in options.mesh.shape:
        devices = devices[: options.mesh.named_size]
    mesh = make_mesh(options.mesh, devices)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    how = {"keep_quantized": options.keep_quantized, "activations": options.activations}
    return from_pretrained(options.model, mesh=mesh, dtype=dtype, **how), mesh


def generate(options: Generate) -> None:
    from llama4_jax.infer.sampling import MOST_ROWS, check_sampling, check_whole

    check_whole("num_samples", options.num_samples, 1, MOST_ROWS)
    tools = read_tools_file(options.tools)
    pictures = [read_pictures(path, options.frames, name=f"--image {path}") for path in options.image]
    processor = read_processor(options)

    from llama4_jax import generate
    from llama4_jax.infer import interrupt
    from llama4_jax.inputs.tokenizer import StreamDecoder
    from llama4_jax.processor import illustrated

    answering = bool(pictures or tools or options.system is not None) and not options.raw
    if answering:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        user = {"role": "user", "content": illustrated(options.prompt, pictures)}
        prompt = processor.prompt([*system, user], tools=tools)
    else:
        prompt = processor.text_prompt(options.prompt, images=pictures)
    check_sampling(**sampling(options))
    model, mesh = load(options)
    import jax

    shown = "" if answering else options.prompt
    tokenizer = processor.tokenizer
    decoder = StreamDecoder(tokenizer, skip_special=True)
    started = time.perf_counter()
    first = None

    def write(gained: list[list[int]]) -> None:
        nonlocal first
        interrupt.check()
        if first is None:
            first = time.perf_counter()
            sys.stdout.write(shown if options.num_samples == 1 else "")
        if options.num_samples == 1:
            sys.stdout.write(decoder.feed(*gained[0]))
            sys.stdout.flush()

    with jax.set_mesh(mesh):
        replies = generate(
            model,
            [prompt.tokens] * options.num_samples,
            images=[prompt.tiles] * options.num_samples,
            stop_ids=tokenizer.stop_ids,
            on_tokens=write,
            cache=options.cache,
            **sampling(options),
        )
    finished = time.perf_counter()
    if options.num_samples == 1:
        print(decoder.flush())
    else:
        for i, reply in enumerate(replies, 1):
            text = tokenizer.decode(reply, skip_special=True)
            print(f"--- sample {i} of {options.num_samples}\n{shown}{text}")
    if tools:
        from llama4_jax.inputs.tool_calls import parse_reply

        for reply in replies:
            parsed = parse_reply(tokenizer.decode([t for t in reply if t not in tokenizer.stop_ids]), tools)
            say_calls(parsed.tool_calls, parsed.problem)
    later = sum(map(len, replies)) - len(replies)
    rate = f", then {later / (finished - first):,.1f} tokens/s" if later else ""
    print(f"[{later + len(replies)} tokens; the first after {first - started:.2f} s{rate}]", file=sys.stderr)


def say_calls(calls, problem: str | None) -> None:
    from llama4_jax.infer.chat import written_call

    for call in calls:
        print(f"[call: {written_call(call)}]", file=sys.stderr)
    if problem is not None:
        print(f"[{problem}]", file=sys.stderr)


def sampling(options: Sampling) -> dict:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)}


def read_tools_file(path: Path | None) -> tuple:
    """Raises FileNotFoundError if there is no such file; ValueError if it does not hold tools."""
    if path is None:
        return ()
    from llama4_jax.inputs.messages import read_tools
    from llama4_jax.untrusted_json import read_json

    if not path.is_file():
        raise FileNotFoundError(f"--tools: no such file: {path}")
    return read_tools(read_json(path), where=str(path))


def read_pictures(path: Path, frames: int = 1, *, name: str) -> list:
    """The picture, or up to so many stills of the clip."""
    from llama4_jax.inputs.picture_files import open_frames, open_picture

    return open_frames(path, frames, name=name) if frames != 1 else [open_picture(path, name=name)]


CHAT_HELP = """\
/image FILE     a picture, which comes before the next message
/system TEXT    begin anew, with this system message
/reset          begin anew, with the same system message
/quit           leave; so does Ctrl-D
Ctrl-C          stops a reply"""


def chat(options: Chat, prog: str) -> None:
    from llama4_jax.infer import chat as infer_chat
    from llama4_jax.infer import interrupt
    from llama4_jax.infer.sampling import check_sampling
    from llama4_jax.inputs.messages import Picture

    tools, system = read_tools_file(options.tools), options.system
    pictures = [picture for path in options.image for picture in read_pictures(path, name=f"--image {path}")]
    processor = read_processor(options)
    if pictures and processor.pictures is None:
        raise ValueError(f"--image {options.image[0]}: a picture was given, but this model reads text alone.")
    check_sampling(**sampling(options))
    with interrupt.stoppable():
        model, mesh = load(options)
    import jax

    conversation = infer_chat.Chat(
        model, processor, system=system, tools=tools, cache=options.cache, **sampling(options)
    )
    print(f"{options.model}: /image, /system, /reset, /quit, /help", file=sys.stderr)

    def show(event) -> None:
        if isinstance(event, str):
            sys.stdout.write(event)
            sys.stdout.flush()

    with jax.set_mesh(mesh):
        while (line := ask(f"[pictures: {len(pictures)}] > " if pictures else "> ")) is not None:
            command, _, rest = line.strip().partition(" ")
            try:
                match command:
                    case "":
                        pass
                    case "/quit":
                        return
                    case "/help":
                        print(CHAT_HELP, file=sys.stderr)
                    case "/reset" | "/system":
                        if command == "/system":
                            system = rest.strip() or None
                        conversation.reset(system)
                        pictures = []
                    case "/image":
                        if processor.pictures is None:
                            raise ValueError("/image: this model reads text alone.")
                        if not rest.strip():
                            raise ValueError("/image should be followed by the path of a picture.")
                        path = Path(rest.strip()).expanduser()
                        pictures += read_pictures(path, name=f"/image {path}")
                    case _ if command.startswith("/") and command[1:].isalpha():
                        raise ValueError(f"there is no {command}; /help says what there is.")
                    case _:
                        reply = conversation.say(*map(Picture, pictures), line, on_event=show)
                        pictures = []
                        end_reply(reply)
                        while reply.finish_reason == "tool_calls":
                            results = [ask("  its result: ") for _ in reply.message.tool_calls]
                            if None in results:
                                return
                            reply = conversation.answer(results, on_event=show)
                            end_reply(reply)
            except (ValueError, OSError) as error:
                print(f"{prog}: {error}", file=sys.stderr)


def end_reply(reply) -> None:
    print(flush=True)
    say_calls(reply.message.tool_calls, reply.problem)
    if reply.finish_reason == "interrupted":
        print("[stopped]", file=sys.stderr)
    elif reply.finish_reason == "length":
        print("[cut off: --max-new-tokens are reached, or the context is full]", file=sys.stderr)


def ask(prompt: str) -> str | None:
    """A line that the user types; None at the end of the input. Ctrl-C here takes back what was typed."""
    from llama4_jax.infer import interrupt

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # it gives `input` the arrow keys, and is not on every system
    interrupt.pressed()  # what came after the end of a reply has nothing to stop
    while True:
        try:
            with interrupt.stoppable(), interrupt.waking_readline():
                return input(prompt if sys.stdin.isatty() and sys.stdout.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            interrupt.pressed()
            print(file=sys.stderr)


def batch(options: Batch) -> int:
    from llama4_jax.infer.batch import answer_file, check_files

    how = {"batch_size": options.batch_size, "images_under": options.images_under, **sampling(options)}
    check_files(options.in_, options.out, **how)
    processor = read_processor(options)
    model, mesh = load(options)
    import jax

    def report(progress) -> None:
        print(f"{progress.done + progress.earlier} answered, {progress.errors} of them by an error", file=sys.stderr)

    with jax.set_mesh(mesh):
        done = answer_file(model, processor, options.in_, options.out, cache=options.cache, report=report, **how)
    before = f", {done.earlier} of them before" if done.earlier else ""
    print(f"{options.out}: {done.done + done.earlier} replies{before}, {done.errors} errors")
    return 1 if done.errors else 0


def score(options: Score) -> None:
    text = read_text(options.file)
    tokenizer = read_processor(options).tokenizer
    model, mesh = load(options)
    import jax

    from llama4_jax.infer.score import bits_per_byte, by_position, score

    tokens = tokenizer.encode(text, bos=True)
    num_bytes, context = int(tokenizer.token_bytes(tokens).sum()), model.config.context_length
    documents = -(-(len(tokens) - 1) // context)
    if documents > 1:
        print(
            f"{options.file} has more tokens than the model's context of {context:,}: "
            f"it is scored as {documents} documents, one after another.",
            file=sys.stderr,
        )
    with jax.set_mesh(mesh):
        nll = score(model, tokens)
    spans = by_position(nll, context)
    figures = {
        "file": str(options.file),
        "bytes": num_bytes,
        "tokens": len(nll),
        "documents": documents,
        "bits_per_byte": bits_per_byte(nll, num_bytes),
        "nats_per_token": float(nll.mean()),
        "by_position": [span._asdict() for span in spans],
    }
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"{options.file}: {num_bytes:,} bytes, {len(nll):,} tokens")
    print(f"{figures['bits_per_byte']:.4f} bits per byte, {figures['nats_per_token']:.4f} nats a token\n")
    print(f"{'tokens before it':>20} {'tokens':>10} {'nats a token':>13}")
    for span in spans:
        past = f"{span.first}" if span.first == span.last else f"{span.first} to {span.last}"
        print(f"{past:>20} {span.tokens:>10,} {span.nats:>13.4f}")


def read_text(path: Path) -> str:
    """Raises FileNotFoundError if there is no such file; ValueError if it is empty, or not UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    if not text:
        raise ValueError(f"{path} is empty: there is nothing to score.")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Use a model: continue a prompt, talk with it, answer a file of requests, or score a text.

    python infer.py generate runs/tiny --prompt "def " --max-new-tokens 200 --temperature 0.7 --top-p 0.9
    python infer.py generate RUN --image a.jpg --image b.png --prompt "<|image|> <|image|> What changed?"
    python infer.py chat     RUN --image digit.png
    python infer.py batch    RUN --in requests.jsonl --out replies.jsonl
    python infer.py score    runs/tiny --file some.txt

The model is a run of train.py, or a directory of Hugging Face's or Meta's with a tokenizer in it. Results go to stdout,
all else to stderr. When the arguments or files do not serve, one line says why, and the exit code is 2.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and how it is held."""

    model: tyro.conf.Positional[Path]  # directory of a run, or of Hugging Face's
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16, but float32 on a CPU, where it is faster
    mesh: MeshConfig = dataclasses.field(
        default_factory=lambda: MeshConfig(data=1)
    )  # one device, or as many as it says


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 200  # of a reply, at most
    temperature: float = 0.7  # 0: always the most likely token
    top_p: float = 1.0  # draw among the fewest tokens whose probabilities sum to this
    top_k: int | None = None  # draw among this many of the most likely tokens
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Model, Sampling):
    """Continue a prompt, writing as it goes. With pictures, tools or a system message, answer it instead: it is then a
    user's message. Each <|image|> in it is the place of a picture."""

    prompt: str
    num_samples: int = 1  # made together, written one after another
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()  # a picture, or with --frames a clip; may be repeated
    frames: int = 1  # stills of each clip: an animated picture, or a directory of frames
    system: str | None = None  # what the system says first
    tools: Path | None = None  # JSON file: a list of functions that the model may call, as OpenAI's API has them
    raw: bool = False  # continue the prompt as it is, also with pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Model, Sampling):
    """Talk with the model. /help says what can be typed; Ctrl-C stops a reply."""

    max_new_tokens: int = 512
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()  # pictures for the first message
    system: str | None = None  # what the system says first
    tools: Path | None = None  # JSON file: functions that the model may call; you are asked for their results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(Model, Sampling):
    """Answer a file of requests, a line each, as OpenAI's API has them. The same command goes on where it stopped."""

    in_: Annotated[Path, tyro.conf.arg(name="in")]  # JSON Lines of requests; what they do not say is as the flags here
    out: Path  # JSON Lines of replies
    batch_size: int = 8  # requests answered together
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Model):
    """Measure how well the model predicts a text: bits per byte, and nats a token by position."""

    file: Path  # of UTF-8 text
    json: bool = False  # write JSON


def main(arguments: list[str]) -> int:
    commands = {"generate": Generate, "chat": Chat, "batch": Batch, "score": Score}
    command = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="infer.py", description=__doc__)
    try:
        match command:
            case Generate():
                generate(command)
            case Chat():
                chat(command)
            case Batch():
                return batch(command)
            case Score():
                score(command)
    except (ValueError, OSError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def load(options: Model):
    """The model, the mesh it is on, and its processor."""
    import jax
    from absl import logging

    from llama4_jax import Processor, from_pretrained
    from sharding import make_mesh

    logging.set_verbosity(logging.ERROR)  # Orbax warns that what is opened to be read is read-only
    # On a CPU a mesh is made of virtual devices. This must be said before the first device is asked for.
    if options.mesh.named_size > 1:
        jax.config.update("jax_num_cpu_devices", options.mesh.named_size)
    # Compiling takes longer than most replies, so the next start finds what this one compiled.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "llama4_jax"))
    devices = jax.devices()
    if -1 not in options.mesh.shape:
        devices = devices[: options.mesh.named_size]
    mesh = make_mesh(options.mesh, devices)
    processor = Processor.from_pretrained(options.model)  # it is read fast, and may lack something
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    model = from_pretrained(options.model, mesh=mesh, dtype=dtype)
    return model, mesh, processor


def generate(options: Generate) -> None:
    if options.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {options.num_samples}.")
    tools = read_tools_file(options.tools)
    pictures = read_pictures(options.image, options.frames)
    model, mesh, processor = load(options)
    import jax

    from llama4_jax import generate
    from llama4_jax.inputs.tokenizer import StreamDecoder
    from llama4_jax.processor import illustrated

    answering = bool(pictures or tools or options.system is not None) and not options.raw
    if answering:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        user = {"role": "user", "content": illustrated(options.prompt, pictures)}
        prompt = processor.prompt([*system, user], tools=tools)
    else:
        prompt = processor.text_prompt(options.prompt, images=pictures)
    shown = "" if answering else options.prompt
    tokenizer = processor.tokenizer
    decoder = StreamDecoder(tokenizer, skip_special=True)
    started = time.perf_counter()
    first = None

    def write(gained: list[list[int]]) -> None:
        nonlocal first
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
        for reply in replies:
            say_calls(processor.chat.decode_reply(reply).tool_calls)
    later = sum(map(len, replies)) - len(replies)
    rate = f", then {later / (finished - first):,.1f} tokens/s" if later else ""
    print(f"[{later + len(replies)} tokens; the first after {first - started:.2f} s{rate}]", file=sys.stderr)


def say_calls(calls) -> None:
    from llama4_jax.infer.chat import written_call

    for call in calls:
        print(f"[call: {written_call(call)}]", file=sys.stderr)


def sampling(options: Sampling) -> dict:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(Sampling)}


def read_tools_file(path: Path | None) -> tuple:
    """Raises FileNotFoundError if there is no such file; ValueError if it does not hold tools."""
    if path is None:
        return ()
    from llama4_jax.inputs.messages import read_tools

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error
    return read_tools(value, where=str(path))


def read_pictures(paths: tuple[Path, ...], frames: int = 1) -> list:
    from llama4_jax.inputs.picture_files import open_frames, open_picture

    if frames > 1:
        return [still for path in paths for still in open_frames(path, frames, name=f"--image {path}")]
    return [open_picture(path, name=f"--image {path}") for path in paths]


CHAT_HELP = """\
/image FILE     a picture for the next message, which it comes before
/system TEXT    begin anew with this system message
/reset          begin anew
/quit           leave; so does Ctrl-D
Ctrl-C          stops a reply"""


def chat(options: Chat) -> None:
    tools = read_tools_file(options.tools)
    pictures = read_pictures(options.image)
    model, mesh, processor = load(options)
    import jax

    from llama4_jax.infer import chat as infer_chat
    from llama4_jax.inputs.messages import Picture

    if pictures and processor.pictures is None:
        raise ValueError(f"--image {options.image[0]}: a picture was given, but this model reads text alone.")
    conversation = infer_chat.Chat(model, processor, system=options.system, tools=tools, **sampling(options))
    print(f"{options.model}: {CHAT_HELP.splitlines()[0].split()[0]}, /system, /reset, /quit, /help", file=sys.stderr)

    def show(event) -> None:
        if isinstance(event, str):
            sys.stdout.write(event)
            sys.stdout.flush()

    with jax.set_mesh(mesh):
        while True:
            line = ask(f"({len(pictures)} picture{'s' * (len(pictures) > 1)}) > " if pictures else "> ")
            command, _, rest = (line or "/quit").strip().partition(" ")
            try:
                match command:
                    case "":
                        continue
                    case "/quit" | "/exit":
                        return
                    case "/help":
                        print(CHAT_HELP, file=sys.stderr)
                    case "/reset":
                        conversation.reset(options.system)
                        pictures = []
                    case "/system":
                        conversation.reset(rest or None)
                        pictures = []
                    case "/image":
                        if processor.pictures is None:
                            raise ValueError("this model reads text alone.")
                        pictures += read_pictures((Path(rest.strip()).expanduser(),))
                    case _ if command.startswith("/") and command[1:].isalpha():
                        print(f"there is no {command}; /help says what there is", file=sys.stderr)
                    case _:
                        said = [*map(Picture, pictures), line.rstrip("\n")]
                        reply = conversation.say(*said, on_event=show)
                        pictures = []
                        end_reply(reply)
                        while reply.finish_reason == "tool_calls":
                            results = []
                            for call in reply.message.tool_calls:
                                result = ask(f"{infer_chat.written_call(call)} → ")
                                if result is None:
                                    return
                                results.append(result.strip())
                            reply = conversation.answer(results, on_event=show)
                            end_reply(reply)
            except (ValueError, OSError) as error:
                print(f"infer.py: {error}", file=sys.stderr)


def end_reply(reply) -> None:
    print(flush=True)
    if reply.finish_reason == "interrupted":
        print("[stopped]", file=sys.stderr)
    elif reply.finish_reason == "length":
        print("[cut off: --max-new-tokens, or the context, is full]", file=sys.stderr)
    if reply.problem is not None:
        print(f"[this looks like a call, and is none: {reply.problem}]", file=sys.stderr)


def ask(prompt: str) -> str | None:
    """A line that the user types; None at the end of the input. Ctrl-C here takes back what was typed."""
    while True:
        try:
            return input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)


def batch(options: Batch) -> int:
    if not options.in_.is_file():
        raise FileNotFoundError(f"--in: no such file: {options.in_}")
    model, mesh, processor = load(options)
    import jax

    from llama4_jax.infer.batch import answer_file

    def report(progress) -> None:
        print(f"{progress.done + progress.earlier} answered, {progress.errors} of them by an error", file=sys.stderr)

    with jax.set_mesh(mesh):
        done = answer_file(
            model,
            processor,
            options.in_,
            options.out,
            batch_size=options.batch_size,
            report=report,
            **sampling(options),
        )
    before = f", {done.earlier} of them before" if done.earlier else ""
    print(f"{options.out}: {done.done + done.earlier} replies{before}, {done.errors} errors")
    return 1 if done.errors else 0


def score(options: Score) -> None:
    text = read_text(options.file)
    model, mesh, processor = load(options)
    tokenizer = processor.tokenizer
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

"""Use a model: continue a prompt, or score a text.

    python infer.py generate runs/tiny --prompt "def " --max-new-tokens 200 --temperature 0.7 --top-p 0.9
    python infer.py score    runs/tiny --file some.txt

The model is a run of train.py, or a Hugging Face directory with a tokenizer.model in it. Results go to stdout, all else
to stderr. When the arguments or files do not serve, one line says why, and the exit code is 2.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Literal

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
class Generate(Model):
    """Continue a prompt, writing as it goes."""

    prompt: str
    max_new_tokens: int = 200
    temperature: float = 0.7  # 0: always the most likely token
    top_p: float = 1.0  # draw among the fewest tokens whose probabilities sum to this
    top_k: int | None = None  # draw among this many of the most likely tokens
    seed: int = 0
    num_samples: int = 1  # made together, written one after another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Model):
    """Measure how well the model predicts a text: bits per byte, and nats a token by position."""

    file: Path  # of UTF-8 text
    json: bool = False  # write JSON


def main(arguments: list[str]) -> int:
    commands = {"generate": Generate, "score": Score}
    command = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="infer.py", description=__doc__)
    try:
        if isinstance(command, Generate):
            generate(command)
        else:
            score(command)
    except (ValueError, OSError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def load(options: Model):
    """The model, the mesh it is on, and its tokenizer."""
    import jax
    from absl import logging

    from llama4_jax import from_pretrained
    from llama4_jax.inputs.tokenizer import load_tokenizer
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
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    model = from_pretrained(options.model, mesh=mesh, dtype=dtype)
    return model, mesh, load_tokenizer(options.model)


def generate(options: Generate) -> None:
    if options.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {options.num_samples}.")
    model, mesh, tokenizer = load(options)
    import jax

    from llama4_jax import generate
    from llama4_jax.inputs.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer, skip_special=True)
    started = time.perf_counter()
    first = None

    def write(gained: list[list[int]]) -> None:
        nonlocal first
        if first is None:
            first = time.perf_counter()
            sys.stdout.write(options.prompt if options.num_samples == 1 else "")
        if options.num_samples == 1:
            sys.stdout.write(decoder.feed(*gained[0]))
            sys.stdout.flush()

    with jax.set_mesh(mesh):
        replies = generate(
            model,
            [tokenizer.encode(options.prompt, bos=True)] * options.num_samples,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            stop_ids=tokenizer.stop_ids,
            on_tokens=write,
        )
    finished = time.perf_counter()
    if options.num_samples == 1:
        print(decoder.flush())
    else:
        for i, reply in enumerate(replies, 1):
            text = tokenizer.decode(reply, skip_special=True)
            print(f"--- sample {i} of {options.num_samples}\n{options.prompt}{text}")
    later = sum(map(len, replies)) - len(replies)
    rate = f", then {later / (finished - first):,.1f} tokens/s" if later else ""
    print(f"[{later + len(replies)} tokens; the first after {first - started:.2f} s{rate}]", file=sys.stderr)


def score(options: Score) -> None:
    text = read_text(options.file)
    model, mesh, tokenizer = load(options)
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

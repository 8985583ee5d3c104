"""What fewer bits cost, and what they save: a model of text and one that reads digits, in each precision.

    python train.py tiny && python train.py tiny_vision
    python benchmarks/precision.py runs/tiny runs/tiny_vision

Prints a table in Markdown. Both runs are quantized anew, by the function of `llama4 quantize`; what is not quantized is
then in bfloat16. Bits per byte and perplexity (of a token) are those of held-out text, read through the cache, as in
decoding; right answers are those of `benchmarks/digits.py`; tokens/s are of one greedy row, all precisions in turn,
medians. Products are of float32 unless the precision is bfloat16, which is what `infer.py` chooses on a CPU. Where the
groups of int4 do not divide a model's matrices there is no figure, and a line below the table says so.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from digits import answers, heldout
from flax import nnx

import llama4_jax
from llama4_jax.config import RunConfig, from_json
from llama4_jax.data.documents import split
from llama4_jax.data.encode import Encoder
from llama4_jax.data.mixture import heldout_documents
from llama4_jax.data.sources import open_source
from llama4_jax.infer.generate import CACHES
from llama4_jax.inputs.tokenizer import load_tokenizer
from llama4_jax.model.config import ModelConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.quantized import is_of_decoder
from llama4_jax.ops.cross_entropy import token_nll
from llama4_jax.ops.quantization import Scheme
from llama4_jax.weights.quantize import quantize
from llama4_jax.weights.source import open_weights
from llama4_jax.weights.table import rows

BATCH = 16
DECODED = 128  # tokens of the row that is timed


class Way(NamedTuple):
    """A precision to be measured."""

    name: str
    dtype: str = "float32"  # of products, and of the weights that are not quantized if none is
    scheme: Scheme | None = None
    cache: str = "float"


class Made(NamedTuple):
    """A model in one way."""

    model: Llama4
    size: int  # of its weights, in bytes


def ways(groups: list[int]) -> list[Way]:
    return [
        Way("float32"),
        Way("bfloat16", dtype="bfloat16"),
        Way("fp8", scheme=Scheme("fp8")),
        Way("int8", scheme=Scheme("int8")),
        *(Way(f"int4, groups of {group}", scheme=Scheme("int4", group)) for group in groups),
        Way("float32, cache int8", cache="int8"),
        Way(f"int4, groups of {groups[-1]}, cache int8", scheme=Scheme("int4", groups[-1]), cache="int8"),
    ]


def misfit(config: ModelConfig, scheme: Scheme | None) -> str | None:
    """The first matrix that the scheme's groups do not divide, in words."""
    group = 1 if scheme is None or scheme.group is None else scheme.group
    for row in rows(config):
        if row.contracted and is_of_decoder(row.ours) and row.num_inputs % group:
            return f"{scheme} do not divide the {row.num_inputs} inputs of {row.ours}"
    return None


def make(run: Path, way: Way, folder: Path) -> Made:
    if way.scheme is None:
        weights, itemsize = open_weights(run), np.dtype(jnp.dtype(way.dtype)).itemsize
        size = itemsize * sum(math.prod(weights.shape(name)) for name in weights.names)
        return Made(llama4_jax.from_pretrained(run, dtype=way.dtype), size)
    directory = folder / f"{run.name} {way.scheme}"
    if not directory.exists():
        quantize(run, directory, way.scheme, dtype="bfloat16")
    weights = open_weights(directory)
    size = sum(math.prod(weights.shape(name)) * weights.dtype(name).itemsize for name in weights.names)
    return Made(llama4_jax.from_pretrained(directory, dtype=way.dtype), size)


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Rows(NamedTuple):
    """Pieces of held-out documents, filled up with padding."""

    tokens: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # int32 [B, T]
    counts: np.ndarray  # int32 [B]: without the padding
    target_bytes: int


def heldout_rows(run: Path, config: RunConfig) -> Iterator[Rows]:
    """As many batches as training evaluates on."""
    sources = [split(open_source(spec), config.data.heldout_fraction)[1] for spec in config.data.sources]
    encode, length = Encoder(load_tokenizer(run)), config.data.seq_len
    pieces = (
        tuple(part[start : start + length] for part in (piece.tokens, piece.targets, piece.target_bytes))
        for piece in map(encode, heldout_documents(sources))
        for start in range(0, len(piece), length)
    )
    for _ in range((config.eval_batches or sys.maxsize) * config.data.batch_size // BATCH):
        some = list(itertools.islice(pieces, BATCH))
        if len(some) < BATCH:
            return
        pad = [[(0, length - len(part)) for part in piece] for piece in some]
        tokens, targets = (
            np.stack([np.pad(piece[i], width[i]) for piece, width in zip(some, pad, strict=True)]) for i in (0, 1)
        )
        counts = np.array([len(piece[0]) for piece in some], np.int32)
        yield Rows(tokens, targets, counts, sum(int(piece[2].sum()) for piece in some))


@functools.partial(jax.jit, static_argnames=("graphdef", "cache"))
def _nats(graphdef, state, tokens, targets, counts, cache: str):
    model = nnx.merge(graphdef, state)
    hidden, _ = model.step(tokens, model.empty_cache(*tokens.shape, dtype=CACHES[cache]), counts)
    nats = token_nll(hidden, model.lm_head.kernel[...], targets)
    return jnp.sum(jnp.where(jnp.arange(tokens.shape[1]) < counts[:, None], nats, 0))


def of_text(model: Llama4, cache: str, batches: list[Rows]) -> tuple[float, float]:
    """Bits per byte, and the perplexity of a token."""
    graphdef, state = nnx.split(model)
    nats = sum(float(_nats(graphdef, state, *rows[:3], cache)) for rows in batches)
    tokens, length = sum(int(rows.counts.sum()) for rows in batches), sum(rows.target_bytes for rows in batches)
    return nats / math.log(2) / length, math.exp(nats / tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Digits, and time


def right_answers(model: Llama4, cache: str, run: Path, config: RunConfig) -> list[float]:
    """Shares, of one page and of two."""
    processor, shares = llama4_jax.Processor.from_pretrained(run), []
    for pairs in (False, True):
        asked = heldout(pairs, config.data.heldout_fraction)
        replies = answers(model, processor, asked, cache=cache)
        # Of a pair, the last word: first or second.
        right = [a.split()[-1:] == d.messages[1].text.split()[-1:] for a, d in zip(replies, asked, strict=True)]
        shares.append(float(np.mean(right)))
    return shares


def rates(models: dict[Way, Llama4], rounds: int) -> dict[Way, list[float]]:
    """Tokens/s of each, in every round."""
    found: dict[Way, list[float]] = {way: [] for way in models}
    for i in range(rounds + 1):
        for way, model in models.items():
            started = time.perf_counter()
            llama4_jax.generate(model, [[1] * 32], max_new_tokens=DECODED, cache=way.cache)
            if i:  # the first compiles
                found[way].append(DECODED / (time.perf_counter() - started))
    return found


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="directory of a run on text")
    parser.add_argument("digits", type=Path, help="directory of a run of configs/tiny_vision.py")
    parser.add_argument("--groups", type=int, nargs="+", default=[128, 32], help="of int4: inputs that share a scale")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding")
    options = parser.parse_args()
    runs = (options.text, options.digits)
    of_text_run, of_digits_run = (from_json((run / "config.json").read_text()) for run in runs)
    batches = list(heldout_rows(options.text, of_text_run))
    models: dict[Way, Llama4] = {}
    lines: dict[Way, list[str]] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ways(options.groups):
            print(way.name, file=sys.stderr)
            cells = ["–"] * 5
            for run, config in zip(runs, (of_text_run, of_digits_run), strict=True):
                reason = misfit(config.model, way.scheme)
                if reason is not None:
                    notes.append(f"{run.name}: {reason}.")
                    continue
                made = make(run, way, Path(folder))
                if run == options.text:
                    models[way] = made.model
                    bits, perplexity = of_text(made.model, way.cache, batches)
                    cells[:3] = [f"{made.size / 2**20:.2f} MiB", f"{bits:.4f}", f"{perplexity:.4f}"]
                else:
                    cells[3:] = [f"{share:.1%}" for share in right_answers(made.model, way.cache, run, config)]
            lines[way] = cells
        measured = rates(models, options.rounds)
    base = next(iter(models))
    print("| weights | size | bits per byte | perplexity | digit read | larger of two | tokens/s (of float32's) |")
    print("|---|---|---|---|---|---|---|")
    for way, cells in lines.items():
        speed = "–"
        if way in measured:
            ratio = statistics.median(a / b for a, b in zip(measured[way], measured[base], strict=True))
            low, high = min(measured[way]), max(measured[way])
            speed = f"{statistics.median(measured[way]):,.0f} ({low:,.0f}–{high:,.0f}), {ratio:.2f}×"
        print(f"| {' | '.join([way.name, *cells, speed])} |")
    tokens = sum(int(rows.counts.sum()) for rows in batches)
    pages = len(heldout(False, of_digits_run.data.heldout_fraction))
    print(f"\nHeld out: {tokens:,} tokens of text, {pages} pages for each question.")
    for note in notes:
        print(f"\n– {note}")


if __name__ == "__main__":
    main()

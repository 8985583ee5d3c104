"""What is compared with what: options, and the tokens that follow from them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from tyro.conf import Positional

from llama4_jax.inputs.tokenizer import load_tokenizer
from llama4_jax.model.config import ModelConfig
from llama4_jax.ops.quantization import Scheme
from llama4_jax.weights.parity.plot import require_matplotlib
from llama4_jax.weights.parity.report import BFLOAT16_TOLERANCE, Boundaries

# Of a part alone, by the number format of ours. Measured in the worst of seven tiny models: 9e-7 and 1.7e-2.
TOLERANCE = {"float32": 1e-5, "bfloat16": BFLOAT16_TOLERANCE}

_MOST_TOKENS = 256  # of a row, unless asked for
_LEAST_TOKENS = 64
_BEYOND = 32  # positions past a boundary, where tokens are advised


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """Run a reference and ours on the same tokens, layer by layer, and say where they differ and why.

    Quantized weights are meant to differ from those that they were made of: beside these it is said by how much, and
    they pass if each is one of these rounded and our products with them are right. Exit code 0: passed, 1: not.
    """

    # What the reference computes: a Hugging Face or Meta directory, or one of ours.
    path: Positional[Path]
    # What ours computes, if not the same directory.
    against: Path | None = None
    # A file of what passed through another program's model, to stand for the reference: see docs/parity.md.
    against_activations: Path | None = None
    # The code that runs `path`. auto: transformers for a Hugging Face directory, Meta's llama-models for a Meta
    # directory, ours in float32 for one of ours.
    reference: Literal["auto", "transformers", "meta", "ours"] = "auto"
    # Length of a row. None: enough to pass two chunks and temperature buckets, but no more than 256.
    tokens: int | None = None
    # Rows.
    batch: int = 2
    # Of random tokens.
    seed: int = 0
    # A file to take the tokens from instead, by the tokenizer in `path`.
    text: Path | None = None
    # Of our parameters and computation.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # How many of a row's last positions ours also decodes one by one, through the cache; 0: none.
    decode: int = 32
    # Compare the gradients of the next-token loss too.
    grads: bool = False
    # Write the report to this file.
    json: Path | None = None
    # Write a picture to this file: KL and the largest logit difference by position.
    plot: Path | None = None
    # Of a part of the model alone, as a fraction of its output's largest magnitude. None: 1e-5 in float32, 5e-2 in
    # bfloat16.
    tolerance: float | None = None


def tolerance_of(options: ParityOptions, schemes: Iterable[Scheme]) -> float:
    """Of a part of a candidate with weights of these schemes. Weights of int8 may be multiplied with numbers rounded to
    int8, by `ops.quantized_matmul`: 2.5e-2 in the worst of the seven."""
    if options.tolerance is not None:
        return options.tolerance
    rounds = any(scheme.weights == "int8" for scheme in schemes)
    return max(TOLERANCE[options.dtype], BFLOAT16_TOLERANCE if rounds else 0)


def check(options: ParityOptions) -> None:
    if options.tokens is not None and options.tokens < 2:
        raise ValueError(f"--tokens must be at least 2, one to predict another from; got {options.tokens}.")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}.")
    if options.decode < 0:
        raise ValueError(f"--decode must be 0 or more, got {options.decode}.")
    if options.tolerance is not None and not options.tolerance > 0:
        raise ValueError(f"--tolerance must be positive, got {options.tolerance}.")
    if options.against_activations is not None:
        fixed = ("against", "reference", "tokens", "batch", "seed", "text", "grads")
        given = [name for name in fixed if getattr(options, name) != ParityOptions.__dataclass_fields__[name].default]
        if given:
            raise ValueError(
                f"--against-activations has its own reference and tokens: leave out "
                f"{', '.join(f'--{name}' for name in given)}."
            )
    if options.plot is not None:
        require_matplotlib()


def row_length(options: ParityOptions, config: ModelConfig) -> int:
    """Of a row in tokens."""
    if options.tokens is not None:
        if options.tokens > config.context_length:
            raise ValueError(
                f"--tokens is {options.tokens}, but the context of {options.path} is {config.context_length} tokens."
            )
        return options.tokens
    return default_length(config)


def default_length(config: ModelConfig) -> int:
    """Tokens of a row that pass two chunks and temperature buckets, if that many can be afforded."""
    wanted = [_LEAST_TOKENS]
    if config.attention_chunk is not None:
        wanted.append(2 * config.attention_chunk + config.attention_chunk // 2)
    if any(spec.query_scale == "temperature" for spec in config.layers):
        wanted.append(2 * config.temperature_floor)
    return min(config.context_length, _MOST_TOKENS, max(wanted))


def make_tokens(options: ParityOptions, config: ModelConfig, length: int) -> tuple[Int[np.ndarray, "B T"], str]:
    shape = (options.batch, length)
    if options.text is None:
        random = np.random.default_rng(options.seed).integers(0, config.vocab_size, shape)
        return random, f"random, seed {options.seed}"
    if not options.text.is_file():
        raise FileNotFoundError(f"no such file: {options.text}")
    try:
        text = options.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.text} is not UTF-8: {error}.") from error
    ids = np.array(load_tokenizer(options.path).encode(text), np.int64)
    if ids.size < shape[0] * shape[1]:
        raise ValueError(
            f"{options.text} has {ids.size} tokens, but {shape[0]} rows of {shape[1]} are {shape[0] * shape[1]}. Give "
            f"a longer text, or a smaller --tokens or --batch."
        )
    if ids.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {options.path} gives the id {ids.max()}, but the model's vocabulary has "
            f"{config.vocab_size} ids: they do not belong together."
        )
    return ids[: shape[0] * shape[1]].reshape(shape), f"the first of {options.text}"


def boundaries(config: ModelConfig, length: int) -> Boundaries:
    chunk = config.attention_chunk if any(spec.chunk is not None for spec in config.layers) else None
    floor = config.temperature_floor if any(s.query_scale == "temperature" for s in config.layers) else None
    chunks = [] if chunk is None else list(range(chunk, length, chunk))
    # position p is in bucket (p + 1) // floor
    temperatures = [] if floor is None else list(range(floor - 1, length, floor))
    missed = []
    if chunk is not None and not chunks:
        missed.append(f"the first chunk boundary, at position {chunk}: --tokens {chunk + _BEYOND} goes beyond")
    if floor is not None and not temperatures:
        beyond = f"--tokens {floor + _BEYOND} goes beyond"
        missed.append(f"the first step of the temperature, at position {floor - 1}: {beyond}")
    return Boundaries(chunks, temperatures, missed)

"""How fast slices of Scout and Maverick read and decode, with real widths and the whole head, by the engine's own two
compiled programs.

What decoding must read is known (`model.flops.decode_bytes`): time is told as the share of the copy bandwidth that the
card was measured to have. Four of Scout's layers are what repeats 12 times in all of it, so that all 48 follow; of
Maverick one card holds a layer with 128 experts and a dense one in bfloat16, and four layers in int4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpu_parts.fill import filled, filled_state
from gpu_parts.report import Case, Figures, Out, program_bytes, timed
from gpu_parts.train import TINY, ceiling, chip
from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.infer import engine_programs as programs
from llama4_jax.infer.engine_programs import Pieces
from llama4_jax.infer.rows import rows_of, settings_of, stacked
from llama4_jax.mesh_search import Work, estimate
from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.presets import preset
from llama4_jax.model.quantized import quantized
from llama4_jax.ops.quantization import Scheme
from llama4_jax.sharding import MeshConfig
from llama4_jax.sharding.chips import topology
from llama4_jax.train.step import make_model

WEIGHTS = {"bfloat16": None, "int8": Scheme("int8"), "int4": Scheme("int4", 128), "fp8": Scheme("fp8")}
PRECISION = Precision(params="bfloat16", compute="bfloat16")
PIECE = 512  # of a prompt, as `generate` reads it

# (model, weights, rows, held tokens), the most telling first.
CASES = [
    *[("scout", weights, 1, 8192) for weights in ("int4", "bfloat16", "int8", "fp8")],
    *[("scout", weights, rows, 8192) for rows in (8, 64) for weights in ("int4", "bfloat16")],
    *[("scout", weights, 1, 131_072) for weights in ("int4", "bfloat16")],
    *[("maverick", weights, 1, 8192) for weights in ("int4", "bfloat16")],
    *[("scout", weights, rows, 8192) for rows in (8, 64) for weights in ("int8", "fp8")],
    *[("scout", "int4", rows, 1024) for rows in (1, 8, 64)],
    *[("maverick", weights, rows, 8192) for rows in (8, 64) for weights in ("int4", "bfloat16")],
    *[("maverick", weights, 1, 8192) for weights in ("int8", "fp8")],
    *[("scout", weights, rows, 131_072) for rows in (8, 64) for weights in ("int4", "bfloat16")],
    *[("scout", weights, rows, 1024) for rows in (1, 8, 64) for weights in ("bfloat16", "int8", "fp8")],
    *[("scout", weights, rows, 131_072) for rows in (1, 8, 64) for weights in ("int8", "fp8")],
    *[("maverick", "int4", rows, held) for rows in (1, 8, 64) for held in (1024, 131_072)],
]


def run(out: Out, tiny: bool) -> None:
    chosen = [("scout", weights, rows, 96) for weights, rows in (("int4", 2), ("bfloat16", 1))] if tiny else CASES
    first, rest = (chosen[:1], chosen[1:]) if tiny else (chosen[:4], chosen[4:])
    out.cases([decode_case(out, *case, tiny) for case in first])
    for weights in ("int4",) if tiny else ("int4", "bfloat16"):
        out.cases([prefill_case(out, weights, tiny)])
    out.cases([decode_case(out, *case, tiny) for case in rest])


def slice_of(name: str, weights: str, tiny: bool) -> ModelConfig:
    """Four layers, which repeat in the whole model; of Maverick two, where four are too large."""
    if tiny:
        changes = TINY | {"embed_dim": 128, "expert_mlp_dim": 128, "mlp_dim": 128, "head_dim": 32}
    elif name == "maverick" and weights != "int4":
        changes = {"num_layers": 2}
    else:
        changes = {"num_layers": 4}
    return dataclasses.replace(preset(name), **changes)


@functools.cache
def shapes_of(model: ModelConfig, weights: str) -> tuple[nnx.GraphDef, nnx.State]:
    config = RunConfig(name="gpu", model=model, data=DataConfig(seq_len=64, batch_size=1), steps=1, scan_layers=False,
                       precision=PRECISION)  # fmt: skip
    scheme = WEIGHTS[weights]

    def make():
        made = make_model(config, 0)
        return made if scheme is None else quantized(made, scheme)

    return nnx.split(nnx.eval_shape(make))


_held: dict[tuple[ModelConfig, str], nnx.State] = {}


def weights_of(model: ModelConfig, weights: str) -> nnx.State:
    """Kept for the next case of the same model. Another's are given up first: there is no room for both."""
    if (model, weights) not in _held:
        _held.clear()
        _held[model, weights] = filled_state(shapes_of(model, weights)[1])
    return _held[model, weights]


def cache_of(graphdef: nnx.GraphDef, shapes: nnx.State, rows: int, slots: int):
    """The shapes of its arrays."""
    return jax.eval_shape(lambda state: programs.empty_cache(graphdef, state, rows, slots, None), shapes)


def held_cache(shapes, lengths: int):
    """A cache of random keys and values that says it holds so many tokens."""
    layers = jax.tree.map(lambda x: filled(x.shape, x.dtype, 1.0, x.shape[2]), shapes.layers)
    return shapes._replace(layers=layers, lengths=jnp.full(shapes.lengths.shape, lengths, jnp.int32))


def work_of(model: ModelConfig, weights: str, rows: int, held: int, step: str) -> Work:
    config = RunConfig(name="gpu", model=dataclasses.replace(model, context_length=max(held, model.context_length)),
                       data=DataConfig(seq_len=64, batch_size=rows), steps=1, precision=PRECISION)  # fmt: skip
    return Work(config, step, rows, held, WEIGHTS[weights])


def decode_case(out: Out, name: str, weights: str, rows: int, held: int, tiny: bool) -> Case:
    model = slice_of(name, weights, tiny)
    calls = programs.TOKENS_PER_CALL
    settings = stacked([settings_of(model.vocab_size, plain=True)] * rows)
    every, nobody, limit = np.ones((rows,), bool), np.bool_(False), np.int32(calls)

    def trace():
        graphdef, shapes = shapes_of(model, weights)
        carried = cache_of(graphdef, shapes, rows, held), jax.eval_shape(lambda: rows_of(settings, model.vocab_size))
        return programs.decode.trace(graphdef, shapes, *carried, None, every, limit, nobody, None, processor=None)

    def measure(program) -> Figures:
        state = weights_of(model, weights)
        cache = [held_cache(cache_of(*shapes_of(model, weights), rows, held), held - calls)]
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.vocab_size, rows), jnp.int32)
        lengths = cache[0].lengths + 0

        def call():
            begun = rows_of(settings, model.vocab_size)
            begun = begun._replace(token=tokens + 0, active=jnp.ones((rows,), bool), left=begun.left + calls)
            cache[0], *rest = program(state, cache[0], begun, None, every, limit, nobody, None)
            cache[0] = cache[0]._replace(lengths=lengths + 0)  # so that each call decodes at the same places
            return rest

        timing = timed(call, seconds=1.0)
        a_token = timing.median / calls
        return token_figures(out, model, name, weights, rows, held, a_token) | program_bytes(program)

    return Case(f"{name} {weights}, {rows} rows, {held} held", trace, measure)


def token_figures(
    out: Out, model: ModelConfig, name: str, weights: str, rows: int, held: int, seconds: float
) -> Figures:
    """Figures of decoding one token of each row, beside what must be read for it and what the planner says."""
    must = work_of(model, weights, rows, held, "decode").model_traffic
    published = chip().bandwidth if chip() else float("nan")
    bandwidth = ceiling(out, "copy", "GB/s", published)
    head = 2 * model.vocab_size * model.embed_dim / bandwidth  # read once, whatever the number of layers
    whole = preset(name).num_layers / model.num_layers
    figures = {"ms a token": seconds * 1e3, "tokens/s": rows / seconds, "must read GB": must / 1e9,
               "GB/s": must / seconds / 1e9, "share of copy": must / seconds / bandwidth,
               "ms a layer": (seconds - head) / model.num_layers * 1e3}  # fmt: skip
    if model.embed_dim != preset(name).embed_dim:
        return figures
    all_layers = (seconds - head) * whole + head
    plan = estimate(work_of(preset(name), weights, rows, held, "decode"), MeshConfig(data=1), topology("h100:1"))
    return figures | {"all layers: tokens/s": rows / all_layers, "planned tokens/s, H100": rows / plan.seconds,
                      "planned GB": plan.bytes / 1e9}  # fmt: skip


def prefill_case(out: Out, weights: str, tiny: bool) -> Case:
    """A prompt of 8192 tokens, read a piece at a time as `generate` does; the last piece is as long as the first."""
    model = slice_of("scout", weights, tiny)
    prompt, piece = (96, 32) if tiny else (8192, PIECE)
    settings = stacked([settings_of(model.vocab_size, plain=True)])

    def where(start: int) -> Pieces:
        return Pieces(None, np.array([start], np.int32), np.array([piece], np.int32), np.zeros((1,), bool))

    def trace():
        graphdef, shapes = shapes_of(model, weights)
        tokens = jax.ShapeDtypeStruct((1, piece), jnp.int32)
        carried = cache_of(graphdef, shapes, 1, prompt), jax.eval_shape(lambda: rows_of(settings, model.vocab_size))
        inputs = None, tokens, None, where(0), settings, None, None, None
        return programs.read.trace(graphdef, shapes, *carried, *inputs, processor=None)

    def measure(program) -> Figures:
        state = weights_of(model, weights)
        cache = [held_cache(cache_of(*shapes_of(model, weights), 1, prompt), 0)]
        draw = np.random.default_rng(0).integers(0, model.vocab_size, (prompt // piece, 1, piece))
        pieces = [jnp.asarray(tokens, jnp.int32) for tokens in draw]

        def read():
            begun = rows_of(settings, model.vocab_size)
            for i, tokens in enumerate(pieces):
                inputs = None, tokens, None, where(i * piece), settings, None, None, None
                cache[0], begun, _, first, _ = program(state, cache[0], begun, *inputs)
            return first

        timing = timed(read, seconds=1.5)
        flops = sum(
            work_of(model, weights, 1, end, "prefill").model_flops for end in range(piece, prompt + 1, piece)
        ) if piece == PIECE else float("nan")  # fmt: skip
        return {**timing.figures(), "tokens/s": prompt / timing.median, "model TFLOP/s": flops / timing.median / 1e12,
                "ms a layer": timing.median * 1e3 / model.num_layers, **program_bytes(program)}  # fmt: skip

    return Case(f"reading {prompt} tokens, scout {weights}", trace, measure)

"""Does it compute right? Every op against float64, and the tiny model against what a CPU gave.

Errors are ‖got - wanted‖ / ‖wanted‖ with the operands as their dtype holds them, so that a bound is about arithmetic
alone: 1e-5 for float32 (tf32 would give 3e-4), 6e-3 for bfloat16, whose results are rounded to 8 bits of mantissa once
or twice on the way. The numbers of a CPU stand in `right.npz` beside this file, made by `gpu.py --record`.
"""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax import lax

from gpu_parts import oracles
from gpu_parts.report import Figures, Out
from llama4_jax.config import RunConfig
from llama4_jax.data.batch import Batch
from llama4_jax.data.config import DataConfig
from llama4_jax.infer.generate import generate
from llama4_jax.infer.rows import filtered, rows_of, settings_of, stacked
from llama4_jax.infer.sampling import draw
from llama4_jax.model.config import Precision
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import preset
from llama4_jax.model.quantized import quantized
from llama4_jax.ops.attention import OBSTACLES, attention, partial_attention
from llama4_jax.ops.cross_entropy import linear_cross_entropy
from llama4_jax.ops.dot_general import linear
from llama4_jax.ops.experts import ExpertWeights, experts
from llama4_jax.ops.grouped_matmul import grouped_matmul
from llama4_jax.ops.order import Order
from llama4_jax.ops.partial_attention import normalize
from llama4_jax.ops.quantization import Quantized, Scheme, dequantize, quantize
from llama4_jax.ops.quantized_matmul import quantized_dot, quantized_grouped_matmul
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.train.next_token import next_token
from llama4_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama4_jax.train.step import first_state, make_trainer, split_model

# JAX's switch for its own Triton kernels of `lax.ragged_dot`, which its wheels have had without the kernels.
switch = None
if importlib.util.find_spec("jax._src.lax.pallas_lowerings"):
    from jax._src.config import jax_ragged_dot_use_gpu_pallas_triton_lowering as switch

RECORDED = pathlib.Path(__file__).with_name("right.npz")
BOUND = {"float32": 1e-5, "bfloat16": 6e-3}


def run(out: Out, tiny: bool) -> None:
    out.case("float32 product", functools.partial(float32_product, 256 if tiny else 2048))
    attention_cases(out, tiny)
    grouped_cases(out, tiny)
    expert_cases(out, tiny)
    model_cases(out)
    quantized_cases(out, tiny)
    for dtype in BOUND:
        out.case(f"cross entropy, {dtype}", functools.partial(cross_entropy, dtype, tiny))
    sampling_cases(out, tiny)
    row_cases(out, tiny)


def judged(bound: float, **errors: float) -> Figures:
    """`ok` if all errors are below the bound; NaN is not."""
    return {"ok": all(error <= bound for error in errors.values()), **errors, "bound": bound}


def errors(names: Sequence[str], got: Sequence, wanted: Sequence[np.ndarray]) -> dict[str, float]:
    return {name: oracles.error(mine, theirs) for name, mine, theirs in zip(names, got, wanted, strict=True)}


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


# ---------------------------------------------------------------------------------------------------------------------


def float32_product(side: int) -> Figures:
    """Ours, and beside it what the platform makes of float32 unasked: 3e-4 says tf32, 3e-3 bfloat16."""
    x, w = drawn(1, (side, side), (side, side))
    wanted = x.astype(np.float64) @ w.astype(np.float64)
    ours = jax.jit(lambda x, w: linear(x, w, ("embed", "mlp"), 1, "default"))(x, w)
    return judged(BOUND["float32"], ours=oracles.error(ours, wanted)) | {
        "unasked": oracles.error(jax.jit(jnp.matmul)(x, w), wanted)
    }


def attention_cases(out: Out, tiny: bool) -> None:
    batch, heads, kv_heads, length, dim, chunk = (1, 4, 2, 64, 32, 16) if tiny else (2, 8, 2, 512, 128, 128)
    whole = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    cut = length // 3
    parts = np.concatenate([np.arange(cut), np.arange(length - cut - 5), np.zeros(5)]).astype(np.int32)
    segments = np.concatenate([np.full(cut, 1), np.full(length - cut - 5, 2), np.zeros(5)]).astype(np.int32)
    documents = tuple(np.broadcast_to(x, (batch, length)) for x in (parts, segments))
    one = np.ones((batch, length), np.int32)
    inputs = {"whole": (whole, one, None), "chunks": (whole, one, chunk), "documents": (*documents, None),
              "documents and chunks": (*documents, chunk)}  # fmt: skip
    arrays = drawn(2, (batch, heads, length, dim), *[(batch, kv_heads, length, dim)] * 2, (batch, heads, length, dim))

    def check(name: str, dtype: str, positions, segments, chunk, aligned: bool) -> Figures:
        q, k, v, g = (jnp.asarray(x, dtype) for x in arrays)
        place = {"q_positions": jnp.where(segments > 0, positions, -1), "chunk": chunk, "scale": dim**-0.5}
        place["k_positions"] = place["q_positions"]
        if not aligned:
            place |= {"q_segments": jnp.asarray(segments), "k_segments": jnp.asarray(segments)}
        order = Order(contiguous=True, aligned=aligned)

        @jax.jit
        def both(q, k, v, g):
            out, pull = jax.vjp(lambda *x: attention(*x, **place, order=order, implementation=name), q, k, v)
            return out, *pull(g)

        wanted = oracles.attention(*(oracles.rounded(x, dtype) for x in arrays),
                                   oracles.seen(positions, segments, chunk), dim**-0.5)  # fmt: skip
        return judged(BOUND[dtype], **errors(("out", "dq", "dk", "dv"), both(q, k, v, g), wanted))

    for what, (positions, segments, chunk) in inputs.items():
        for dtype in BOUND:
            for name in ("reference", "flash", "cudnn"):
                aligned = segments is one
                q, k = jnp.zeros(arrays[0].shape, dtype), jnp.zeros(arrays[1].shape, dtype)
                why = name in OBSTACLES and OBSTACLES[name](
                    q, k, k, None if aligned else jnp.asarray(segments), chunk, Order(contiguous=True, aligned=aligned)
                )
                if not why:
                    how = functools.partial(check, name, dtype, positions, segments, chunk, aligned)
                    out.case(f"attention {name}, {dtype}, {what}", how)
    for cache in ("float32", "bfloat16", "int8"):
        out.case(f"decoding attention, cache {cache}", functools.partial(decoding_attention, cache, tiny))


def decoding_attention(cache: str, tiny: bool) -> Figures:
    """One query a row against a cache of rows of unequal length."""
    batch, heads, kv_heads, slots, dim = (2, 4, 2, 64, 32) if tiny else (4, 40, 8, 8192, 128)
    q, k, v = drawn(3, (batch, heads, 1, dim), *[(batch, kv_heads, slots, dim)] * 2)
    lengths = slots - np.arange(batch) * 7
    positions = np.where(np.arange(slots) < lengths[:, None], np.arange(slots), -1).astype(np.int32)
    at = {"q_positions": jnp.asarray(lengths[:, None] - 1, jnp.int32), "k_positions": jnp.asarray(positions),
          "chunk": None, "scale": dim**-0.5}  # fmt: skip
    dtype = "bfloat16" if cache == "int8" else cache
    if cache == "int8":
        held = [quantize(x, Scheme("int8"), start=3) for x in (k, v)]
        exact = [dequantize(x, start=3).astype(np.float64) for x in held]
        k, v = (Quantized(jnp.asarray(x.values), jnp.asarray(x.scale[..., 0])) for x in held)
        got = jax.jit(lambda *x: normalize(partial_attention(*x, **at), jnp.bfloat16))(jnp.asarray(q, dtype), k, v)
    else:
        exact = [oracles.rounded(x, dtype) for x in (k, v)]
        got = jax.jit(lambda *x: attention(*x, **at))(*(jnp.asarray(x, dtype) for x in (q, k, v)))
    seen = (positions >= 0)[:, None]
    wanted = oracles.attention(oracles.rounded(q, dtype), *exact, np.zeros(q.shape), seen, dim**-0.5)[0]
    return judged(BOUND[dtype], out=oracles.error(got, wanted))


def ragged_dot(x, w, sizes):
    return lax.ragged_dot(x, w, sizes, precision="highest" if x.dtype == jnp.float32 else None)


def grouped_products(platform: str) -> dict:
    """By name, (x [R I], w [E I O], sizes) → [R O]: ours, and those of JAX."""
    names = ["blocks", "reference", *(["mosaic_gpu"] if platform == "gpu" else [])]
    found = {name: functools.partial(grouped_matmul, implementation=name) for name in names}
    found["ragged_dot"] = ragged_dot
    if platform == "gpu" and switch is not None:
        found["ragged_dot by Triton"] = ragged_dot
    return found


class Switched(NamedTuple):
    """A traced program that is lowered with JAX's Triton kernels for `lax.ragged_dot`: the switch is read then."""

    traced: Any

    def lower(self, **how):
        with switch(True):
            return self.traced.lower(**how)


def traced(name: str, function, *arguments):
    """For the grouped product of this name."""
    if "Triton" not in name:
        return jax.jit(function).trace(*arguments)
    with switch(True):
        return Switched(jax.jit(function).trace(*arguments))


def grouped_cases(out: Out, tiny: bool) -> None:
    rows, groups, inner, outer = (60, 4, 32, 64) if tiny else (1000, 8, 256, 512)
    sizes = np.random.default_rng(4).multinomial(rows - 7, [1 / (groups - 1)] * (groups - 1))
    sizes = np.array([*sizes[:2], 0, *sizes[2:]], np.int32)  # a group without rows, and seven rows without a group
    arrays = drawn(5, (rows, inner), (groups, inner, outer), (rows, outer))

    def check(name: str, product, dtype: str) -> Figures:
        def both(x, w, g):
            y, pull = jax.vjp(lambda x, w: product(x, w, jnp.asarray(sizes)), x, w)
            return y, *pull(g)

        operands = [jnp.asarray(x, dtype) for x in arrays]
        got = traced(name, both, *operands).lower().compile()(*operands)
        wanted = oracles.grouped(*(oracles.rounded(x, dtype) for x in arrays), sizes)
        return judged(BOUND[dtype], **errors(("y", "dx", "dw"), got, wanted))

    for name, product in grouped_products(jax.default_backend()).items():
        for dtype in ("bfloat16",) if name == "mosaic_gpu" else BOUND:
            out.case(f"grouped products by {name}, {dtype}", functools.partial(check, name, product, dtype))


def expert_cases(out: Out, tiny: bool) -> None:
    """fp8 twice: as arithmetic, against operands that are rounded here too, and as what is lost in all."""
    rows, dim, width = (32, 64, 128) if tiny else (512, 1024, 2048)
    x, w, g = drawn(6, (rows, dim), (dim, width), (rows, width))

    def fp8(matmul: str) -> Figures:
        axes = {"fp8": None, "fp8_row": 1}[matmul]

        @jax.jit
        def both(x, w, g):
            y, pull = jax.vjp(lambda x, w: linear(x, w, ("embed", "mlp"), 1, matmul), x, w)
            return y, *pull(g)

        def rounded(x, axis):
            amax = np.abs(x).max(axis=axis, keepdims=axis is not None)
            scale = np.maximum(amax / np.float32(448), np.finfo(np.float32).tiny).astype(np.float32)
            values = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            return values.astype(np.float64) * scale.astype(np.float64)

        y, dx, dw = both(x, w, g)
        x64, w64, g64 = (a.astype(np.float64) for a in (x, w, g))
        same = rounded(x, axes) @ rounded(w, None if axes is None else 0)
        arithmetic = oracles.error(y, same)
        lost = judged(0.1, y=oracles.error(y, x64 @ w64), dx=oracles.error(dx, g64 @ w64.T),
                      dw=oracles.error(dw, x64.T @ g64))  # fmt: skip
        return {**lost, "arithmetic": arithmetic, "bound of it": 2e-3, "ok": lost["ok"] and arithmetic <= 2e-3}

    for matmul in ("fp8", "fp8_row"):
        out.case(f"linear layer in {matmul}", functools.partial(fp8, matmul))

    groups, width = 4, dim // 2
    tokens, gate_up, down = drawn(7, (1, rows, dim), (groups, 2, dim, width), (groups, width, dim))
    gate_up, down = gate_up * dim**-0.5, down * width**-0.5
    draw = np.random.default_rng(8)
    expert = draw.integers(0, groups, rows)
    gate = draw.uniform(0.2, 1, rows).astype(np.float32)

    def routed(matmul: str, dtype: str, bound: float) -> Figures:
        weights = ExpertWeights(jnp.asarray(gate_up, dtype), jnp.asarray(down, dtype))
        choice, gates = jnp.asarray(expert, jnp.int32)[None, :, None], jnp.asarray(gate)[None, :, None]
        got = jax.jit(functools.partial(experts, matmul=matmul))(jnp.asarray(tokens, dtype), choice, gates, weights)
        exact = [oracles.rounded(a, dtype) for a in (tokens[0], gate_up, down)]
        wanted = oracles.swiglu_experts(exact[0], expert, gate.astype(np.float64), *exact[1:])
        return judged(bound, out=oracles.error(got[0], wanted))

    for matmul, dtype, bound in (("default", "float32", 1e-5), ("default", "bfloat16", 1e-2), ("fp8", "bfloat16", 0.1),
                                 ("fp8_row", "bfloat16", 0.1)):  # fmt: skip
        out.case(f"experts {matmul}, {dtype}", functools.partial(routed, matmul, dtype, bound))


SCHEMES = {"int8": Scheme("int8"), "int4": Scheme("int4", 128), "fp8": Scheme("fp8")}


def quantized_cases(out: Out, tiny: bool) -> None:
    inner, outer, groups = (256, 128, 4) if tiny else (5120, 2048, 8)

    def one(scheme: Scheme, rows: int, dtype: str) -> Figures:
        x, w = drawn(9, (rows, inner), (inner, outer))
        q = quantize(w, scheme)
        on_device = Quantized(*(jnp.asarray(part) for part in q))
        got = jax.jit(functools.partial(quantized_dot, activations="float"))(jnp.asarray(x, dtype), on_device)
        wanted = oracles.rounded(x, dtype) @ dequantize(q).astype(np.float64)
        return judged(BOUND[dtype], out=oracles.error(got, wanted))

    def grouped(scheme: Scheme) -> Figures:
        x, w = drawn(10, (64, inner), (groups, inner, outer // 4))
        sizes = np.full(groups, 64 // groups, np.int32)
        q = quantize(w, scheme, start=1)
        on_device = Quantized(*(jnp.asarray(part) for part in q))
        how = functools.partial(quantized_grouped_matmul, activations="float")
        got = jax.jit(how)(jnp.asarray(x, jnp.bfloat16), on_device, jnp.asarray(sizes))
        exact = dequantize(q, start=1).astype(np.float64)
        wanted = oracles.grouped(oracles.rounded(x, "bfloat16"), exact, np.zeros((64, outer // 4)), sizes)[0]
        return judged(BOUND["bfloat16"], out=oracles.error(got, wanted))

    for name, scheme in SCHEMES.items():
        for rows in (1, 8, 256):
            out.case(f"{name} weights, {rows} rows", functools.partial(one, scheme, rows, "bfloat16"))
        out.case(f"{name} weights, 8 rows, float32", functools.partial(one, scheme, 8, "float32"))
        out.case(f"{name} experts", functools.partial(grouped, scheme))


def cross_entropy(dtype: str, tiny: bool) -> Figures:
    tokens, dim, words = (48, 32, 300) if tiny else (1024, 512, 20_000)
    hidden, head = drawn(11, (1, tokens, dim), (dim, words))
    head *= dim**-0.5
    draw = np.random.default_rng(12)
    targets, weights = draw.integers(0, words, (1, tokens)), draw.integers(0, 2, (1, tokens)).astype(np.float32)

    def total(hidden, head):
        return linear_cross_entropy(hidden, head, jnp.asarray(targets, jnp.int32), jnp.asarray(weights), pieces=3)[0]

    got, (d_hidden, d_head) = jax.jit(jax.value_and_grad(total, (0, 1)))(
        jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)
    )
    exact = [oracles.rounded(x, dtype) for x in (hidden[0], head)]
    wanted = oracles.cross_entropy(*exact, targets[0], weights[0].astype(np.float64))
    bound = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]  # p - 1 is rounded, too
    return judged(bound, loss=abs(float(got) / wanted[0] - 1), d_hidden=oracles.error(d_hidden[0], wanted[1]),
                  d_head=oracles.error(d_head, wanted[2]))  # fmt: skip


def sampling_cases(out: Out, tiny: bool) -> None:
    rows, words = (4, 600) if tiny else (16, 202_048)
    (logits,) = drawn(13, (rows, words))
    logits *= 3

    def filters(top_k, top_p) -> Figures:
        """How much probability stands elsewhere: the set is exact but for ties."""
        settings = stacked([settings_of(words, temperature=0.7, top_k=top_k, top_p=top_p, plain=True)] * rows)
        got = np.asarray(jax.nn.softmax(jax.jit(filtered)(jnp.asarray(logits), rows_of(settings, words))))
        wanted = np.stack([oracles.filtered(row.astype(np.float64), 0.7, top_k, top_p) for row in logits])
        return judged(1e-4, moved=float(np.abs(got - wanted).sum(-1).max() / 2))

    def draws() -> Figures:
        """Tokens at which the running sum reaches u: none may be farther than rounding from its place."""
        p = np.exp(logits.astype(np.float64) - logits.max())
        p /= p.sum(-1, keepdims=True)
        u = np.random.default_rng(14).uniform(0, 1, rows)
        token = np.asarray(jax.jit(draw)(jnp.asarray(p, jnp.float32), jnp.asarray(u, jnp.float32)))
        ends = np.cumsum(p, axis=-1)
        after = ends[np.arange(rows), token]
        before = after - p[np.arange(rows), token]
        return judged(1e-5, outside=float(np.maximum(np.maximum(before - u, u - after), 0).max()))

    for top_k, top_p in ((None, 0.9), (50, 1.0), (50, 0.9)):
        out.case(f"sampling, top_k {top_k}, top_p {top_p}", functools.partial(filters, top_k, top_p))
    out.case("sampling, draws", draws)


def row_cases(out: Out, tiny: bool) -> None:
    """A row decoded alone and beside others, and read alone: bit-equal, or by how much not. Different is not wrong."""
    config = preset("tiny")
    model = Llama4(config, precision=Precision(params="bfloat16", compute="bfloat16"), scan_layers=False)
    models = {"bfloat16": model, "float32": Llama4(config, scan_layers=False), "int8": quantized(model, Scheme("int8"))}
    tokens = np.random.default_rng(15).integers(1, config.vocab_size, (8, 48)).astype(np.int32)

    def check(name: str) -> Figures:
        graphdef, state = nnx.split(models[name])

        @jax.jit
        def last(state, tokens):
            model = nnx.merge(graphdef, state)
            _, cache = model.step(tokens[:, :-1], model.empty_cache(len(tokens), 64))
            hidden, _ = model.step(tokens[:, -1:], cache)
            return model.logits(hidden)[:, 0]

        together = np.asarray(last(state, tokens))
        alone = np.concatenate([np.asarray(last(state, tokens[i : i + 1])) for i in range(len(tokens))])
        again = np.asarray(last(state, tokens))
        return {
            "bit-equal alone": bool((together == alone).all()),
            "largest difference": float(np.abs(together - alone).max()),
            "bit-equal again": bool((together == again).all()),
            "same token": f"{int((together.argmax(-1) == alone.argmax(-1)).sum())} of {len(tokens)}",
        }

    for name in models:
        out.case(f"a row alone and beside others, {name}", functools.partial(check, name))


# ---------------------------------------------------------------------------------------------------------------------
# The tiny model: what a CPU gave is carried along.

ROWS, LENGTH, STEPS, NEW = 2, 160, 20, 24  # longer than a chunk of 128


def model_numbers() -> dict[str, np.ndarray]:
    """Logits, gradients, losses of a training run, and tokens, all of them float32."""
    # One layer with chunks and RoPE and one with neither: all there is of different layers.
    model_config = dataclasses.replace(preset("tiny"), num_layers=2, nope_interval=2)
    config = RunConfig(
        name="tiny", model=model_config, data=DataConfig(seq_len=LENGTH, batch_size=ROWS), steps=STEPS,
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=2), scan_layers=False,
    )  # fmt: skip
    model = Llama4(config.model, scan_layers=False, seed=7)
    draw = np.random.default_rng(16)
    tokens = (np.cumsum(draw.integers(1, 4, (ROWS, LENGTH + 1)), axis=1) % 256).astype(np.int32)  # can be learnt
    cut = 100  # two documents a row
    position = np.concatenate([np.arange(cut), np.arange(LENGTH - cut)]).astype(np.int32)
    position = np.broadcast_to(position, (ROWS, LENGTH)).copy()
    segments = np.broadcast_to(np.where(np.arange(LENGTH) < cut, 1, 2), (ROWS, LENGTH)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    batch = Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=position, segment_ids=segments,
                  weights=ones.astype(np.float32), target_bytes=ones)  # fmt: skip
    graphdef, params, bias = split_model(model)

    @jax.jit
    def forward_and_backward(params, batch):
        def mean_loss(params):
            model = nnx.merge(graphdef, params, bias)
            found = next_token(model, batch, None)
            at = {"positions": batch.positions, "segment_ids": batch.segment_ids}
            return found.total / found.weight, model(batch.tokens, **at)

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (loss, logits), grads = forward_and_backward(params, batch)
    found = {"logits": np.asarray(logits)[:, ::16], "loss": np.asarray(loss)}
    # The size of each gradient, and its sum with signs that differ from place to place.
    for path, leaf in nnx.to_flat_state(grads):
        value = np.asarray(leaf.get_value(), np.float64)
        signs = np.random.default_rng(17).choice([-1.0, 1.0], value.shape)
        found["grad." + ".".join(map(str, path))] = np.array([np.linalg.norm(value), (value * signs).sum()], np.float32)
    prompts = [tokens[0, :40].tolist(), tokens[1, :7].tolist(), tokens[0, 30:150].tolist()]
    found["greedy"] = np.array(generate(model, prompts, max_new_tokens=NEW))
    how = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 5}
    found["sampled"] = np.array(generate(model, prompts, max_new_tokens=NEW, **how))

    trainer = make_trainer(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), next_token)
    state = first_state(model, make_optimizer(config.optimizer, STEPS))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, trainer.abstract))
    losses = []
    for _ in range(STEPS):
        state, metrics = trainer.step(state, batch, None)
        losses.append(float(metrics.loss))
    return found | {"losses": np.array(losses, np.float32)}


def model_cases(out: Out) -> None:
    with np.load(RECORDED) as file:
        wanted = {name: file[name] for name in file.files}
    got: dict[str, np.ndarray] = {}

    def compute() -> Figures:
        got.update(model_numbers())
        return {"numbers": sum(x.size for x in got.values())}

    def gradients() -> Figures:
        names = [name for name in wanted if name.startswith("grad.")]
        norms = max(abs(float(got[n][0] / wanted[n][0]) - 1) for n in names)
        # Signed sums are as large as the norm, or small by chance: held against the norm.
        sums = max(abs(float(got[n][1] - wanted[n][1])) / float(wanted[n][0]) for n in names)
        return judged(2e-3, norms=norms, sums=sums)

    def steps() -> Figures:
        first, last = float(wanted["losses"][0]), float(wanted["losses"][-1])
        off = np.abs(got["losses"] - wanted["losses"])
        return judged(5e-3, farthest=float(off.max()), first=float(off[0])) | {"loss from": first, "to": last}

    def tokens(name: str) -> Figures:
        same = got[name] == wanted[name]
        return {"ok": bool(same.all()), "same tokens": f"{int(same.sum())} of {same.size}"}

    if out.case("the tiny model, all numbers", compute):
        out.case("its logits", lambda: judged(1e-4, error=oracles.error(got["logits"], wanted["logits"] * 1.0)))
        out.case("its gradients", gradients)
        out.case(f"{STEPS} training steps", steps)
        for name in ("greedy", "sampled"):
            out.case(f"its {name} tokens", functools.partial(tokens, name))


def record() -> None:
    if jax.default_backend() != "cpu":
        raise SystemExit("gpu.py --record: the numbers to compare with are a CPU's: set JAX_PLATFORMS=cpu.")
    np.savez_compressed(RECORDED, **model_numbers())
    print(f"wrote {RECORDED}: {RECORDED.stat().st_size / 1000:.0f} kB")

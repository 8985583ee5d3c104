"""How fast a slice of Scout trains, with the widths, rows and kernels of the whole one.

One card does not hold what training all of a layer takes: the 2.2 billion parameters of each of Scout's layers are
40 GB of float32 parameters, their two moments and gradients. So what is scaled down is said in each case's name:

- gradients: four layers with all 16 experts and the whole head, in bfloat16 parameters and without an optimizer: the
  forward and backward pass as they are, 17.6 GB of layers and as much of their gradients
- whole step: `make_trainer`'s, with float32 parameters and AdamW, of four layers with 3 experts and 16 384 words; the
  experts' products have more rows each, and nothing else is another size
- linear layers, grouped products: a product alone, forward and backward, at the shapes they have in a layer

Rematerialisation is "full", as `configs/scout_pretrain.py` has it.
"""

import dataclasses
import functools
import gzip
import json
import pathlib
import re
import tempfile
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpu_parts.fill import filled, filled_state
from gpu_parts.report import Case, Figures, Out, program_bytes, timed
from gpu_parts.right import grouped_products, traced
from llama4_jax.config import RunConfig
from llama4_jax.data.batch import Batch
from llama4_jax.data.config import DataConfig
from llama4_jax.mesh_search import Work, estimate
from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.flops import train_flops_per_token
from llama4_jax.model.presets import preset
from llama4_jax.ops.dot_general import linear
from llama4_jax.ops.experts import ExpertWeights, experts
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.sharding.chips import of_kind, topology
from llama4_jax.train.next_token import next_token
from llama4_jax.train.step import Trainer, make_model, make_trainer, split_model

MATMULS = ("default", "fp8", "fp8_row")
SHAPES = ((1, 8192), (4, 2048))
TINY = {"num_layers": 2, "nope_interval": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "mlp_dim": 64, "expert_mlp_dim": 64, "num_experts": 4, "vocab_size": 512, "attention_chunk": 64}  # fmt: skip


def run(out: Out, tiny: bool) -> None:
    products = linear_cases(tiny)
    steps = gradient_cases(out, tiny)
    whole = step_cases(out, tiny)
    shapes = 1 if tiny else len(MATMULS)  # of the first shape, all matmuls
    out.cases(products)
    ratio(out, "linear layers alone", "mlp up {}", "expert products {}")
    out.cases(steps[:shapes])
    ratio(out, "gradients", f"gradients {rows_of(SHAPES[0], tiny)} {{}}")
    out.cases(whole[:shapes])
    ratio(out, "whole step", f"whole step {rows_of(SHAPES[0], tiny)} {{}}")
    out.cases(grouped_cases(tiny))
    if not tiny:
        out.cases(steps[shapes:] + whole[shapes:])


def slice_of_scout(tiny: bool, **changes) -> ModelConfig:
    return dataclasses.replace(preset("scout"), **({"num_layers": 4} | changes | (TINY if tiny else {})))


def rows_of(shape: tuple[int, int], tiny: bool) -> str:
    rows, tokens = (shape[0], 64) if tiny else shape
    return f"{rows} × {tokens}"


def run_config(model: ModelConfig, shape: tuple[int, int], precision: Precision) -> RunConfig:
    data = DataConfig(seq_len=shape[1], batch_size=shape[0])
    return RunConfig(name="gpu", model=model, data=data, steps=1000, precision=precision, remat="full")


def random_batch(config: RunConfig) -> Batch:
    rows, tokens = config.data.batch_size, config.data.seq_len
    drawn = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, tokens + 1)).astype(np.int32)
    ones = np.ones((rows, tokens), np.int32)
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens)).copy()
    return Batch(tokens=drawn[:, :-1], targets=drawn[:, 1:], positions=positions, segment_ids=ones,
                 weights=ones.astype(np.float32), target_bytes=ones)  # fmt: skip


def ceiling(out: Out, case: str, figure: str, otherwise: float) -> float:
    """What the ceilings measured, in operations or bytes a second."""
    unit = {"TFLOP/s": 1e12, "GB/s": 1e9}[figure]
    found = next((f for name, f in out.given.get("ceilings", {}).items() if name.startswith(case)), None)
    return otherwise if found is None else found[figure] * unit


def chip():
    return of_kind(jax.devices()[0].device_kind)


def ratio(out: Out, what: str, *names: str) -> None:
    """How much faster than bfloat16 each of the others is, of the cases of these names."""
    for matmul in MATMULS[1:]:
        found = {}
        for name in names:
            ours, base = (out.measured.get(name.format(m)) for m in (matmul, MATMULS[0]))
            if ours and base:
                found[name.format("").strip() or what] = base["ms"] / ours["ms"]
        if found:
            out.case(f"{matmul} against bfloat16, {what}", functools.partial(dict, found))


# ---------------------------------------------------------------------------------------------------------------------
# Products alone.


def forward_and_backward(product):
    def both(g, *operands):
        y, pull = jax.vjp(product, *operands)
        return y, *pull(g)

    return both


def linear_cases(tiny: bool) -> list[Case]:
    tokens, dim, width, groups = (128, 64, 128, 4) if tiny else (8192, 5120, 16_384, 16)
    inner = width // 2
    array = jax.ShapeDtypeStruct
    x, w, g = (array(s, jnp.bfloat16) for s in ((tokens, dim), (dim, width), (tokens, width)))
    rows, choice = array((1, tokens, dim), jnp.bfloat16), (1, tokens, 1)
    weights = ExpertWeights(array((groups, 2, dim, inner), jnp.bfloat16), array((groups, inner, dim), jnp.bfloat16))
    expert = (np.random.default_rng(1).integers(0, groups, choice)).astype(np.int32)
    gate = np.full(choice, 0.5, np.float32)

    def one(matmul: str) -> Case:
        product = forward_and_backward(lambda x, w: linear(x, w, ("embed", "mlp"), 1, matmul))

        def measure(program):
            return product_figures(program, [g, x, w], 3 * 2 * tokens * dim * width)

        return Case(f"mlp up {matmul}", lambda: jax.jit(product).trace(g, x, w), measure)

    def routed(matmul: str) -> Case:
        how = functools.partial(experts, matmul=matmul)
        product = forward_and_backward(lambda x, w: how(x, jnp.asarray(expert), jnp.asarray(gate), w))

        def measure(program):
            return product_figures(program, [rows, rows, weights], 3 * 2 * tokens * 3 * dim * inner)

        return Case(f"expert products {matmul}", lambda: jax.jit(product).trace(rows, rows, weights), measure)

    return [make(matmul) for make in (one, routed) for matmul in MATMULS]


def product_figures(program, shapes, flops: float) -> Figures:
    flat, tree = jax.tree.flatten(shapes)
    made = [filled(x.shape, x.dtype, 0.02 if x.ndim > 3 else 1.0, seed) for seed, x in enumerate(flat)]
    operands = jax.tree.unflatten(tree, made)
    timing = timed(lambda: program(*operands))
    return {**timing.figures(), "TFLOP/s": flops / timing.median / 1e12, **program_bytes(program)}


def grouped_cases(tiny: bool) -> list[Case]:
    """The experts' products by everything that can compute them, with rows spread evenly at random."""
    tokens, dim, width = (128, 64, 128) if tiny else (8192, 5120, 8192)
    cases = []
    for groups in (4,) if tiny else (16, 128):
        sizes = np.random.default_rng(2).multinomial(tokens, [1 / groups] * groups).astype(np.int32)
        array = jax.ShapeDtypeStruct
        g, x, w = (array(s, jnp.bfloat16) for s in ((tokens, width), (tokens, dim), (groups, dim, width)))
        for name, product in grouped_products(jax.default_backend()).items():
            if name == "reference":  # every row with every expert
                continue

            def of(x, w, product=product, sizes=sizes):
                return product(x, w, jnp.asarray(sizes))

            for what, function, shapes, times in (
                ("forward", of, (x, w), 1),
                ("forward and backward", forward_and_backward(of), (g, x, w), 3),
            ):
                flops = times * 2.0 * tokens * dim * width
                cases.append(
                    Case(
                        f"{groups} experts by {name}, {what}",
                        functools.partial(traced, name, function, *shapes),
                        functools.partial(product_figures, shapes=list(shapes), flops=flops),
                    )
                )
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# Steps.


def step_figures(out: Out, timing, program, config: RunConfig) -> Figures:
    tokens = config.data.batch_size * config.data.seq_len
    flops = tokens * train_flops_per_token(config.model, config.data.seq_len)
    published = chip().bf16 if chip() else float("nan")
    measured = ceiling(out, "product bfloat16", "TFLOP/s", published)
    return {
        **timing.figures(),
        "tokens/s": tokens / timing.median,
        "model TFLOP/s": flops / timing.median / 1e12,
        "MFU of the data sheet": flops / timing.median / published,
        "of the measured product": flops / timing.median / measured,
        **program_bytes(program),
    }


@functools.cache
def shapes_of(config: RunConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, parameters and biases, which Scout has none of."""
    return split_model(nnx.eval_shape(lambda: make_model(config, 0)))


@functools.cache
def trainer_of(config: RunConfig) -> Trainer:
    return make_trainer(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), next_token)


def batch_shapes(config: RunConfig) -> Batch:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch(config))


def gradient_cases(out: Out, tiny: bool) -> list[Case]:
    cases = []
    for shape in SHAPES:
        shape = (shape[0], 64) if tiny else shape
        for matmul in MATMULS:
            precision = Precision(params="bfloat16", compute="bfloat16", matmul=matmul)
            config = run_config(slice_of_scout(tiny), shape, precision)

            def gradients(params, batch, config=config):
                graphdef, _, bias = shapes_of(config)

                def mean_loss(params):
                    found = next_token(nnx.merge(graphdef, params, bias), batch, None)
                    return found.total / found.weight

                return jax.value_and_grad(mean_loss)(params)

            def trace(config=config, gradients=gradients):
                return jax.jit(gradients).trace(shapes_of(config)[1], batch_shapes(config))

            def measure(program, config=config):
                params, batch = filled_state(shapes_of(config)[1]), jax.device_put(random_batch(config))
                timing = timed(lambda: program(params, batch)[0], seconds=2.0)
                figures = step_figures(out, timing, program, config)
                loss = float(program(params, batch)[0])
                figures |= {"loss": loss, "ok": bool(np.isfinite(loss))}
                return figures | shares(lambda: program(params, batch)[0])

            cases.append(Case(f"gradients {rows_of(shape, tiny)} {matmul}", trace, measure))
    return cases


def step_cases(out: Out, tiny: bool) -> list[Case]:
    cases = []
    for shape in SHAPES:
        shape = (shape[0], 64) if tiny else shape
        for matmul in MATMULS:
            precision = Precision(params="float32", compute="bfloat16", matmul=matmul)
            config = run_config(slice_of_scout(tiny, num_experts=3, vocab_size=16_384), shape, precision)

            def trace(config=config):
                trainer = trainer_of(config)
                return trainer.step.trace(trainer.abstract, batch_shapes(config), None)

            def measure(program, config=config):
                trainer = trainer_of(config)
                state = trainer.abstract
                first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (state.step, state.bias, state.optimizer))
                params = filled_state(state.params)
                zeros = [jnp.zeros((), jnp.int32) for _ in range(2)]
                state = state._replace(step=first[0], params=params, bias=first[1], optimizer=first[2],
                                       skipped=zeros[0], bad_steps=zeros[1])  # fmt: skip
                del params, first
                held = [jax.device_put(state, jax.tree.map(lambda x: x.sharding, trainer.abstract))]
                batch = jax.device_put(random_batch(config))
                del state

                def step():
                    held[0], metrics = program(held[0], batch, None)  # it takes the old state
                    return metrics.loss

                timing = timed(step, seconds=2.0)
                skipped, loss = int(held[0].skipped), float(step())
                figures = step_figures(out, timing, program, config) | planned(config)
                return figures | {"loss": loss, "ok": bool(np.isfinite(loss)) and not skipped} | shares(step)

            cases.append(Case(f"whole step {rows_of(shape, tiny)} {matmul}", trace, measure))
    return cases


def planned(config: RunConfig) -> Figures:
    """What the planner's formula says of memory and time, for one H100."""
    work = Work(config, "train", config.data.batch_size, config.data.seq_len)
    plan = estimate(work, MeshConfig(data=1), topology("h100:1"))
    return {"planned GiB": plan.bytes / 2**30, "planned ms": plan.seconds * 1e3}


# ---------------------------------------------------------------------------------------------------------------------
# A profile: which kind of kernel takes how much of the time.

KINDS = (  # the first whose pattern is in a kernel's name
    ("grouped kernel", r"ragged|mosaic|transposed_ragged"),
    ("attention", r"cudnn|flash|fmha|sdpa"),
    ("product, fp8", r"e4m3|e5m2|f8|qgmma|nvjet_q"),
    ("product", r"gemm|nvjet|cutlass|cublas|dot|xmma|wgmma"),
    ("copy", r"memcpy|memset|copy|transpose"),
    ("reduction", r"reduce|reduction|scan|sort"),
    ("elementwise", r"fusion|loop|wrapped|input_"),
)


def shares(run) -> Figures:
    """Shares of the device's time in one run, by kind of kernel; {} where there is no GPU."""
    if jax.default_backend() != "gpu":
        return {}
    try:
        return shares_of(profile(run)) or {"profile": "no kernels in it"}
    except Exception as error:  # the times that were measured are worth more
        return {"profile": f"failed: {error}"[:200]}


def profile(run) -> list[dict]:
    """The events of one run."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(run())
        return read_trace(folder)


def read_trace(folder: str) -> list[dict]:
    """Events of the trace that JAX's profiler wrote as JSON."""
    files = sorted(pathlib.Path(folder).rglob("*.json.gz"), key=lambda path: path.stat().st_size)
    if not files:
        return []
    with gzip.open(files[-1], "rt") as file:
        found = json.load(file)
    return found["traceEvents"] if isinstance(found, dict) else found


def shares_of(events: list[dict]) -> Figures:
    """Events on a GPU's streams, by kind. Processes and threads have their names in metadata events."""
    names = {(e["pid"], e.get("tid") if e["name"] == "thread_name" else None): e["args"]["name"]
             for e in events if e.get("ph") == "M" and e.get("name") in ("process_name", "thread_name")}  # fmt: skip
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("ph") != "X" or "gpu" not in names.get((event["pid"], None), "").lower():
            continue
        if not names.get((event["pid"], event["tid"]), "").lower().startswith("stream"):
            continue  # XLA's own rows repeat the kernels by module and operation
        name = event["name"].lower()
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")
        spent[kind] += event.get("dur", 0)
    total = sum(spent.values())
    by_share = sorted(spent.items(), key=lambda pair: -pair[1])
    return {f"share {kind}": time / total for kind, time in by_share} if total else {}

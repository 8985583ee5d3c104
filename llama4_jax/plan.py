"""`llama4 plan`: what a step of a model costs on a machine that need not be there.

    plan = plan_step(Work(config, "train", rows=1024, context=8192), mesh, topology("v5p:4x4x8"))

The step is the one that runs: the update of `train.step.make_trainer`, or `infer.generate`'s reading of a piece of a
prompt and its decoding of a token. It is given shapes instead of arrays, compiled for the topology's devices, and read
by `sharding.plan`. For GPUs, whose compiler needs a GPU, there are the formulas of `mesh_search` only.
"""

import dataclasses
import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from llama4_jax.collective_count import count
from llama4_jax.config import RunConfig
from llama4_jax.configs import config_names, load_config
from llama4_jax.data.batch import Batch
from llama4_jax.data.config import DataConfig
from llama4_jax.infer import engine_programs as programs
from llama4_jax.infer.engine_programs import Pieces
from llama4_jax.infer.rows import rows_of, settings_of, stacked
from llama4_jax.mesh_search import (
    Work,
    estimate,
    flags,
    misfits,
    nearest,
    precision_notes,
    quantized_parts,
    ranked,
)
from llama4_jax.model.cache import cache_axes
from llama4_jax.model.config import Precision
from llama4_jax.model.presets import PRESETS, preset
from llama4_jax.model.quantized import is_of_decoder, quantized
from llama4_jax.ops.attention import HELD_SCOPE, block_of_slots
from llama4_jax.ops.quantization import Scheme, is_quantized_dtype, scale_of
from llama4_jax.ops.row_blocks import heights_for
from llama4_jax.ops.splash_attention import BLOCK_K
from llama4_jax.plan_options import PlanOptions
from llama4_jax.plan_server import plan_server
from llama4_jax.sharding import (
    SERVING,
    MeshConfig,
    activation_spec,
    axes_of,
    make_mesh,
    parameter_sharding,
    use_rules,
    ways,
)
from llama4_jax.sharding.chips import Topology, topology
from llama4_jax.sharding.hlo import Array
from llama4_jax.sharding.plan import Plan, device_bytes, make_plan, topology_devices
from llama4_jax.train.next_token import next_token
from llama4_jax.train.step import batch_shardings, make_model, make_trainer
from llama4_jax.weights.load import QuantizedMatrices

_COMPILED_IN_A_SEARCH = 4
_ROWS, _CONTEXT = 64, 8192  # of a model without a config


def main(arguments: list[str]) -> int:
    """The command. Raises ValueError for what cannot be planned."""
    options, rest = tyro.cli(PlanOptions, args=arguments, prog="llama4 plan", return_unknown_args=True)
    where = topology(options.topology)
    work = work_of(options, rest)
    chosen = any(argument.startswith("--mesh.") for argument in rest)
    if options.search:
        if options.json is not None:
            raise ValueError("--json writes the figures of one plan: give the mesh that --search found, without it.")
        return _search(work, where)
    if options.slots is not None:
        return _server(options, work, where, chosen)
    mesh, notes = work.config.mesh, ()
    if not chosen and (options.step != "train" or options.name not in config_names()):
        mesh = _best(work, where)
    elif not chosen and not _divides(work, mesh, where):
        asked, mesh = flags(mesh), _nearest_that_fits(work, mesh, where)
        notes = (f"not the mesh of {options.name} ({asked}), which does not fit {where.num_devices} devices, but the "
                 f"nearest that does: {flags(mesh)}",)  # fmt: skip
        _say(f"llama4 plan: {notes[0]}")
    _say(f"planning {options.name}, {options.step}, {work.rows} rows x {work.context} tokens, {flags(mesh)} …")
    plan = _too_large(work, mesh, where) if notes else None
    plan = plan_step(work, mesh, where) if plan is None else plan
    plan = dataclasses.replace(plan, assumptions=(*notes, *plan.assumptions))
    print(plan.text())
    if options.json is not None:
        options.json.write_text(plan.to_json())
    return 0 if plan.fits else 1


def _server(options: PlanOptions, work: Work, where: Topology, chosen: bool) -> int:
    """Prints what a server costs."""
    mesh = _checked(work, work.config.mesh, where) if chosen else _best(work, where)
    plan = plan_server(work, mesh, where, options.held)
    print(plan.text())
    if options.json is not None:
        options.json.write_text(plan.to_json())
    return 0 if plan.fits else 1


def work_of(options: PlanOptions, rest: list[str]) -> Work:
    """The step that the options name. Raises ValueError if there is no such config or model."""
    if options.name in PRESETS and options.name not in config_names():
        data = DataConfig(sources=("jsonl:data/*.jsonl",), tokenizer="bytes", seq_len=_CONTEXT, batch_size=_ROWS)
        model = preset(options.name)
        data = dataclasses.replace(data, seq_len=min(_CONTEXT, model.context_length))
        base = RunConfig(name=options.name, model=model, data=data, steps=1, remat="full",
                         precision=Precision(params="float32", compute="bfloat16"))  # fmt: skip
    else:
        try:
            base = load_config(options.name)
        except ValueError as error:
            raise ValueError(f"{error} Models: {', '.join(PRESETS)}.") from error
    if options.step != "train" and base.lora.rank:
        raise ValueError(f"{options.name} trains adapters: to plan serving, name the model that they belong on.")
    if options.step != "train":
        base = dataclasses.replace(base, precision=Precision(params="bfloat16", compute="bfloat16"))
    config = tyro.cli(
        RunConfig, prog=f"llama4 plan {options.name}", args=rest, default=base, config=(tyro.conf.AvoidSubcommands,)
    )
    _check_slots(options)
    rows = config.data.batch_size if options.batch is None else options.batch
    rows = rows if options.slots is None else options.slots
    context = config.data.seq_len if options.context is None else options.context
    for name, value in (("--batch" if options.slots is None else "--slots", rows), ("--context", context)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if context > config.model.context_length:
        raise ValueError(
            f"--context is {context}, but the model is meant for {config.model.context_length} tokens at most: set "
            f"--model.context-length, too."
        )
    if wrong := next((held for held in options.held if not 1 <= held <= context), None):
        raise ValueError(f"--held {wrong}: a row of {context} tokens (--context) holds 1 to {context}.")
    if options.step == "train":
        data = dataclasses.replace(config.data, batch_size=rows, seq_len=context)
        config = dataclasses.replace(config, data=data)
    return Work(config, options.step, rows, context, _scheme(options, config.lora.rank > 0), options.cache)


def _check_slots(options: PlanOptions) -> None:
    """Raises ValueError where the options of a server are not together."""
    if options.slots is None:
        if options.held:
            raise ValueError("--held says how long the rows of a server are: add --slots.")
        return
    if options.step != "decode":
        raise ValueError(f"--slots {options.slots} is of a server: add --step decode.")
    if options.batch is not None:
        raise ValueError(f"--batch {options.batch} and --slots {options.slots} both say how many rows: give one.")


def _scheme(options: PlanOptions, of_lora: bool) -> Scheme | None:
    """How the weights are quantized. Raises ValueError for a group without weights, and for weights that learn."""
    for name in ("cache",) if of_lora else ("weights", "cache"):
        if options.step == "train" and (value := getattr(options, name)) is not None:
            raise ValueError(
                f"--{name} {value} is for serving: add --step prefill or --step decode. Training in few bits is "
                f"--precision.matmul fp8."
            )
    if options.weights is None:
        if options.group is not None:
            raise ValueError(f"--group {options.group} is of quantized weights: add --weights int4, int8 or fp8.")
        return None
    return Scheme(options.weights, 128 if options.group is None and options.weights == "int4" else options.group)


def _best(work: Work, where: Topology) -> MeshConfig:
    found = ranked(work, where)
    if not found:
        raise ValueError(f"no mesh of the {where.num_devices} devices of {where.name} divides this model and batch.")
    return found[0][0]


def _divides(work: Work, mesh: MeshConfig, where: Topology) -> bool:
    try:
        return not misfits(work, mesh.resolve(where.num_devices))
    except ValueError:
        return False


def _nearest_that_fits(work: Work, mesh: MeshConfig, where: Topology) -> MeshConfig:
    """The nearest mesh that the memory holds by formulas, or else the nearest."""
    found = nearest(work, mesh, where.num_devices)
    if not found:
        raise ValueError(f"no mesh of the {where.num_devices} devices of {where.name} divides this model and batch.")
    return next((near for near in found if estimate(work, near, where).fits), found[0])


def _too_large(work: Work, mesh: MeshConfig, where: Topology) -> Plan | None:
    """A plan by formulas of a step whose parameters and optimizer alone the memory does not hold: there is no need to
    compile it, for minutes, to say so. None of others."""
    plan = estimate(work, mesh, where)
    held = sum(plan.arguments.values())
    return plan if held > where.chip.memory else None


def plan_step(work: Work, mesh_config: MeshConfig, where: Topology) -> Plan:
    """Raises ValueError, with the nearest meshes that work, if this mesh does not fit the devices or does not divide
    what it splits; and if there is no such topology, or no compiler for it."""
    mesh_config = _checked(work, mesh_config, where)
    if not where.chip.torus:
        return estimate(work, mesh_config, where)
    mesh = make_mesh(mesh_config, topology_devices(where))
    build = _train if work.step == "train" else _serve
    with jax.set_mesh(mesh):
        lowered, arguments, notes = build(work, mesh)
    return make_plan(
        lowered, where, mesh, arguments,
        model_flops=work.model_flops / mesh.devices.size,
        model_traffic=work.model_traffic / mesh.devices.size,
        kernel_flops=functools.partial(kernel_flops, routed_rows=_routed_rows(work, mesh)),
        turns=functools.partial(_turns, expert_turns=_expert_turns(work, mesh), held_turns=_held_turns(work, mesh)),
        takes_cheapest=_is_of_experts,
        steps=programs.TOKENS_PER_CALL if work.step == "decode" else 1,
        tokens=float(work.rows * work.tokens),
        by_hand=_by_hand(work, mesh_config, where) if work.step == "train" and not work.config.lora.rank else None,
        notes=[*notes, *_NOTES, *precision_notes(work, where.chip)],
    )  # fmt: skip


def _by_hand(work: Work, mesh: MeshConfig, where: Topology) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a training step should send, by kind and mesh axes."""
    sent: dict[tuple[str, tuple[str, ...]], float] = {}
    for kind, axes, times, size in count(work.config, work.rows, work.context, mesh, on_tpu=where.chip.torus > 0):
        if math.prod(getattr(mesh, axis) for axis in axes) > 1 and times:
            sent[kind, axes] = sent.get((kind, axes), 0.0) + times * size
    return sent


_NOTES = (
    "attention kernels: whole blocks of the causal mask, counted from their shapes; documents and chunks skip none",
    "routed experts: tokens spread evenly over the devices; their buffers have room for more",
)


def _routed_rows(work: Work, mesh: jax.sharding.Mesh) -> float:
    """Rows of the routed experts on a device in a layer, on average."""
    parts = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    parts *= mesh.shape["context"] if work.step == "train" else 1
    accumulated = work.config.grad_accumulation if work.step == "train" else 1
    return work.rows * work.tokens * work.config.model.top_k / parts / accumulated


def _expert_turns(work: Work, mesh: jax.sharding.Mesh) -> float | None:
    """How often each loop over a device's experts runs in a decoding step on average; None for other steps. An expert
    that the rows choose takes a turn in one of them, a loop for each height of its block of rows."""
    model = work.config.model
    if work.step != "decode":
        return None
    seen = work.rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    here = model.num_experts // mesh.shape["expert"]
    chosen = here * (1 - (1 - model.top_k / max(1, model.num_experts)) ** seen)
    return chosen / len(heights_for(max(2, seen * model.top_k), here))


def _held_turns(work: Work, mesh: jax.sharding.Mesh) -> float:
    """How often decoding's loop over a device's slots runs, where it has one: rows that hold their whole context fill
    all blocks."""
    model = work.config.model
    with jax.set_mesh(mesh), use_rules(SERVING):
        shape = (work.rows, model.num_kv_heads, work.context, model.head_dim)
        slots = work.context // ways(axes_of(activation_spec(shape, *cache_axes(None))[2]))
        return float(-(-slots // (block_of_slots(slots) or slots)))


def _turns(op_name: str, *, expert_turns: float | None, held_turns: float) -> float | None:
    """Decoding multiplies by one expert after another (`grouped_matmul`'s "blocks"), and reads a long cache block by
    block, in the only loops that it runs within `shard_map`; and a call of it loops over tokens."""
    if op_name.endswith("(decode)/while"):
        return float(programs.TOKENS_PER_CALL)
    if op_name.endswith(f"{HELD_SCOPE}/while"):
        return held_turns
    return expert_turns if op_name.endswith("shard_map/while") else None


def _is_of_experts(op_name: str) -> bool:
    """The conditional of the experts' backward pass: the last round of the exchange has kept what others compute again,
    and where tokens are spread evenly there is no other."""
    return op_name.endswith("shard_map/while/body/cond")


def kernel_flops(
    name: str, operands: list[Array], results: list[Array], said: float | None, *, routed_rows: float
) -> float | None:
    """Operations of the step's kernels. Grouped products say what they would cost if all rows of their buffer were in
    use: on average `routed_rows` are."""
    if said is not None and "gmm" in name:
        rows = [array for array in operands if len(array.shape) == 2 and array.dtype[0] in "bf"][-1].shape[0]
        return said * min(1.0, routed_rows / rows)
    return splash_flops(name, operands, results) if said is None else said


def splash_flops(name: str, operands: list[Array], results: list[Array]) -> float | None:
    """Operations of JAX's splash attention kernel for TPUs, which does not say them; None for another kernel.

    Its first operand has the shape (heads or 1, blocks of queries, blocks of keys at most for one of them). A block
    costs two products forward; backward five, or in two kernels four for keys and values and three for queries.
    """
    if "splash" not in name:
        return None
    _, rows, width = operands[0].shape
    q, k = [array for array in operands if array.dtype in ("bf16", "f32")][:2]
    *heads, length, dim = q.shape
    seen = k.shape[-2]
    height, across = length // rows, min(seen // width, BLOCK_K)
    ends = [(seen - length + (row + 1) * height - 1) // across + 1 for row in range(rows)]
    blocks = sum(min(width, end) for end in ends)
    in_one = any(len(array.shape) > len(q.shape) for array in results)  # q's gradient in parts, one a block of keys
    products = 2 if "_fwd" in name else 3 if "_dq" in name else 5 if in_one else 4
    return 2.0 * products * math.prod(heads) * blocks * height * across * dim


def _checked(work: Work, mesh: MeshConfig, where: Topology) -> MeshConfig:
    try:
        resolved = mesh.resolve(where.num_devices)
        wrong = misfits(work, resolved)
        if not wrong:
            return resolved
        said = f"the mesh {flags(resolved)} does not fit: {'; '.join(wrong)}."
    except ValueError as error:
        said = f"{where.name} has {where.num_devices} devices: {error}"
    raise ValueError(f"{said} Nearest meshes that work: {_listed(nearest(work, mesh, where.num_devices))}.")


def _listed(found: list[MeshConfig]) -> str:
    return "; ".join(flags(mesh) for mesh in found[:3]) or "none"


def _train(work: Work, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, dict[str, Any], list[str]]:
    config = work.config
    trainer = make_trainer(config, mesh, next_token, _base(work.weights))
    batch = _abstract_batch(config, mesh)
    state = trainer.abstract
    small = (state.step, state.skipped, state.bad_steps)
    arguments = {"parameters": (state.params, state.bias), "base that does not learn": state.fixed,
                 "optimizer": state.optimizer, "batch": batch, "counters": small}  # fmt: skip
    gradients = device_bytes(jax.tree.map(lambda x: x.update(dtype=jnp.float32), state.params))
    note = (
        f"temporaries hold the gradients, too: {gradients / 2**30:,.2f} GiB in float32 if all were kept at once, split "
        f"as the parameters are"
    )
    notes = [note]
    if config.remat == "offload":
        kept = work.rows * work.context * config.model.embed_dim * config.model.num_layers / config.grad_accumulation
        kept *= jnp.dtype(config.precision.compute).itemsize / (mesh.size // mesh.shape["tensor"])
        notes.append(
            f"layers' inputs wait in the host's memory, {kept / 2**30:,.1f} GiB of each device; the time of their way "
            f"there and back is not counted"
        )
    return trainer.step.lower(state, batch, None), arguments, notes


def _base(scheme: Scheme | None) -> QuantizedMatrices | None:
    """LoRA's base with the decoder's matrices quantized."""
    if scheme is None:
        return None
    of_scale = scale_of(np.ones(1, np.float32), scheme).dtype
    return QuantizedMatrices(lambda name: scheme if is_of_decoder(name) else None, lambda name: of_scale)


def _abstract_batch(config: RunConfig, mesh: jax.sharding.Mesh) -> Batch:
    rows, tokens, tiles = config.data.batch_size, config.data.seq_len, config.data.tiles_per_row
    dtypes = {"weights": jnp.float32, "images": jnp.uint8}

    def array(name: str, sharding):
        if sharding is None:
            return None
        side = config.model.vision.image_size if name == "images" else 0
        shape = (rows, tiles, side, side, 3) if name == "images" else (rows, tokens)
        return jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32), sharding=sharding)

    shardings = batch_shardings(mesh, images=tiles > 0)
    return Batch(**{name: array(name, sharding) for name, sharding in shardings._asdict().items()})


def _serve(work: Work, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, dict[str, Any], list[str]]:
    config = dataclasses.replace(work.config, scan_layers=False)

    def make():
        model = make_model(config, 0)
        return model if work.weights is None else quantized(model, work.weights)

    graphdef, state = nnx.split(nnx.eval_shape(make))

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        value = leaf.get_value()
        sharding = parameter_sharding(value.shape, leaf.axes, mesh, name, SERVING)
        return leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    state = jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def placed(shape: tuple[int, ...], dtype, *axes: str | None):
        sharding = jax.sharding.NamedSharding(mesh, activation_spec(shape, *axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    with use_rules(SERVING):
        cache = jax.eval_shape(lambda: nnx.merge(graphdef, state).empty_cache(work.rows, work.context, work.cache))

        def place_cache(spec, layer):
            return jax.tree.map(lambda x: placed(x.shape, x.dtype, *cache_axes(spec.chunk)[: x.ndim]), layer)

        layers = tuple(map(place_cache, config.model.layers, cache.layers))
        cache = cache._replace(layers=layers, lengths=placed((work.rows,), jnp.int32, None))
        everywhere = functools.partial(jax.tree.map, lambda x: placed(x.shape, x.dtype, *[None] * x.ndim))
        vocab_size = config.model.vocab_size
        settings = stacked([settings_of(vocab_size, plain=True)] * work.rows)
        rows = everywhere(jax.eval_shape(lambda: rows_of(settings, vocab_size)))
        arguments = {**_parameters(work, state), "cache": cache}

        def number_of_each(dtype):
            return placed((work.rows,), dtype, None)

        if work.step == "prefill":
            piece = placed((work.rows, work.tokens), jnp.int32, None, None)
            where = Pieces(None, *map(number_of_each, (jnp.int32, jnp.int32, jnp.bool_)))
            lowered = programs.read.lower(
                graphdef, state, cache, rows, None, piece, None, where, everywhere(settings), None, None, None,
                processor=None,
            )  # fmt: skip
            note = f"a step reads the last {work.tokens} tokens of each row's prompt of {work.context}"
            return lowered, arguments, [note]
        lowered = programs.decode.lower(
            graphdef, state, cache, rows, None, number_of_each(jnp.bool_), placed((), jnp.int32), placed((), jnp.bool_),
            None, processor=None,
        )  # fmt: skip
    notes = [
        f"a step is one token of each row; what is done once for {programs.TOKENS_PER_CALL} of them is shared out",
        "of its experts a device reads those that the rows choose on average",
    ]
    return lowered, arguments, notes


def _parameters(work: Work, state: nnx.State) -> dict[str, Any]:
    """By category."""
    if work.weights is None:
        return {"parameters": state}
    leaves = [(path[-1], variable.get_value()) for path, variable in nnx.to_flat_state(state)]
    values = [leaf for _, leaf in leaves if is_quantized_dtype(leaf.dtype)]
    scales = [leaf for name, leaf in leaves if str(name).endswith("_scale")]
    kept = [leaf for name, leaf in leaves if not (is_quantized_dtype(leaf.dtype) or str(name).endswith("_scale"))]
    return quantized_parts(work.weights, values, scales, kept)


def _search(work: Work, where: Topology) -> int:
    """Prints the meshes that fit, the best few compiled."""
    found = [(mesh, plan) for mesh, plan in ranked(work, where) if plan.fits]
    if not found:
        raise ValueError(f"no mesh of {where.name} holds this step: choose more chips, or fewer rows (--batch).")
    rows = []
    for rank, (mesh, guess) in enumerate(found[:12]):
        compiled = None
        if rank < _COMPILED_IN_A_SEARCH and where.chip.torus:
            _say(f"compiling {flags(mesh)} …")
            compiled = plan_step(work, mesh, where)
        rows.append((mesh, compiled or guess, compiled is not None))
    rows.sort(key=lambda row: (not row[2], not row[1].fits, row[1].seconds, row[1].seconds_without_overlap))
    print(f"{'mesh':<58}{'GiB':>8}{'fits':>6}{'binds':>10}{'ms':>11}{'no overlap':>12}"
          f"{'MFU':>8}{'tokens/s':>12}  figures")  # fmt: skip
    for mesh, plan, compiled in rows:
        print(f"{flags(mesh):<58}{plan.bytes / 2**30:>8,.1f}{'yes' if plan.fits else 'NO':>6}{plan.binds:>10}"
              f"{plan.seconds * 1e3:>11,.1f}{plan.seconds_without_overlap * 1e3:>12,.1f}{plan.utilization:>8.1%}"
              f"{plan.tokens_per_second:>12,.0f}"
              f"  {'compiled' if compiled else 'formulas'}")  # fmt: skip
    print("All times are estimates.")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)

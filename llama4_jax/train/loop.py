"""READ SECOND. A whole run: mesh → data → state → (batch → step → log → evaluate → save)* → a sample.

A run can die anywhere. Everything a resume needs is in one checkpoint (parameters, optimizer, place in the data, step,
config), and the same command resumes it, with the same numbers bit for bit on the same mesh.
"""

import contextlib
import datetime
import functools
import json
import math
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llama4_jax.atomic import write_atomically
from llama4_jax.config import RunConfig, differences, from_json, to_json
from llama4_jax.data.batch import Batch, empty_batch
from llama4_jax.data.loader import Loader, make_loader, merge_states
from llama4_jax.data.sources import parse_source
from llama4_jax.infer.generate import generate
from llama4_jax.inputs.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from llama4_jax.model.flops import count_parameters, train_flops_per_tile, train_flops_per_token
from llama4_jax.ops.cross_entropy import token_scores
from llama4_jax.processor import image_config
from llama4_jax.sharding import make_mesh
from llama4_jax.train import hosts
from llama4_jax.train.begin import check_fits
from llama4_jax.train.lock import alone
from llama4_jax.train.metrics import Log, figures, peak_flops
from llama4_jax.train.next_token import next_token
from llama4_jax.train.rows import Rows
from llama4_jax.train.stage import Stage
from llama4_jax.train.step import (
    Step,
    StepMetrics,
    Trainer,
    TrainState,
    batch_shardings,
    make_trainer,
    model_of,
)
from llama4_jax.train.stop import Stop, stop_signals
from llama4_jax.weights.adapters import BASE, base_of, open_base, write_base
from llama4_jax.weights.checkpoint import Checkpoints, named_leaves, with_leaves
from llama4_jax.weights.load import arrays_of, initial_weights, quantized_matrices
from llama4_jax.weights.source import Weights, open_weights

T = TypeVar("T")

_SAMPLED, _SEARCHED = 16_384, 1_000_000  # tokens: to say what share of them are targets; until there must be one


class NotFinite(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Parts(NamedTuple):
    """What a run is made of, before anything is compiled or written."""

    directory: epath.Path
    mesh: Mesh
    tokenizer: Tokenizer
    trainer: Trainer
    rows: Rows
    batches: Loader
    heldout: Loader | None
    share_of_targets: float  # of the tokens, in the first batches
    base: Weights | None  # that LoRA's adapters belong on


def train(config: RunConfig) -> epath.Path:
    """Trains, or goes on training, the run of `config`; returns its directory.

    Raises ValueError for a config that does not fit the machine, the data or the run that is there already; OSError if
    a checkpoint cannot be written; NotFinite. Whatever is raised, the run can be resumed from its last checkpoint. With
    several hosts, what is wrong on one before the run begins is raised on all, as OnEveryHost.
    """
    hosts.check_same("config and code", hosts.config_and_code(config))
    with hosts.together("setting up"):
        parts = prepare(config)
    run, trainer, batches = parts.directory, parts.trainer, parts.batches
    hosts.check_same("data", {"what data.sources hold": batches.get_state()["data"]})
    make = functools.partial(Checkpoints, run, keep=config.keep_checkpoints)
    with (
        alone(run),
        jax.set_mesh(parts.mesh),
        stop_signals(parts.mesh) as stop,
        contextlib.closing(make()) as checkpoints,
    ):
        hosts.check_same("run_dir, which all must share", {f"checkpoints in {run}": str(checkpoints.steps())})
        compiled = CompiledStep(config, trainer)
        begin = {"base": parts.base, "before_init": lambda: compiled.start(0)}
        state = restore(config, trainer, checkpoints, batches, **begin)
        first = int(state.step)
        with hosts.together("resuming"):
            if first > config.steps:
                raise ValueError(
                    f"{run} is at step {first} already, and steps is {config.steps}. Give more --steps to train it "
                    f"further, or this run another --name."
                )
            if hosts.index() == 0:
                parts.tokenizer.save(run)
                if parts.base is not None and not (run / BASE).exists():
                    write_base(run, base_of(config.init_from, parts.base))
                write_atomically(run / "config.json", to_json(config))
        with contextlib.closing(Log(run, first_step=first, steps=config.steps)) as log:
            describe(config, parts, first, log)
            state = run_steps(config, parts, state, checkpoints, log, stop, compiled)
        if int(state.step) == config.steps:
            show_sample(config, trainer, state, parts.tokenizer, run, log)
    return run


def prepare(config: RunConfig) -> Parts:
    """Raises ValueError and OSError as `train` does: all that is wrong at once. Waits for no other host."""
    problems: list[ValueError | OSError] = []

    def attempt(make: Callable[[], T]) -> T | None:
        try:
            return make()
        except (ValueError, OSError) as error:
            problems.append(error)
            return None

    attempt(lambda: config.check_mesh(jax.device_count()))
    tokenizer = attempt(lambda: checked_tokenizer(config))
    directory = epath.Path(config.run_dir) / config.name
    attempt(lambda: check_same_run(directory, config))
    if config.init_from is not None and not (directory / "config.json").exists():
        attempt(lambda: check_fits(config))
    ids = any(parse_source(spec).kind == "tokens" for spec in (*config.data.sources, *config.data.heldout_sources))
    if problems and (tokenizer is not None or not ids):  # what else is wrong, so that all of it can be mended at once
        attempt(lambda: make_loader(config.data, tokenizer or ByteTokenizer(), split="train").close())
    raise_all(problems)
    base = attempt(lambda: base_of_run(config, directory)) if config.lora.rank else None
    raise_all(problems)
    mesh = make_mesh(config.mesh)
    vision = config.model.vision
    pictures = attempt(
        lambda: None if vision is None else image_config(vision, tokenizer, max_tiles=config.data.max_tiles)
    )
    of_base = None if base is None else quantized_matrices(base)
    trainer = attempt(lambda: make_trainer(config, mesh, next_token, of_base))
    rows = attempt(lambda: Rows(mesh, config.data.batch_size))
    raise_all(problems)
    how = {"pictures": pictures, "process_index": rows.share, "process_count": rows.shares}
    batches = attempt(lambda: make_loader(config.data, tokenizer, split="train", **how))
    heldout = None
    if config.data.holds_out:
        heldout = attempt(
            lambda: make_loader(config.data, tokenizer, split="heldout", max_batches=config.eval_batches, **how)
        )
    raise_all(problems)
    share = attempt(lambda: share_of_targets(batches, "data.sources"))
    if heldout is not None:
        attempt(lambda: share_of_targets(heldout, "the held-out data"))
    raise_all(problems)
    return Parts(directory, mesh, tokenizer, trainer, rows, batches, heldout, share, base)


def base_of_run(config: RunConfig, run: epath.Path) -> Weights:
    """The weights that LoRA's adapters belong on: those of the run that is there already, or of `init_from`.

    Raises ValueError if there are none, or if they are not those that the run's adapters were trained beside.
    """
    if config.init_from is None:
        raise ValueError(
            f"lora.rank is {config.lora.rank}, but there are no weights that adapters could learn beside: give "
            f"--init-from PATH."
        )
    return open_base(run) if (run / BASE).exists() else open_weights(config.init_from)


def raise_all(problems: list[ValueError | OSError]) -> None:
    """One error for several; the same one twice is one."""
    by_text = {str(problem): problem for problem in problems}
    if len(by_text) == 1:
        raise next(iter(by_text.values()))
    if by_text:
        raise ValueError("\n".join(by_text))


def checked_tokenizer(config: RunConfig) -> Tokenizer:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        hint = "" if config.init_from is None else f" Give the tokenizer of {config.init_from}: --data.tokenizer PATH."
        raise ValueError(
            f"model.vocab_size ({config.model.vocab_size}) is smaller than the tokenizer's ({tokenizer.vocab_size}, "
            f"data.tokenizer={config.data.tokenizer!r}).{hint}"
        )
    tokenizer.leave_free(config.model.vocab_size)
    return tokenizer


def share_of_targets(batches: Loader, what: str) -> float:
    """The fraction of tokens, padding not counted, that the first batches give the loss. Leaves the loader where it is.

    Raises ValueError if the first million has none: such a run learns, or measures, nothing.
    """
    place = batches.get_state()
    tokens = targets = 0
    for batch in batches:
        tokens += int(np.sum(batch.segment_ids > 0))
        targets += int(np.sum(batch.weights > 0))
        if tokens >= (_SAMPLED if targets else _SEARCHED):
            break
    batches.set_state(place)
    if not targets:
        raise ValueError(
            f"none of the first {tokens:,} tokens of {what} is a target of the loss: there is nothing to learn or to "
            f"measure. With data.loss_on replies, conversations need messages of the assistant."
        )
    return targets / tokens


def check_same_run(run: epath.Path, config: RunConfig) -> None:
    """Raises ValueError if the directory holds a run with a config that makes other numbers."""
    path = run / "config.json"
    changed = differences(from_json(path.read_bytes(), str(path)), config) if path.exists() else []
    if changed:
        raise ValueError(
            f"{run} holds a run with another config. It differs in:\n  "
            + "\n  ".join(changed)
            + f"\nGive this run another --name, or remove {run} to start anew."
        )


def restore(
    config: RunConfig,
    trainer: Trainer,
    checkpoints: Checkpoints,
    batches: Loader,
    before_init: Callable[[], None],
    base: Weights | None = None,
) -> TrainState:
    """The state of the newest checkpoint, with `batches` put where it was; or a new state, after `before_init`. What
    LoRA does not train is taken from its base in both."""
    of_lora = base is not None

    def abstract():
        leaves = split_leaves(trainer.abstract, of_lora)
        return leaves.model, leaves.training

    fixed = split_leaves(trainer.abstract, of_lora).base
    saved = checkpoints.newest(abstract=abstract)
    if saved is None:
        before_init()
        with compiling("the first parameters", say_first):
            state = jax.block_until_ready(trainer.init_learned())
        if of_lora:
            fixed = arrays_of(base, config.model, fixed, all_of_them=True)
            return with_leaves(trainer.abstract, {**named_leaves(state), **fixed})
        if config.init_from is not None:
            leaves = split_leaves(state)
            model = initial_weights(config.init_from, config.model, leaves.model)
            state = with_leaves(state, {**model, **leaves.training})
        return state
    batches.set_state(merge_states(saved.progress.get("data")))
    fixed = arrays_of(base, config.model, fixed, all_of_them=True) if of_lora else {}
    return with_leaves(trainer.abstract, {**saved.model, **saved.training, **fixed})


class Leaves(NamedTuple):
    """A state's arrays by name."""

    model: dict[str, Any]  # what a checkpoint has as the model: with LoRA, its factors
    training: dict[str, Any]
    base: dict[str, Any]  # what LoRA's base has, and no checkpoint


def split_leaves(state: TrainState, of_lora: bool = False) -> Leaves:
    leaves, named = Leaves({}, {}, {}), named_leaves(state)
    for name, leaf in named.items():
        kind = name.partition(".")[0]
        if kind == "fixed" or (of_lora and kind == "bias"):
            leaves.base[name] = leaf
        else:
            (leaves.model if kind in ("params", "bias") else leaves.training)[name] = leaf
    return leaves


def run_steps(
    config: RunConfig,
    parts: Parts,
    state: TrainState,
    checkpoints: Checkpoints,
    log: Log,
    stop: Stop,
    compiled: "CompiledStep",
) -> TrainState:
    """The loop. Figures are read when the next step is under way, so that the devices never wait for the console."""
    trainer, rows, heldout = parts.trainer, parts.rows, parts.heldout
    stage = Stage(parts.batches, next_token)
    evaluate = make_evaluation(trainer, rows)
    first = step = int(state.step)
    if step < config.steps:
        compiled.at(step, log.say)
    rate = Rate(config, peak_flops(trainer.mesh.size))  # measured when nothing is compiled beside it
    pending: tuple[int, StepMetrics] | None = None
    previous: StepMetrics | None = None

    def report() -> None:
        nonlocal pending
        if pending is None:
            return
        at, metrics = pending
        pending = None
        values = figures(metrics) | rate.take(at)
        log.write(at, values)
        log.show(at, summary(values, config.steps - at, rate.seconds_per_step))
        if int(metrics.bad_steps) >= config.max_bad_steps:
            raise NotFinite(
                f"the loss or its gradient was not finite in {int(metrics.bad_steps)} steps in a row, up to step {at}. "
                f"These updates were left out, so the last checkpoint ({checkpoints.steps()[-1:] or 'none'}) is sound. "
                f"Lower optimizer.peak_lr, lengthen optimizer.warmup_steps, or look at the data of these steps."
            )

    def save() -> None:
        if step in checkpoints.steps():
            return
        log.flush()  # so that what is logged up to here is kept before the checkpoint says that it was done
        jax.block_until_ready(state)  # what the processes tell each other must not meet the collectives of a step
        leaves = split_leaves(state, config.lora.rank > 0)
        places = all_processes(stage.batches.get_state())
        checkpoints.save(step, leaves.model, leaves.training, {"step": step, "data": places})

    profile = Profile(config, parts.directory, first, log)
    while step < config.steps:
        state, ending = stop.now(state)
        if ending:
            break
        profile.before(step)
        batch = rows.on_devices(next(stage.batches))
        state, metrics = compiled.at(step, log.say)(state, batch, stage.frozen)
        profile.after(step, metrics)
        jax.block_until_ready(previous)  # one step waits while another runs: a signal is heeded soon, the bar is true
        previous = metrics
        step += 1
        log.advance(step)
        report()  # of the step before
        if step == first + 1:
            jax.block_until_ready(state)
            rate.start(step)  # the first step touches its memory
        if step % config.log_every == 0 or step == config.steps:
            pending = (step, metrics)
        if heldout is not None and (step % config.eval_every == 0 or step == config.steps):
            report()
            measured = evaluate(state, heldout)
            log.write(step, measured.figures())
            log.say(f"step {step}: held-out {measured}")
            rate.start(step)
        if step % config.checkpoint_every == 0 and step < config.steps:
            report()
            save()
    profile.close()
    report()
    save()
    checkpoints.wait()
    if step < config.steps:
        log.say(f"stopped at step {step}, which is saved; the same command goes on from there.")
    return state


class CompiledStep:
    """The train step, compiled in the background while the first parameters are made, and other parts of it when other
    parameters begin to learn."""

    def __init__(self, config: RunConfig, trainer: Trainer):
        self._config, self._trainer = config, trainer
        self._jitted: Step | None = None
        self._made: Future[Step] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="compiling")

    def start(self, step: int) -> None:
        """Begins to compile the update after so many others."""
        self._jitted = self._trainer.step_at(step)
        self._made = self._worker.submit(self._compile, self._jitted)

    def at(self, step: int, say: Callable[[str], None]) -> Step:
        """The update after so many others; waits for it, and says so."""
        if self._trainer.step_at(step) is not self._jitted:
            self.start(step)
        if not self._made.done():
            with compiling("the train step", say):
                wait([self._made])
        return self._made.result()

    def _compile(self, jitted: Step) -> Step:
        config, mesh = self._config, self._trainer.mesh
        data, vision = config.data, config.model.vision
        tile_size = vision.image_size if vision and data.tiles_per_row else 0
        batch = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct((data.batch_size, *x.shape[1:]), x.dtype, sharding=sharding),
            empty_batch(1, data.seq_len, 0, tiles=data.tiles_per_row, tile_size=tile_size),
            batch_shardings(mesh, images=data.tiles_per_row > 0),
        )
        with jax.set_mesh(mesh):  # of this thread
            compiled = jitted.lower(self._trainer.abstract, batch, None).compile()
        # What is compiled ahead takes no int4 that was put on a CPU, since JAX names its layout otherwise. It is then
        # called as usual, and taken from the cache of what was compiled.
        has_int4 = any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(self._trainer.abstract))
        return jitted if has_int4 else compiled


@contextlib.contextmanager
def compiling(what: str, say: Callable[[str], None], every: float = 10.0) -> Iterator[None]:
    """Says that this is compiled, how long it has taken so far, and how long it took."""
    start, ended = time.perf_counter(), threading.Event()

    def tick() -> None:
        while not ended.wait(every):
            say(f"compiling {what} … {time.perf_counter() - start:.0f} s")

    say(f"compiling {what} …")
    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield
    finally:
        ended.set()
        clock.join()
    say(f"compiled {what} in {time.perf_counter() - start:.1f} s")


def say_first(line: str) -> None:
    """On the first host, before there is a log."""
    if hosts.index() == 0:
        print(line, flush=True)


class Rate:
    """Tokens a second since the last report, and the share of the machine's peak that the model's operations are."""

    def __init__(self, config: RunConfig, peak: float | None):
        self._tokens_per_step = config.data.batch_size * config.data.seq_len
        tiles = config.data.batch_size * config.data.tiles_per_row * train_flops_per_tile(config.model)
        learn = not config.lora.rank
        tokens = self._tokens_per_step * train_flops_per_token(config.model, config.data.seq_len, weights_learn=learn)
        self._flops_per_step = tokens + tiles
        self._peak = peak
        self.seconds_per_step: float | None = None
        self.start(0)

    def start(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def take(self, step: int) -> dict[str, float]:
        seconds, steps = time.perf_counter() - self._time, step - self._step
        self.start(step)
        if steps <= 0:
            return {}
        self.seconds_per_step = seconds / steps
        tokens_per_second = steps * self._tokens_per_step / seconds
        values = {"tokens_per_second": tokens_per_second}
        if self._peak is not None:
            values["mfu"] = steps * self._flops_per_step / seconds / self._peak
        return values


def summary(values: dict[str, float], steps_left: int, seconds_per_step: float | None) -> str:
    """A line of figures; docs/training.md says what each means."""
    parts = [f"loss {values['loss']:.3f}", f"{values['bits_per_byte']:.3f} bits/byte"]
    parts += [f"lr {values['learning_rate']:.2e}", f"grad {values['grad_norm']:.2f}"]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    if "max_violation" in values:
        parts.append(f"MaxVio {values['max_violation']:.2f} dead {values['dead_experts']:.1f}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    if seconds_per_step is not None and steps_left:
        parts.append(f"left {datetime.timedelta(seconds=round(steps_left * seconds_per_step))}")
    return "  ".join(parts)


class Heldout(NamedTuple):
    """What held-out data shows: all its nats, in bits, over all its bytes; and how many documents of which a part is
    to be foretold, such as a conversation's replies, had all of it right: what greedy decoding would write."""

    bits_per_byte: float | None  # None: its targets are special tokens alone, which stand for no bytes
    exact: int
    replies: int

    def figures(self) -> dict[str, float]:
        found = {} if self.bits_per_byte is None else {"heldout_bits_per_byte": self.bits_per_byte}
        return found | ({"heldout_exact_replies": self.exact / self.replies} if self.replies else {})

    def __str__(self) -> str:
        share = f", {self.exact / self.replies:.1%} of {self.replies} replies exact" if self.replies else ""
        bits = "no bytes to measure" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits per byte"
        return bits + share


def make_evaluation(trainer: Trainer, rows: Rows) -> Callable[[TrainState, Iterable[Batch]], Heldout]:
    """Compiled once for a run."""

    @jax.jit
    def sums(params: nnx.State, fixed: nnx.State, bias: nnx.State, batch: Batch):
        model = nnx.merge(trainer.graphdef, params, fixed, bias)
        hidden, _ = model.hidden(
            batch.tokens, images=batch.images, positions=batch.positions, segment_ids=batch.segment_ids
        )
        scores = token_scores(hidden, model.head(), batch.targets)
        counts = batch.weights > 0

        def documents_with(tokens):  # [B, T + 1]: document 0 is padding
            some = functools.partial(jax.ops.segment_max, num_segments=tokens.shape[1] + 1)
            return jax.vmap(some)(tokens.astype(jnp.int32), batch.segment_ids)[:, 1:] > 0

        replies = documents_with(counts) & documents_with(~counts)
        exact = replies & ~documents_with(counts & ~scores.likeliest)
        return jnp.sum(scores.nll * batch.weights), jnp.sum(batch.target_bytes), jnp.sum(exact), jnp.sum(replies)

    def evaluate(state: TrainState, heldout: Iterable[Batch]) -> Heldout:
        nats, length, exact, replies = 0.0, 0, 0, 0
        for batch in heldout:
            found = jax.device_get(sums(state.params, state.fixed, state.bias, rows.on_devices(batch)))
            nats, length = nats + float(found[0]), length + int(found[1])
            exact, replies = exact + int(found[2]), replies + int(found[3])
        return Heldout(nats / math.log(2) / length if length else None, exact, replies)

    return evaluate


def all_processes(state: dict) -> list[dict]:
    """Every process's place in the data, for a checkpoint that any number of processes can resume."""
    if hosts.count() == 1:
        return [state]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.array(text.size))))
    padded = np.pad(text, (0, longest - text.size), constant_values=ord(" "))
    # Processes that share their rows have read the same.
    places = dict.fromkeys(row.tobytes() for row in multihost_utils.process_allgather(padded))
    return [json.loads(place) for place in places]


class Profile:
    """With --profile, records three steps for Perfetto or TensorBoard: the sixth to the eighth if the run has so many,
    since the first ones compile and touch their memory."""

    def __init__(self, config: RunConfig, run: epath.Path, first: int, log: Log):
        self._directory, self._log = run / "profile", log
        start = first + min(5, max(config.steps - first - 3, 0))
        self._steps = range(start, start + 3) if config.profile and hosts.index() == 0 else range(0)
        self._recording = False

    def before(self, step: int) -> None:
        if step in self._steps and not self._recording:
            self._written = Path(tempfile.mkdtemp())  # JAX writes to a disk only
            jax.profiler.start_trace(self._written, create_perfetto_trace=True)
            self._recording = True

    def after(self, step: int, result: Any) -> None:
        if self._recording and step + 1 not in self._steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
            copy_files(self._written, self._directory)
            shutil.rmtree(self._written)
            self._log.say(f"a profile is in {self._directory}: open its perfetto_trace.json.gz in ui.perfetto.dev")


def copy_files(source: Path, destination: epath.Path) -> None:
    """All files under one directory, to the same places under another."""
    for file in source.rglob("*"):
        if file.is_file():
            copy = destination / file.relative_to(source).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())


def describe(config: RunConfig, parts: Parts, step: int, log: Log) -> None:
    """What the run is; and, if it has several hosts, on each of them what it has of it."""
    if hosts.count() > 1:
        devices = jax.local_devices()
        print(
            f"{hosts.name()} of {hosts.count()}: {len(devices)} of {jax.device_count()} devices "
            f"({devices[0].device_kind}), rows {parts.rows} of the {config.data.batch_size} of a batch",
            flush=True,
        )
    count = count_parameters(config.model)
    mesh = ", ".join(f"{name} {size}" for name, size in parts.mesh.shape.items() if size > 1) or "one device"
    pictures = f" and {count.vision / 1e6:,.1f} M for pictures" if count.vision else ""
    log.say(
        f"{config.name}: {count.total / 1e6:,.1f} M parameters, {count.active / 1e6:,.1f} M of them active{pictures}; "
        f"{config.data.batch_size} x {config.data.seq_len} tokens a step; mesh: {mesh}"
    )
    share = parts.share_of_targets
    if config.lora.rank:
        learned = sum(leaf.size for leaf in jax.tree.leaves(parts.trainer.abstract.params))
        log.say(
            f"{learned / 1e6:,.2f} M of adapters learn, of rank {config.lora.rank}; the base stays: {config.init_from}"
        )
    log.say(f"{'all' if share == 1 else f'{share:.1%}'} of the tokens are targets of the loss, in the first batches")
    log.say(f"figures: {parts.directory / 'metrics.jsonl'}, and in a browser by")
    log.say(f"  pip install tensorboard && tensorboard --logdir {shlex.quote(str(parts.directory / 'tensorboard'))}")
    if step:
        log.say(f"resumed at step {step} of {config.steps}")


def show_sample(
    config: RunConfig, trainer: Trainer, state: TrainState, tokenizer: Tokenizer, run: epath.Path, log: Log
) -> None:
    """Something that the trained model writes, and the command for more."""
    model = model_of(trainer.graphdef, state)
    prompt = tokenizer.encode(config.sample_prompt, bos=True)
    room = config.model.context_length - len(prompt)
    (tokens,) = generate(
        model,
        [prompt],
        max_new_tokens=min(config.sample_tokens, room),
        temperature=0.7,
        top_p=0.9,
        stop_ids=tokenizer.stop_ids,
    )
    log.say(f"\n{config.sample_prompt}{tokenizer.decode(tokens, skip_special=True)}\n")
    log.say(f"More of it:\n  python infer.py generate {run} --prompt {shlex.quote(config.sample_prompt)} "
            f"--max-new-tokens {config.sample_tokens} --temperature 0.7 --top-p 0.9")  # fmt: skip

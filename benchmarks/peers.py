"""Ours against Hugging Face transformers: same weights, same inputs, same machine, one interleaved run.

    python benchmarks/peers.py                       # both models, both dtypes: about an hour
    python benchmarks/peers.py --models scout_like --dtypes float32 --rounds 5 --json results.json

Each contender lives in a process of its own, so that its peak memory is its own. In every round each process runs the
task once, in turn, while the others sleep; figures are medians over the rounds with the lowest and highest beside them.
Peak memory is the process's high-water mark during the task (VmHWM, reset before it), weights included.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

THREADS = min(4, os.cpu_count() or 1)
BATCH, LENGTH, PROMPT, NEW_TOKENS = 4, 1024, 128, 32

SHARED = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 512,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "scout_like": {
        **SHARED,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "maverick_like": {**SHARED, "num_local_experts": 32, "interleave_moe_layer_step": 2, "use_qk_norm": False},
}
TASKS = ("forward", "train_step", "prefill", "decode_1", "decode_8")
# Tokens that a task's time is divided into.
TOKENS = {
    "forward": BATCH * LENGTH,
    "train_step": BATCH * LENGTH,
    "prefill": PROMPT,
    "decode_1": NEW_TOKENS,
    "decode_8": 8 * NEW_TOKENS,
}


# ---------------------------------------------------------------------------------------------------------------------
# Contenders. Each has one method a task, which runs it once and returns its seconds.


def random_tokens(batch: int, length: int, seed: int = 0):
    import numpy as np

    return np.random.default_rng(seed).integers(1, SHARED["vocab_size"], (batch, length), dtype=np.int32)


class Ours:
    def __init__(self, path: str, dtype: str):
        import llama4_jax

        self.model = llama4_jax.from_pretrained(path, dtype=dtype)

    def forward(self) -> float:
        import jax
        from flax import nnx

        if not hasattr(self, "_forward"):
            graphdef, self._state = nnx.split(self.model)
            self._forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
        tokens = random_tokens(BATCH, LENGTH)
        start = time.perf_counter()
        jax.block_until_ready(self._forward(self._state, tokens))
        return time.perf_counter() - start

    def train_step(self) -> float:
        """Forward, backward and AdamW by the project's own training step, on float32 or bfloat16 parameters."""
        import jax

        if not hasattr(self, "_train"):
            self.__dict__.pop("_state", None)
            self._train = OurTraining(self.__dict__.pop("model"))
        start = time.perf_counter()
        jax.block_until_ready(self._train.step())
        return time.perf_counter() - start

    def _generate(self, batch: int, new_tokens: int) -> float:
        import llama4_jax

        prompts = random_tokens(batch, PROMPT).tolist()
        start = time.perf_counter()
        out = llama4_jax.generate(self.model, prompts, max_new_tokens=new_tokens, temperature=0.0)
        seconds = time.perf_counter() - start
        assert [len(row) for row in out] == [new_tokens] * batch
        return seconds

    def prefill(self) -> float:
        return self._generate(1, 1)

    def decode_1(self) -> float:
        return self._generate(1, NEW_TOKENS + 1) - self._generate(1, 1)

    def decode_8(self) -> float:
        return self._generate(8, NEW_TOKENS + 1) - self._generate(8, 1)

    def first_token(self) -> None:
        self._generate(1, 1)


class OurTraining:
    """The project's own training step on the parameters of `model`, which it takes: they are donated to each step."""

    def __init__(self, model):
        import jax
        import numpy as np

        from llama4_jax.config import RunConfig
        from llama4_jax.data.batch import Batch
        from llama4_jax.data.config import DataConfig
        from llama4_jax.sharding import MeshConfig, make_mesh
        from llama4_jax.train.next_token import next_token
        from llama4_jax.train.optimizer import OptimizerConfig, make_optimizer
        from llama4_jax.train.step import first_state, make_trainer

        config = RunConfig(
            name="peers",
            model=model.config,
            data=DataConfig(seq_len=LENGTH, batch_size=BATCH),
            precision=model.precision,
            optimizer=OptimizerConfig(peak_lr=1e-5, warmup_steps=0),
            steps=1000,
            scan_layers=False,
        )
        self.trainer = make_trainer(config, make_mesh(MeshConfig()), next_token)
        state = first_state(model, make_optimizer(config.optimizer, config.steps))
        # Where the step leaves it, so that the second step is the first one's program.
        self.state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, self.trainer.abstract))
        tokens = random_tokens(BATCH, LENGTH)
        ones = np.ones_like(tokens)
        self.batch = Batch(
            tokens=tokens,
            targets=np.roll(tokens, -1, axis=1),
            positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape).copy(),
            segment_ids=ones,
            weights=ones.astype(np.float32),
            target_bytes=ones,
        )

    def step(self):
        self.state, metrics = self.trainer.step(self.state, self.batch, None)
        return self.state, metrics


class Transformers:
    def __init__(self, path: str, dtype: str, attention: str):
        import torch
        from transformers import Llama4ForCausalLM

        torch.set_num_threads(THREADS)
        self.torch = torch
        self.model = Llama4ForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()

    def forward(self) -> float:
        tokens = self.torch.from_numpy(random_tokens(BATCH, LENGTH)).long()
        with self.torch.inference_mode():
            start = time.perf_counter()
            self.model(tokens, use_cache=False)
            return time.perf_counter() - start

    def train_step(self) -> float:
        torch = self.torch
        if not hasattr(self, "_optimizer"):
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.1)
        tokens = torch.from_numpy(random_tokens(BATCH, LENGTH)).long()
        start = time.perf_counter()
        self.model(tokens, labels=tokens, use_cache=False).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def _generate(self, batch: int, new_tokens: int) -> float:
        torch = self.torch
        tokens = torch.from_numpy(random_tokens(batch, PROMPT)).long()
        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False
            )
            seconds = time.perf_counter() - start
        assert out.shape[1] == PROMPT + new_tokens
        return seconds

    prefill, decode_1, decode_8, first_token = Ours.prefill, Ours.decode_1, Ours.decode_8, Ours.first_token


CONTENDERS = {
    "ours": Ours,
    "transformers_eager": lambda path, dtype: Transformers(path, dtype, "eager"),
    "transformers_sdpa": lambda path, dtype: Transformers(path, dtype, "sdpa"),
}


# ---------------------------------------------------------------------------------------------------------------------
# A process for each contender, commanded line by line over its standard input.


def reset_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def work(name: str, path: str, dtype: str) -> None:
    """Runs the tasks named on standard input; answers each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    contender = CONTENDERS[name](path, dtype)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        task = line.strip()
        reset_peak()
        seconds = getattr(contender, task)()
        print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}), file=answers)


class Worker:
    def __init__(self, name: str, path: str, dtype: str):
        command = [sys.executable, __file__, "--work", name, path, dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args[3]} ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, task: str) -> dict:
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


def first_token_seconds(name: str, path: str, dtype: str) -> float:
    """From the start of a fresh process to its first generated token: imports, weights, compilation and all."""
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--first-token", name, path, dtype], check=True, env=environment())
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------


def save_model(settings: dict, path: str) -> None:
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    Llama4ForCausalLM(Llama4TextConfig(**settings)).save_pretrained(path)


@dataclasses.dataclass
class Figure:
    model: str
    dtype: str
    task: str
    contender: str
    seconds: list[float]
    peak_mib: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(model: str, path: str, dtype: str, tasks: list[str], names: list[str], rounds: int) -> list[Figure]:
    figures = []
    if without_training := [task for task in tasks if task != "train_step"]:
        figures += interleave(model, path, dtype, without_training, names, rounds)
    if "train_step" in tasks:
        # In pairs: the memory of three that train does not fit into 24 GiB. Ours is measured beside each of the others.
        others = [name for name in names if name != "ours"]
        pairs = [["ours", other] for other in others] if "ours" in names and others else [[name] for name in names]
        merged: dict[str, Figure] = {}
        for pair in pairs:
            for figure in interleave(model, path, dtype, ["train_step"], pair, rounds):
                known = merged.setdefault(figure.contender, figure)
                if known is not figure:
                    known.seconds += figure.seconds
                    known.peak_mib = max(known.peak_mib, figure.peak_mib)
        figures += merged.values()
    return figures


def interleave(model: str, path: str, dtype: str, tasks: list[str], names: list[str], rounds: int) -> list[Figure]:
    figures = []
    workers = {name: Worker(name, path, dtype) for name in names}
    for task in tasks:
        for worker in workers.values():
            worker.run(task)  # compilation, first touch of memory
        answers: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, worker in workers.items():
                answers[name].append(worker.run(task))
        for name in names:
            seconds = [a["seconds"] for a in answers[name]]
            figures.append(Figure(model, dtype, task, name, seconds, max(a["peak_mib"] for a in answers[name])))
            print_figure(figures[-1])
    for worker in workers.values():
        worker.close()
    return figures


def print_figure(figure: Figure) -> None:
    tokens = TOKENS.get(figure.task)
    rate = f"{tokens / figure.median:9.1f} tokens/s" if tokens else f"{figure.median:9.1f} s       "
    low, high = min(figure.seconds), max(figure.seconds)
    memory = f"{figure.peak_mib:8.0f} MiB" if figure.peak_mib else ""
    print(
        f"{figure.model:14} {figure.dtype:9} {figure.task:12} {figure.contender:20} {rate}"
        f"  ({low:.3f} … {high:.3f} s) {memory}",
        flush=True,
    )


def markdown(figures: list[Figure]) -> str:
    """A table: one row a model, dtype and task; ours, the better transformers, and the ratios."""
    lines = [
        "| model | dtype | task | ours | transformers eager | transformers sdpa | ours / best | memory ours / best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, dict[str, Figure]] = {}
    for f in figures:
        groups.setdefault((f.model, f.dtype, f.task), {})[f.contender] = f
    for (model, dtype, task), by_name in groups.items():
        ours = by_name.get("ours")
        others = [f for name, f in by_name.items() if name != "ours"]
        if ours is None or not others:
            continue
        best = min(others, key=lambda f: f.median)
        cells = []
        for name in CONTENDERS:
            f = by_name.get(name)
            if f is None:
                cells.append("")
            elif task in TOKENS:
                rates = sorted(TOKENS[task] / s for s in f.seconds)
                cells.append(f"{TOKENS[task] / f.median:,.0f} tok/s ({rates[0]:,.0f}–{rates[-1]:,.0f})")
            else:
                cells.append(f"{f.median:.1f} s")
        memory = ""
        if ours.peak_mib:
            least = min(f.peak_mib for f in others)
            memory = f"{ours.peak_mib:,.0f} / {least:,.0f} MiB ({ours.peak_mib / least:.2f}×)"
        lines.append(
            f"| {model} | {dtype} | {task} | {' | '.join(cells)} | **{best.median / ours.median:.1f}×** | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, "first_token"], choices=[*TASKS, "first_token"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write every figure here")
    args = parser.parse_args()

    figures = []
    for model in args.models:
        path = tempfile.mkdtemp(prefix="llama4_peers_")
        try:
            save_model(MODELS[model], path)
            for dtype in args.dtypes:
                tasks = [task for task in args.tasks if task in TASKS]
                if tasks:
                    figures += measure(model, path, dtype, tasks, args.contenders, args.rounds)
                if "first_token" in args.tasks:
                    for name in args.contenders:
                        seconds = [first_token_seconds(name, path, dtype) for _ in range(3)]
                        figures.append(Figure(model, dtype, "first_token", name, seconds, None))
                        print_figure(figures[-1])
                if args.json:
                    args.json.write_text(json.dumps([dataclasses.asdict(f) for f in figures], indent=1))
        finally:
            shutil.rmtree(path)
    print("\n" + markdown(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    elif sys.argv[1:2] == ["--first-token"]:
        CONTENDERS[sys.argv[2]](*sys.argv[3:]).first_token()
    else:
        main()

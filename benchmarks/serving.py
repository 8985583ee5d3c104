"""The engine against closed batches and against one request at a time: same model, same requests, one interleaved run.

    python benchmarks/serving.py                                    # the tiny preset and a larger one
    python benchmarks/serving.py --models tiny --rounds 5 --json serving.json
    python benchmarks/serving.py --against transformers --clients 1 8 32        # instead: needs the extra `test`

Requests have prompts and replies of log-normal lengths, as those of people have. "batches" answers them by `generate`
in the order of their arrival, eight at a time, each batch until its longest reply is done; "singly" one after another.
All are compiled before the clock runs. Three more figures are the engine's own: the time to the first token when all
requests come at once, a four-turn conversation with and without what is found in the cache, and a decoding step at 100
held tokens by the size of a slot. Figures are medians over rounds, with the lowest and the highest.

Against transformers, clients ask for one reply after another, of the same weights (README's Scout-like model, exported
by transformers), in processes of their own that take turns: run nothing else meanwhile. Its continuous batching, on
which its server builds, refuses Llama 4, which is tried first and printed. So it batches as one must: whoever waits is
answered by one call of `generate`, padded to the longest prompt, which ends with the longest reply. In its favour each
client is told of its own tokens as they come, and has its reply when its own last token came.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import peers

import llama4_jax
from llama4_jax.infer import engine_programs as programs
from llama4_jax.infer.engine import Engine
from llama4_jax.infer.generate import generate
from llama4_jax.model.config import ModelConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import preset

SLOTS, CONTEXT = 8, 1024
MODELS = {
    "tiny": preset("tiny"),
    # README's Scout-like model, which is timed against transformers there
    "scout_like": ModelConfig(
        vocab_size=32_768, embed_dim=512, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64, mlp_dim=2048,
        expert_mlp_dim=1024, num_experts=16, attention_chunk=512, context_length=4096,
    ),
}  # fmt: skip

Request = tuple[list[int], int]  # a prompt, and how many tokens of reply


def requests(count: int, vocab_size: int, seed: int) -> list[Request]:
    draw = np.random.default_rng(seed)

    def length(mean: float, most: int) -> int:
        return int(np.clip(draw.lognormal(np.log(mean), 1.1), 4, most))

    return [(draw.integers(0, vocab_size, length(60, 400)).tolist(), length(40, 300)) for _ in range(count)]


def by_engine(engine: Engine, asked: list[Request]) -> list[float]:
    """Seconds until each request's first token."""
    start, first = time.perf_counter(), [0.0] * len(asked)

    def hear(i: int) -> Callable:
        def heard(handle, new):
            first[i] = first[i] or time.perf_counter() - start

        return heard

    handles = [engine.submit(prompt, max_new_tokens=new) for prompt, new in asked]
    for i, handle in enumerate(handles):
        handle.listen(hear(i))
    for (_, new), handle in zip(asked, handles, strict=True):
        assert len(handle.result()) == new
    return first


def by_batches(model: Llama4, asked: list[Request], size: int) -> None:
    """A batch goes on until its longest reply is done: what is not wanted of the others is thrown away."""
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        generate(model, [prompt for prompt, _ in batch], max_new_tokens=max(new for _, new in batch))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def conversation(engine: Engine, vocab_size: int, seed: int, *, found: bool) -> tuple[list[float], int, int]:
    """Measures four turns after a long system prompt: seconds to each later first token, tokens of prompts,
    and those of them that were found. Without `found` each turn begins otherwise, so that nothing is."""
    draw = np.random.default_rng(seed)
    prompt, first, total, cached = draw.integers(0, vocab_size, 400).tolist(), [], 0, 0
    for turn in range(4):
        prompt += draw.integers(0, vocab_size, 20).tolist()
        sent = prompt if found else [(prompt[0] + turn + 1) % vocab_size, *prompt[1:]]
        start = time.perf_counter()
        handle = engine.submit(sent, max_new_tokens=24)
        reply = []
        for token in handle.tokens():
            if not reply and turn:
                first.append(time.perf_counter() - start)
            reply.append(token.id)
        prompt += reply
        total, cached = total + handle.prompt_tokens, cached + handle.cached_tokens
    return first, total, cached


def step_milliseconds(model: Llama4, context: int) -> float:
    """A decoding step of eight rows that hold 100 tokens, the best of many."""
    model.config = dataclasses.replace(model.config, context_length=max(context, model.config.context_length))
    engine = Engine(model, slots=SLOTS, context=context)
    prompt = list(range(1, 93))
    handles = [engine.submit(prompt, max_new_tokens=2) for _ in range(SLOTS)]
    for handle in handles:
        handle.result()
    core = engine._core
    alive, rows, times = np.ones(SLOTS, bool), core._rows, []
    for _ in range(30):
        rows = rows._replace(left=jnp.full(SLOTS, 99, jnp.int32), active=jnp.ones(SLOTS, bool))
        cache = core._cache._replace(lengths=jnp.full(SLOTS, 100, jnp.int32))
        jax.block_until_ready((cache, rows))
        start = time.perf_counter()
        core._cache, rows, *_ = jax.block_until_ready(
            programs.decode(
                core._graphdef, core._state, cache, rows, None, alive, np.int32(8), np.bool_(False), None,
                processor=None,
            )
        )  # fmt: skip
        times.append((time.perf_counter() - start) / 8)
    engine.close()
    return 1e3 * min(times)


def spread(values: list[float], form: str = "{:.2f}") -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{form} ({form}–{form})".format(middle, low, high)


def measure(name: str, rounds: int, count: int) -> dict:
    model = Llama4(MODELS[name], seed=0).unscanned()
    vocab_size = model.config.vocab_size
    started = time.perf_counter()
    engine = Engine(model, slots=SLOTS, context=CONTEXT)
    start_up = time.perf_counter() - started
    asked = requests(count, vocab_size, 0)
    tokens = sum(new for _, new in asked)
    for size in (SLOTS, 1):
        by_batches(model, asked, size)  # compiles
    found: dict[str, list[float]] = {key: [] for key in ("engine", "batches", "singly", "p50", "p95")}
    for _ in range(rounds):
        engine.forget()
        start = time.perf_counter()
        first = by_engine(engine, asked)
        found["engine"].append(tokens / (time.perf_counter() - start))
        found["p50"].append(statistics.median(first))
        found["p95"].append(sorted(first)[int(0.95 * len(first))])
        found["batches"].append(tokens / seconds(lambda: by_batches(model, asked, SLOTS)))
        found["singly"].append(tokens / seconds(lambda: by_batches(model, asked, 1)))
    turns: dict[str, list[float]] = {"found": [], "anew": []}
    shares: dict[str, float] = {}
    for i in range(rounds):
        for key in turns:
            first, total, cached = conversation(engine, vocab_size, i, found=key == "found")
            turns[key] += first
            shares[key] = cached / total
    engine.close()
    ratios = {
        f"engine / {key}": [a / b for a, b in zip(found["engine"], found[key], strict=True)]
        for key in ("batches", "singly")
    }
    print(f"\n{name}: {count} requests, {tokens:,} new tokens, {SLOTS} slots; the engine starts in {start_up:.1f} s")
    for key in ("engine", "batches", "singly"):
        print(f"  {key:<8} {spread(found[key], '{:,.0f}')} tokens/s")
    for key, values in ratios.items():
        print(f"  {key:<16} {spread(values)}×")
    print(f"  first token, all at once: median {spread(found['p50'])} s, 95 % within {spread(found['p95'])} s")
    faster = statistics.median(turns["anew"]) / statistics.median(turns["found"])
    print(f"  later turns of a conversation: {shares['found']:.0%} of the prompt tokens found, first token after "
          f"{spread([1e3 * x for x in turns['found']], '{:.0f}')} ms, and "
          f"{spread([1e3 * x for x in turns['anew']], '{:.0f}')} ms when nothing is: {faster:.1f}×")  # fmt: skip
    steps = {size: step_milliseconds(model, size) for size in (1024, 8192, 32_768)}
    print("  a step of 8 rows that hold 100 tokens:", ", ".join(f"{ms:.2f} ms with slots of {size:,}"
                                                               for size, ms in steps.items()))  # fmt: skip
    return {"model": name, "start_up": start_up, **found, **ratios, **turns, "shares": shares, "steps": steps}


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers. Each contender lives in a process of its own, and answers requests of several clients at once.

Told = Callable[[int], None]  # how many tokens of its reply a client has now


class Ours:
    """The engine, with a slot for each client."""

    def __init__(self, path: str, dtype: str):
        self.model = llama4_jax.from_pretrained(path, dtype=dtype)
        self.engines: dict[int, Engine] = {}

    def prepare(self, clients: int) -> None:
        if clients not in self.engines:
            self.engines[clients] = Engine(self.model, slots=clients, context=CONTEXT)
        self.engine = self.engines[clients]
        self.engine.forget()

    def ask(self, prompt: list[int], new: int, told: Told) -> None:
        for count, _ in enumerate(self.engine.submit(prompt, max_new_tokens=new).tokens(), 1):
            told(count)

    def refuses(self) -> str:
        return ""


class Transformers:
    """`generate`, for whoever waits when the last batch is done."""

    def __init__(self, path: str, dtype: str):
        import torch
        from transformers import Llama4ForCausalLM

        torch.set_num_threads(peers.THREADS)
        self.torch = torch
        kind = getattr(torch, dtype)
        self.model = Llama4ForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="sdpa").eval()
        self.waiting: queue.Queue = queue.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def prepare(self, clients: int) -> None:
        self.clients = clients

    def ask(self, prompt: list[int], new: int, told: Told) -> None:
        done = threading.Event()
        self.waiting.put((prompt, new, told, done))
        done.wait()

    def _serve(self) -> None:
        while True:
            batch = [self.waiting.get()]
            until = time.perf_counter() + 0.005  # those who ask at the same time are answered together
            while len(batch) < self.clients:
                try:
                    batch.append(self.waiting.get(timeout=max(0.0, until - time.perf_counter())))
                except queue.Empty:
                    break
            self._generate(batch)

    def _generate(self, batch: list[tuple]) -> None:
        torch = self.torch
        longest = max(len(prompt) for prompt, *_ in batch)
        tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, *_ in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, *_ in batch])
        count = 0

        def after_each_token(ids, scores, **_):
            nonlocal count
            count += 1
            for _, new, told, done in batch:
                if count <= new:
                    told(count)
                if count == new:
                    done.set()
            return torch.zeros(len(batch), dtype=torch.bool)

        with torch.inference_mode():
            most = max(new for _, new, *_ in batch)
            self.model.generate(
                tokens, attention_mask=mask, max_new_tokens=most, do_sample=False, stopping_criteria=[after_each_token]
            )

    def refuses(self) -> str:
        """What its continuous batching says to this model; nothing if it takes it."""
        from transformers import GenerationConfig

        try:
            how = GenerationConfig(max_new_tokens=2, do_sample=False)
            self.model.generate_batch([[1, 2, 3], [4, 5]], generation_config=how)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


CONTENDERS = {"ours": Ours, "transformers": Transformers}


def crowd(contender: Ours | Transformers, clients: int, asked: list[Request]) -> dict:
    """Answers requests for so many clients, each of whom waits for one reply at a time. Seconds: in all, until each
    first token."""
    contender.prepare(clients)
    left, first = iter(asked), []
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                prompt, new = next(left, (None, 0))
            if prompt is None:
                return
            began, counts = time.perf_counter(), []

            def told(count: int, began=began, counts=counts) -> None:
                if not counts:
                    with lock:
                        first.append(time.perf_counter() - began)
                counts.append(count)

            contender.ask(prompt, new, told)
            assert counts == [*range(1, new + 1)]

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - began, "first": sorted(first)}


def work(name: str, path: str, dtype: str) -> None:
    """Runs what is asked for on standard input; answers each with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    contender = CONTENDERS[name](path, dtype)
    print(json.dumps({"refuses": contender.refuses()}), file=answers)
    for line in sys.stdin:
        clients, asked = json.loads(line)
        print(json.dumps(crowd(contender, clients, asked)), file=answers)


class Worker:
    def __init__(self, name: str, path: str, dtype: str):
        command = [sys.executable, __file__, "--work", name, path, dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=peers.environment()
        )
        self.refuses = self.answer()["refuses"]

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args[3]} ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, clients: int, asked: list[Request]) -> dict:
        self.process.stdin.write(json.dumps([clients, asked]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def against_transformers(dtype: str, counts: list[int], rounds: int, each: int) -> list[dict]:
    """`each`: requests of a client in a round."""
    import transformers

    results = []
    with tempfile.TemporaryDirectory(prefix="llama4_serving_") as path:
        peers.save_model(peers.MODELS["scout_like"], path)
        workers = {name: Worker(name, path, dtype) for name in CONTENDERS}
        said = workers["transformers"].refuses
        print(f"transformers {transformers.__version__}, continuous batching of Llama 4: {said or 'it works'}")
        for clients in counts:
            asked = requests(max(4, each * clients), peers.SHARED["vocab_size"], clients)
            tokens = sum(new for _, new in asked)
            found: dict[str, list[dict]] = {name: [] for name in workers}
            for number in range(rounds + 1):  # the first one compiles, and touches memory
                for name, worker in workers.items():
                    got = worker.run(clients, asked)
                    if number:
                        found[name].append(got)
            rates = {name: [tokens / one["seconds"] for one in got] for name, got in found.items()}
            firsts = {name: [statistics.median(one["first"]) for one in got] for name, got in found.items()}
            late = {name: [one["first"][int(0.95 * len(one["first"]))] for one in got] for name, got in found.items()}
            ratios = {
                what: [x / y for x, y in zip(values[a], values[b], strict=True)]
                for what, values, a, b in (("tokens/s", rates, "ours", "transformers"),
                                           ("first token", firsts, "transformers", "ours"))
            }  # fmt: skip
            print(f"\n{clients} clients: {len(asked)} requests, {tokens:,} new tokens, {dtype}")
            for name in workers:
                print(f"  {name:<13} {spread(rates[name], '{:,.1f}')} tokens/s, first token after "
                      f"{spread(firsts[name])} s, 95 % within {spread(late[name])} s")  # fmt: skip
            print(f"  ours is {spread(ratios['tokens/s'])} × as fast, and its first token "
                  f"{spread(ratios['first token'])} × as soon", flush=True)  # fmt: skip
            results.append({"clients": clients, "tokens": tokens, "dtype": dtype, "refuses": said, **found, **ratios})
        for worker in workers.values():
            worker.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--against", choices=["transformers"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="with --against: at the same time")
    parser.add_argument("--each", type=int, default=3, help="with --against: requests of a client in a round")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="with --against")
    options = parser.parse_args()
    if options.against:
        results = against_transformers(options.dtype, options.clients, options.rounds, options.each)
    else:
        results = [measure(name, options.rounds, options.requests) for name in options.models]
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main()

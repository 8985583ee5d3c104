"""The engine against closed batches and against one request at a time: same model, same requests, one interleaved run.

    python benchmarks/serving.py                                    # the tiny preset and a larger one
    python benchmarks/serving.py --models tiny --rounds 5 --json serving.json

Requests have prompts and replies of log-normal lengths, as those of people have. "batches" answers them by `generate`
in the order of their arrival, eight at a time, each batch until its longest reply is done; "singly" one after another.
All are compiled before the clock runs. Three more figures are the engine's own: the time to the first token when all
requests come at once, a four-turn conversation with and without what is found in the cache, and a decoding step at 100
held tokens by the size of a slot. Figures are medians over rounds, with the lowest and the highest.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.infer import engine as engine_module
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
    alive, rows, times = np.ones(SLOTS, bool), engine._rows, []
    for _ in range(30):
        rows = rows._replace(left=jnp.full(SLOTS, 99, jnp.int32), active=jnp.ones(SLOTS, bool))
        cache = engine._cache._replace(lengths=jnp.full(SLOTS, 100, jnp.int32))
        jax.block_until_ready((cache, rows))
        start = time.perf_counter()
        engine._cache, rows, _ = jax.block_until_ready(
            engine_module._decode(
                engine._graphdef, engine._state, cache, rows, alive, np.int32(8), np.bool_(False), None
            )
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    results = [measure(name, options.rounds, options.requests) for name in options.models]
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

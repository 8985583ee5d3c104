"""Many requests at once, each as if it were alone."""

import dataclasses
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.infer import engine_programs as programs
from llama4_jax.infer.engine import Engine, EngineDied, Full
from llama4_jax.infer.engine_core import EngineCore
from llama4_jax.infer.generate import generate
from llama4_jax.model.config import ModelConfig, Precision, VisionConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.sharding import SERVING, MeshConfig, make_mesh, parameter_sharding

VISION = VisionConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=64, image_size=8, patch_size=4, adapter_dim=16,
                      output_dim=16, patch_token_id=49)  # fmt: skip
CONFIG = ModelConfig(
    vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, expert_mlp_dim=24,
    num_experts=3, moe_interval=2, nope_interval=2, attention_chunk=16, temperature_floor=4, context_length=256,
    init_std=0.3, vision=VISION,
)  # fmt: skip
HOW = {"slots": 3, "context": 128, "piece": 8, "read_budget": 16}
TILE = VISION.image_size, VISION.image_size, VISION.num_channels


@pytest.fixture(scope="module")
def model() -> Llama4:
    return Llama4(CONFIG, seed=1).unscanned()


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, **HOW, max_waiting=100) as engine:
        yield engine


def requests(count: int, seed: int, pictures: bool = False) -> list[dict]:
    draw = np.random.default_rng(seed)
    asked = []
    for i in range(count):
        prompt = draw.integers(0, 49, draw.integers(1, 60)).tolist()
        said = {"max_new_tokens": int(draw.integers(1, 20)), "seed": int(draw.integers(100)), "stop_ids": [3]}
        said |= [{}, {"temperature": 0.9}, {"temperature": 1.1, "top_k": 5}, {"temperature": 0.8, "top_p": 0.7}][i % 4]
        if pictures and i % 3 == 0:
            tiles = draw.integers(0, 256, (2, *TILE), dtype=np.uint8)
            prompt += [VISION.patch_token_id] * (2 * VISION.tokens_per_tile) + draw.integers(0, 49, 5).tolist()
            said["tiles"] = tiles
        asked.append({"prompt": prompt, **said})
    return asked


def answers(engine: Engine, asked: list[dict]) -> list[list[tuple[int, float]]]:
    handles = [engine.submit(**one) for one in asked]
    return [[(token.id, token.logprob) for token in handle.result()] for handle in handles]


def alone(engine: Engine, asked: list[dict]) -> list[list[tuple[int, float]]]:
    return [answers(engine, [one])[0] for one in asked]


def test_what_a_request_gets_is_what_generate_gives_it(model, engine):
    asked = requests(4, seed=0, pictures=True)
    for one, got in zip(asked, answers(engine, asked), strict=True):
        one = dict(one)
        prompt, tiles = one.pop("prompt"), one.pop("tiles", None)
        assert [id for id, _ in got] == generate(model, [prompt], images=[tiles], **one)[0]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_it_depends_on_nothing_beside_it(model, engine, kind):
    """Bit for bit, log-probabilities too: alone or among others, in whatever order they come, found in the cache or
    not."""
    asked = requests(16, seed=1, pictures=True)
    other = None
    if kind != "float32":
        precision = Precision(compute="bfloat16") if kind == "bfloat16" else Precision()
        other = Engine(Llama4(CONFIG, seed=1, precision=precision).unscanned(), **HOW,
                       cache="int8" if kind == "int8" else "float")  # fmt: skip
    used = other or engine
    want = alone(used, asked)
    for shuffle in range(3):
        order = random.Random(shuffle).sample(range(len(asked)), len(asked))
        got = answers(used, [asked[i] for i in order])
        assert [got[order.index(i)] for i in range(len(asked))] == want
    if other is not None:
        other.close()


def scored(model: Llama4, prompt: list[int], reply: list[int]) -> np.ndarray:
    """Whether each token of a reply is the likeliest, by one pass over all of it."""
    tokens = np.zeros((1, HOW["context"]), np.int32)
    tokens[0, : len(prompt) + len(reply)] = prompt + reply
    return np.asarray(likeliest(model, tokens))[0, len(prompt) - 1 :][: len(reply)] == reply


likeliest = jax.jit(lambda model, tokens: jnp.argmax(model(tokens), axis=-1))


def test_what_others_began_with_is_not_read_again(engine, model):
    draw = np.random.default_rng(7)
    system = draw.integers(0, 49, 45).tolist()
    asked = [system + draw.integers(0, 49, 6).tolist() for _ in range(4)]
    first = engine.submit(asked[0], max_new_tokens=4)
    first.result()
    handles = [engine.submit(prompt, max_new_tokens=4) for prompt in asked[1:]]
    for prompt, handle in zip(asked[1:], handles, strict=True):
        assert scored(model, prompt, [token.id for token in handle.result()]).all()
    # The first came to 54 tokens, so its chunked layers hold 48 … 53: others begin where a chunk and a piece begin, or,
    # beside one that is still in its prompt's last chunk, with all whole pieces that they share.
    assert first.cached_tokens == 0 and all(handle.cached_tokens in (32, 40) for handle in handles)


def test_the_next_turn_reads_what_is_new(engine, model):
    draw, prompt = np.random.default_rng(8), np.random.default_rng(9).integers(0, 49, 20).tolist()
    found, read = [], []
    for _ in range(4):
        handle = engine.submit(prompt, max_new_tokens=7)
        reply = [token.id for token in handle.result()]
        assert scored(model, prompt, reply).all()
        found.append(handle.cached_tokens)
        read.append(handle.prompt_tokens)
        prompt = prompt + reply + draw.integers(0, 49, 5).tolist()
    # At worst a turn begins again with the chunk (of 16) before that to which the reply before it had come.
    assert found[0] == 0 and all(now >= before // 16 * 16 - 16 for now, before in zip(found[1:], read, strict=False))
    assert sum(found) >= 64


def conversations(count: int, turns: int, seed: int) -> list[list[dict]]:
    """The requests of each one's turns. They share what they begin with, and have pictures among them."""
    draw = np.random.default_rng(seed)
    system, made = draw.integers(0, 49, 26).tolist(), []
    for i in range(count):
        prompt, asked = [*system], []
        tiles = draw.integers(0, 256, (1, *TILE), dtype=np.uint8) if i % 2 else None
        prompt += [VISION.patch_token_id] * (VISION.tokens_per_tile if i % 2 else 0)
        for _ in range(turns):
            prompt = prompt + draw.integers(0, 49, draw.integers(3, 12)).tolist()
            asked.append({"prompt": prompt, "tiles": tiles, "max_new_tokens": int(draw.integers(1, 20)), "seed": i,
                          "temperature": 0.8})  # fmt: skip
        made.append(asked)
    return made


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_has_left_its_slot_is_brought_back_bit_for_bit(model, kind):
    """More conversations than slots, in turns: all but the first turn are found in snapshots, and get what they get
    where nothing is ever found."""
    talks = conversations(5, 4, seed=11)
    asked = [talk[turn] for turn in range(4) for talk in talks]
    with Engine(model, **{**HOW, "slots": 2}, cache=kind, host_prefix_bytes=0) as nothing_kept:
        want = []
        for one in asked:
            nothing_kept.forget()
            want += alone(nothing_kept, [one])
    for limits in ({"host_prefix_bytes": 1 << 30}, {"device_prefix_bytes": 40_000, "host_prefix_bytes": 40_000}):
        with Engine(model, **{**HOW, "slots": 2}, cache=kind, **limits) as engine:
            handles, got = [], []
            for one in asked:
                handles.append(engine.submit(**one))
                got.append([(token.id, token.logprob) for token in handles[-1].result()])
            assert got == want
            assert engine.stats.found["snapshot"] >= 5 and engine.stats.found.keys() <= {
                "slot",
                "snapshot",
                "other slot",
            }
            device, host = engine._core._snapshots.nbytes
            assert device <= limits.get("device_prefix_bytes", 0) and 0 < host <= limits["host_prefix_bytes"]
            if len(limits) == 1:
                # Whole pieces of what was read a turn before, or at worst up to the chunk (of 16) before that.
                for now, before in zip(handles[5:], handles, strict=False):
                    assert now.cached_tokens >= before.prompt_tokens // 8 * 8 - 8


def test_a_prefix_is_saved_and_loaded_and_refused_for_another_model(model, engine, tmp_path):
    draw = np.random.default_rng(13)
    system = draw.integers(0, 49, 60).tolist()
    tiles = draw.integers(0, 256, (1, *TILE), dtype=np.uint8)
    patches = [VISION.patch_token_id] * VISION.tokens_per_tile
    path = tmp_path / "prefix.safetensors"
    assert engine.save_prefix([*patches, *system], path, tiles=tiles) == 56
    asked = [{"prompt": [*patches, *system, *draw.integers(0, 49, 5).tolist()], "tiles": tiles, "max_new_tokens": 9}]
    engine.forget()
    want = alone(engine, asked)
    with Engine(model, **HOW) as other:
        assert other.load_prefix(path) == 56
        handle = other.submit(**asked[0])
        assert [(token.id, token.logprob) for token in handle.result()] == want[0] and handle.cached_tokens == 56
        seen = other.submit(**{**asked[0], "tiles": 255 - tiles})  # another picture is another prompt
        seen.result()
        assert seen.cached_tokens == 0
        for size, says in ((100, "no prefix, or a damaged one"), (-1, "is damaged: its numbers are not")):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            (tmp_path / "bad").write_bytes(content[:size] if size > 0 else content)
            with pytest.raises(ValueError, match=says):
                other.load_prefix(tmp_path / "bad")
        with pytest.raises(FileNotFoundError, match="there is no prefix"):
            other.load_prefix(tmp_path / "none")
        with pytest.raises(ValueError, match="the prompt has 3 tokens, and prefixes are kept in whole pieces of 8"):
            other.save_prefix([1, 2, 3], tmp_path / "short")
    changed = Llama4(CONFIG, seed=2).unscanned()
    for of, how, says in [
        (changed, HOW, "is of another model, other weights or another kind of cache"),
        (model, {**HOW, "cache": "int8"}, "is of another model, other weights or another kind of cache"),
        (model, {**HOW, "context": 64}, r"block0.* this engine's cache has float32 \[1, 2, 64, 8\]"),
        (model, {**HOW, "host_prefix_bytes": 1000}, "needs .* bytes, and host_prefix_bytes is 1,000"),
    ]:
        core = Engine.__new__(Engine)  # nothing is computed, so nothing need be compiled
        core._core = EngineCore(of, **{name: value for name, value in how.items()})
        with pytest.raises(ValueError, match=says):
            core.load_prefix(path)


def test_samples_of_one_prompt_read_it_once(engine):
    prompt = np.random.default_rng(12).integers(0, 49, 61).tolist()
    asked = [{"prompt": prompt, "max_new_tokens": 5, "temperature": 1.0, "seed": seed} for seed in range(3)]
    want = alone(engine, asked)
    engine.forget()
    handles = [engine.submit(**one) for one in asked]
    assert [[(token.id, token.logprob) for token in handle.result()] for handle in handles] == want
    assert [handle.cached_tokens for handle in handles] == [0, 56, 56]


def test_a_request_that_is_cancelled_frees_its_slot_and_harms_nobody(engine):
    asked = requests(9, seed=3)
    want = alone(engine, asked)
    endless = [engine.submit([5, 6, 7], max_new_tokens=120, temperature=1.0, seed=i) for i in range(5)]
    handles = [engine.submit(**one) for one in asked]
    next(endless[0].tokens())
    for handle in endless:
        handle.cancel()
    assert [[(token.id, token.logprob) for token in handle.result()] for handle in handles] == want
    assert {handle.finish_reason for handle in endless} <= {"cancelled", "length"} and endless[4].result() == []
    assert {handle.finish_reason for handle in handles} <= {"stop", "length"}
    assert engine.stats.running <= 3 and engine._core._open == 0


def test_a_prompt_is_scored(engine, model):
    prompt = np.random.default_rng(4).integers(0, 49, 37).tolist()
    handle = engine.submit(prompt, max_new_tokens=0, prompt_scores=True, top_logprobs=3)
    assert handle.result() == [] and handle.finish_reason == "length" and handle.prompt_scores[0] is None
    log_softmax = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens).astype(jnp.float32), axis=-1))
    want = log_softmax(model, jnp.asarray([prompt]))[0, :-1]
    scores = handle.prompt_scores[1:]
    assert [score.id for score in scores] == prompt[1:]
    np.testing.assert_allclose([score.logprob for score in scores], want[np.arange(36), prompt[1:]], atol=2e-5)
    assert [score.top[0][0] for score in scores] == jnp.argmax(want, axis=-1).tolist() and len(scores[0].top) == 3
    more = engine.submit(prompt, max_new_tokens=3, prompt_scores=True)
    assert len(more.result()) == 3 and len(more.prompt_scores) == 37


def test_a_mesh_changes_nothing():
    talks = conversations(4, 2, seed=14)
    asked = [{**talk[turn], "temperature": 0.0} for turn in range(2) for talk in talks]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    plain, split = (Llama4(dataclasses.replace(CONFIG, num_experts=4), seed=1).unscanned() for _ in range(2))
    for _, variable in nnx.to_flat_state(nnx.state(split)):
        value = variable[...]
        variable.set_value(jax.device_put(value, parameter_sharding(value.shape, variable.axes, mesh, rules=SERVING)))
    with Engine(plain, **HOW) as one, Engine(split, **{**HOW, "slots": 2}) as many:
        want = [[id for id, _ in got] for got in answers(one, asked)]
        got = [[token.id for token in many.submit(**request).result()] for request in asked]
        assert got == want and many.stats.found["snapshot"] > 0


class Even:
    """Allows even ids, and 3 after the fourth."""

    def __init__(self):
        self.seen: list[int] = []

    def mask(self):
        mask = np.full((2,), 0x55555555, np.uint32)
        return np.array([8, 0], np.uint32) if len(self.seen) == 4 else mask

    def accept(self, token):
        self.seen.append(token)


def test_a_constraint_is_kept_and_others_do_not_feel_it(engine):
    asked = requests(4, seed=5)
    want = alone(engine, asked)
    constraints = [Even(), Even()]
    bound = [engine.submit([1, 2, 3], max_new_tokens=20, temperature=2.0, stop_ids=[3], seed=i, constraint=constraint)
             for i, constraint in enumerate(constraints)]  # fmt: skip
    assert answers(engine, asked) == want
    for handle, constraint in zip(bound, constraints, strict=True):
        ids = [token.id for token in handle.result()]
        assert ids == constraint.seen and ids[-1] == 3 and all(id % 2 == 0 for id in ids[:4]) and len(ids) == 5


def test_nothing_is_compiled_after_the_start(engine):
    compiled = [programs.read, programs.decode, programs.copy, programs.encode, programs.empty_cache]
    before = [program._cache_size() for program in compiled]
    answers(engine, requests(6, seed=6, pictures=True))
    engine.submit([1] * 30, max_new_tokens=2, frequency_penalty=1.0, logit_bias={4: 5.0}, top_logprobs=2).result()
    assert [program._cache_size() for program in compiled] == before


def test_listeners_hear_every_token_and_the_end(engine):
    heard, done = [], threading.Event()

    def hear(handle, new):
        heard.extend(new)
        if handle.done:
            done.set()
        raise RuntimeError("what a listener raises is its own")

    handle = engine.submit([1, 2, 3], max_new_tokens=30)
    handle.listen(hear)
    assert done.wait(60) and heard == handle.result() and len(heard) == 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [50]}, r"the prompt\[0\] is the token id 50"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 126}, "has 3 tokens, which with max_new_tokens=126 exceeds the engine's context of 128"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_logprobs": 21}, "top_logprobs must be below 21"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be a number from -100 to 100"),
        ({"logit_bias": {50: 1.0}}, "logit_bias has 50, but the vocabulary has the ids 0 to 49"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias\[5\] must be a number"),
        ({"stop_ids": list(range(9))}, "stop_ids has 9 ids, and 8 are the most"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "the engine has no processor"),
        ({"tiles": np.zeros((1, *TILE), np.uint8)}, "has 0 <|patch|> tokens"),
    ],
)
def test_what_cannot_be_is_refused_at_once(engine, change, says):
    with pytest.raises(ValueError, match=says.replace("|", r"\|")):
        engine.submit(**{"prompt": [1, 2, 3], "max_new_tokens": 4, **change})


def test_a_full_queue_and_a_death_are_said(model, monkeypatch):
    engine = Engine(model, **HOW, max_waiting=1)
    held = threading.Event()
    decode = programs.decode

    def slow(*args, **how):
        held.wait()
        return decode(*args, **how)

    monkeypatch.setattr(programs, "decode", slow)
    handles = [engine.submit([1, 2], max_new_tokens=9) for _ in range(4)]
    with pytest.raises(Full, match="3 requests run and 1 wait, which is all that may"):
        engine.submit([1, 2], max_new_tokens=9)

    def broken(*args, **how):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(programs, "decode", broken)
    held.set()
    for handle in handles:
        with pytest.raises(EngineDied):
            handle.result()
        assert str(handle.error) == "the device is gone"
    assert not engine.alive
    with pytest.raises(EngineDied):
        engine.submit([1, 2], max_new_tokens=9)
    engine.close()

"""A cache of int8 gives what one of floats does, but for its rounding, in half the memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.infer.generate import generate
from llama4_jax.model.cache import cached_attention, empty_cache, make_step
from llama4_jax.model.config import ModelConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.ops import attention as attention_module
from llama4_jax.ops.attention import attention, partial_attention
from llama4_jax.ops.partial_attention import normalize
from llama4_jax.ops.quantization import Quantized, Scheme, dequantize, quantize
from llama4_jax.sharding import SERVING, MeshConfig, make_mesh, use_rules

CONFIG = ModelConfig(
    vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=32, expert_mlp_dim=16,
    num_experts=2, nope_interval=2, attention_chunk=8, context_length=64, init_std=0.2,
)  # fmt: skip
SLOTS = 24
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, SLOTS)), jnp.int32)


@pytest.fixture(scope="module")
def model() -> Llama4:
    return Llama4(CONFIG, scan_layers=False)


@jax.jit
def step(model: Llama4, tokens, cache):
    hidden, cache = model.step(tokens, cache)
    return model.logits(hidden), cache


def teacher_forced(model: Llama4, dtype: str | None, sizes: tuple[int, ...]) -> np.ndarray:
    """Logits of TOKENS, read so many at a time."""
    cache, logits, start = model.empty_cache(2, SLOTS, dtype), [], 0
    for size in sizes:
        out, cache = step(model, TOKENS[:, start : start + size], cache)
        logits.append(out)
        start += size
    assert start == SLOTS and {leaf.dtype for leaf in jax.tree.leaves(cache.layers[0])} == (
        {jnp.dtype("int8"), jnp.dtype("float32")} if dtype else {jnp.dtype("float32")}
    )
    return np.concatenate(logits, axis=1)


def test_logits_differ_from_those_of_a_float_cache_by_its_rounding(model):
    exact = teacher_forced(model, None, (SLOTS,))
    rounded = teacher_forced(model, "int8", (SLOTS,))
    error = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 0.004 < error.mean() < 0.013  # measured 0.011


def test_prefill_and_decoding_see_the_same_rounded_past(model):
    """In pieces longer than a chunk, across its end, and token by token."""
    at_once = teacher_forced(model, "int8", (SLOTS,))
    pieces = teacher_forced(model, "int8", (11, 1, 1, 11))
    assert np.abs(pieces - at_once).max() < 2e-2 * np.abs(at_once).max()  # a number may round to the other side
    assert np.abs(pieces - at_once).mean() < 5e-4 * np.abs(at_once).max()


def test_it_takes_half_the_memory_of_bfloat16():
    config = dataclasses.replace(CONFIG, head_dim=128)
    sizes = {}
    for dtype in ("bfloat16", "int8"):
        cache = jax.eval_shape(lambda dtype=dtype: empty_cache(config, 3, 64, dtype))
        sizes[dtype] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    assert sizes["int8"] == sizes["bfloat16"] * (128 + 4) / 256


def keys(seed: int, slots: int = 70) -> tuple[Quantized, jax.Array]:
    """Of a quantized cache, and the numbers that they stand for."""
    q = quantize(jnp.asarray(np.random.default_rng(seed).normal(size=(2, 2, slots, 16)), jnp.float32), INT8, start=3)
    return Quantized(q.values, q.scale[..., 0]), dequantize(q, start=3)


INT8 = Scheme("int8")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("queries", "chunk"), [(1, None), (3, 32), (20, None)])
def test_attention_to_rounded_keys_is_attention_to_what_they_stand_for(platform, queries, chunk, monkeypatch):
    monkeypatch.setattr(attention_module, "platform", lambda: platform)
    (k, float_k), (v, float_v) = keys(1), keys(2)
    q = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, queries, 16)), jnp.float32)
    positions = jnp.arange(70, dtype=jnp.int32)[None].repeat(2, 0).at[1, 60:].set(-1)
    at = {"q_positions": 40 + positions[:, :queries], "k_positions": positions, "chunk": chunk, "scale": 0.25}
    out = normalize(jax.jit(lambda: partial_attention(q, k, v, **at))(), q.dtype)
    expected = attention(q, float_k, float_v, **at, implementation="reference")
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 8])
def test_on_a_mesh_it_is_the_same(chunk):
    """Slots of a global layer are split over `context`, heads over `tensor`, rows over `data`."""
    random = np.random.default_rng(4)
    q, k, v = (jnp.asarray(random.normal(size=(2, heads, 6, 16)), jnp.float32) for heads in (4, 2, 2))

    @jax.jit
    def run(q, k, v):
        cache, outs = empty_cache(CONFIG, 2, SLOTS, "int8").layers[0 if chunk else 1], []
        lengths = jnp.zeros((2,), jnp.int32)
        for first, count in ((0, 5), (5, 1)):
            step = make_step(lengths, jnp.full((2,), count, jnp.int32), count)
            new = (x[:, :, first : first + count] for x in (q, k, v))
            out, cache = cached_attention(*new, cache, step, chunk=chunk, scale=0.25)
            lengths, outs = lengths + count, [*outs, out]
        return jnp.concatenate(outs, axis=2), cache

    expected, expected_cache = run(q, k, v)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))), use_rules(SERVING):
        out, cache = jax.jit(run.__wrapped__)(q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len({str(shard.index) for shard in cache.k_scale.addressable_shards}) == (8 if chunk is None else 4)


def test_decoding_makes_no_floats_of_a_whole_cache():
    slots = 4096
    config = dataclasses.replace(CONFIG, context_length=slots)
    cache = jax.eval_shape(lambda: empty_cache(config, 2, slots, "int8").layers[1])
    new = jax.ShapeDtypeStruct((2, 2, 1, 16), jnp.float32)
    q = jax.ShapeDtypeStruct((2, 4, 1, 16), jnp.float32)

    def decode(q, k, v, cache, lengths):
        step = make_step(lengths, jnp.ones((2,), jnp.int32), 1)
        return cached_attention(q, k, v, cache, step, chunk=None, scale=0.25)

    compiled = jax.jit(decode, donate_argnums=3).lower(q, new, new, cache, jax.ShapeDtypeStruct((2,), jnp.int32))
    memory = compiled.compile().memory_analysis()
    numbers = 2 * 2 * slots * 16  # of the keys
    assert memory.temp_size_in_bytes < 2 * numbers and memory.alias_size_in_bytes > 2 * numbers


def test_generate_takes_it_and_says_what_it_does_not_know(model, monkeypatch):
    asked, original = [], Llama4.empty_cache
    monkeypatch.setattr(Llama4, "empty_cache", lambda *a: asked.append(a[-1]) or original(*a))
    replies = generate(model, [[1, 2, 3], [4]], max_new_tokens=12, cache="int8")
    assert [len(reply) for reply in replies] == [12, 12] and asked == ["int8"]
    with pytest.raises(ValueError, match="cache must be one of float, int8, got 'int4'"):
        generate(model, [[1]], max_new_tokens=1, cache="int4")

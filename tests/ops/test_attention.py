"""Attention: every implementation against slow loops and torch, and the work that it must not do."""

import functools
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.ops import attention as attention_module
from llama4_jax.ops import flash_attention as flash_module
from llama4_jax.ops.attention import IMPLEMENTATIONS, OBSTACLES, Held, attention, decode_held, decode_partial
from llama4_jax.ops.attention_reference import first_visible, visible
from llama4_jax.ops.flash_attention import Keys, Queries, flash_attention, plan_blocks
from llama4_jax.ops.partial_attention import normalize
from llama4_jax.ops.quantization import Quantized
from llama4_jax.sharding import MeshConfig, activation_sharding, make_mesh

ALL = sorted(IMPLEMENTATIONS.keys() - OBSTACLES.keys())  # the others have tests of their own


def loops(q, k, v, *, q_positions, k_positions, q_segments=None, k_segments=None, chunk=None, scale):
    """The definition, one query at a time, in float64."""
    batch, heads, num_queries, _ = q.shape
    groups = heads // k.shape[1]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n, t in itertools.product(range(batch), range(heads), range(num_queries)):
        scores, values = [], []
        for s in range(k.shape[2]):
            at, key_at = int(q_positions[b, t]), int(k_positions[b, s])
            if key_at < 0 or key_at > at:
                continue
            if q_segments is not None and q_segments[b, t] != k_segments[b, s]:
                continue
            if chunk is not None and key_at // chunk != at // chunk:
                continue
            scores.append(scale * q[b, n, t] @ k[b, n // groups, s])
            values.append(v[b, n // groups, s])
        if scores:
            weights = np.exp(np.array(scores) - max(scores))
            out[b, n, t] = weights @ np.array(values) / weights.sum()
    return out


def bound(f, keywords, **more):
    """`f` with these keywords, numpy arrays among them made JAX's."""
    arrays = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in keywords.items()}
    return partial(f, **arrays, **more)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def packed(*rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows of documents of these lengths."""
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in rows], np.int32)
    segments = np.array([np.repeat(np.arange(len(row)), row) for row in rows], np.int32)
    return positions, segments


def tensors(batch, heads, kv_heads, queries, keys, dim, seed=0) -> tuple[np.ndarray, ...]:
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)
    return tuple(normal(*shape, seed=seed + i) for i, shape in enumerate(shapes))


def case(name: str) -> tuple[tuple, dict]:
    """Arrays and keywords. Lengths are beyond two blocks of flash attention, and no multiple of its block."""
    batch, heads, kv_heads, dim, length = 2, 4, 2, 8, 290
    keywords: dict = {"scale": 0.5}
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    keys = length
    if name == "causal":
        keywords |= {"q_positions": positions, "k_positions": positions}
    elif name == "chunked, one head":
        heads = kv_heads = 1
        keywords |= {"q_positions": positions, "k_positions": positions, "chunk": 70}
    elif name == "packed and chunked":
        positions, segments = packed((100, 60, 130), (7, 283))
        keywords |= {"q_positions": positions, "k_positions": positions, "chunk": 64}
        keywords |= {"q_segments": segments, "k_segments": segments}
    elif name == "cache with holes, then new tokens":
        slots = np.tile(np.arange(300, dtype=np.int32), (batch, 1))
        slots[0, 40:] = -1
        slots[1, 280:] = -1
        lengths = np.array([[40], [280]], np.int32)
        new = lengths + np.arange(12, dtype=np.int32)
        keywords |= {"q_positions": new, "k_positions": np.concatenate([slots, new], axis=1)}
        length, keys = 12, 312
    elif name == "padded queries, and some that see no key":
        positions = positions.copy()
        keys_at = positions.copy()
        keys_at[:, :20] = -1  # queries 0 to 19 see nothing
        positions[1, 200:] = -1
        keywords |= {"q_positions": positions, "k_positions": keys_at, "chunk": 100}
    elif name == "keys in no order":
        order = np.random.default_rng(0).permutation(length)
        keywords |= {"q_positions": positions, "k_positions": positions[:, order], "chunk": 150}
    else:
        raise KeyError(name)
    return tensors(batch, heads, kv_heads, length, keys, dim), keywords


CASES = [
    "causal",
    "chunked, one head",
    "packed and chunked",
    "cache with holes, then new tokens",
    "padded queries, and some that see no key",
    "keys in no order",
]


def value_and_gradients(f, arrays, cotangent):
    def run(q, k, v, cotangent):
        out, vjp = jax.vjp(f, q, k, v)
        return out, *vjp(cotangent)

    return [np.asarray(x) for x in jax.jit(run)(*arrays, cotangent)]


def relative(a, b) -> float:
    """Largest difference, in units of the largest expected value."""
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() / np.abs(b).max())


def torch_gradients(arrays, cotangent, keywords):
    """Values and gradients in float64 by torch's autograd, from the mask of the loops above."""
    segments = keywords.get("q_segments"), keywords.get("k_segments")
    q_at, k_at = keywords["q_positions"][:, :, None], keywords["k_positions"][:, None, :]
    seen = (k_at >= 0) & (k_at <= q_at)
    if segments[0] is not None:
        seen &= segments[0][:, :, None] == segments[1][:, None, :]
    if keywords.get("chunk"):
        seen &= q_at // keywords["chunk"] == k_at // keywords["chunk"]
    seen = torch.tensor(seen)[:, None]
    q, k, v = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays)
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).mT * keywords["scale"]
    weights = torch.softmax(scores.masked_fill(~seen, -1e30), -1) * seen
    out = weights @ v.repeat_interleave(groups, 1)
    out.backward(torch.tensor(cotangent, dtype=torch.float64))
    return [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]


# ---- meaning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_definition(name):
    arrays, keywords = case(name)
    got = jax.jit(bound(attention, keywords, implementation="reference"))(*arrays)
    assert relative(got, loops(*arrays, **keywords)) < 1e-6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ALL)
def test_values_and_gradients_are_those_of_torch(implementation, name):
    arrays, keywords = case(name)
    cotangent = normal(*arrays[0].shape, seed=9)
    f = bound(attention, keywords, implementation=implementation)
    got = value_and_gradients(f, arrays, cotangent)
    for what, a, b in zip(["out", "dq", "dk", "dv"], got, torch_gradients(arrays, cotangent, keywords), strict=True):
        assert relative(a, b) < 2e-6, what


@pytest.mark.parametrize("implementation", ALL)
def test_a_query_that_sees_no_key_gives_zero_and_no_gradient(implementation):
    arrays, keywords = case("padded queries, and some that see no key")
    cotangent = normal(*arrays[0].shape)
    f = bound(attention, keywords, implementation=implementation)
    out, dq, dk, dv = value_and_gradients(f, arrays, cotangent)
    assert np.isfinite(np.concatenate([x.ravel() for x in (out, dq, dk, dv)])).all()
    assert not out[:, :, :20].any() and not dq[:, :, :20].any()
    assert not out[1, :, 200:].any() and not dq[1, :, 200:].any()
    assert not dk[:, :, :20].any() and not dv[:, :, :20].any()  # the empty slots


# batch, query heads, kv heads, queries, keys, block of flash: few, since each is compiled for each chunk
SHAPES = [(2, 4, 2, 19, 33, 8), (1, 3, 1, 33, 17, 11), (2, 2, 2, 6, 24, 3)]


@functools.cache
def compiled_flash(block, chunk):
    def run(arrays, cotangent, at):
        f = partial(flash_attention, chunk=chunk, scale=0.4, block_q=block, block_k=block, **at)
        out, vjp = jax.vjp(f, *arrays)
        return out, *vjp(cotangent)

    return jax.jit(run)


@given(st.sampled_from(SHAPES), st.sampled_from([None, 5]), st.integers(0, 2**32), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_flash_is_attention_for_any_positions_and_segments(shape, chunk, seed, sorted_queries, sorted_keys):
    *shape, block = shape
    rng = np.random.default_rng(seed)

    def tokens(length, in_order):
        if in_order:  # documents whose positions restart
            segments = np.sort(rng.integers(0, 3, (shape[0], length)))
            starts = np.array([np.searchsorted(row, row) for row in segments])
            return np.arange(length) - starts, segments
        return rng.integers(-2, 40, (shape[0], length)), rng.integers(0, 3, (shape[0], length))

    at = dict(zip(("q_positions", "q_segments"), tokens(shape[3], sorted_queries), strict=True))
    at |= dict(zip(("k_positions", "k_segments"), tokens(shape[4], sorted_keys), strict=True))
    at = {name: x.astype(np.int32) for name, x in at.items()}
    arrays = tensors(*shape, 4, seed=seed)
    cotangent = normal(*arrays[0].shape, seed=5)
    expected = torch_gradients(arrays, cotangent, at | {"chunk": chunk, "scale": 0.4})
    for a, b in zip(compiled_flash(block, chunk)(arrays, cotangent, at), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_packed_documents_do_not_see_each_other(implementation):
    lengths = 100, 31, 159
    positions, segments = packed(lengths)
    arrays = tensors(1, 4, 2, sum(lengths), sum(lengths), 8)

    @jax.jit
    def run(arrays, positions, segments):
        at = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
        return attention(*arrays, **at, chunk=64, scale=0.5, implementation=implementation)

    together = run(arrays, positions, segments)
    for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        alone = [x[:, :, start : start + length] for x in arrays]
        at = np.arange(length, dtype=np.int32)[None]
        assert relative(together[:, :, start : start + length], run(alone, at, None)) < 1e-6


def test_one_token_at_a_time_against_a_cache_is_the_whole_sequence_at_once():
    length, slots, chunk = 40, 48, 16
    q, k, v = tensors(2, 4, 2, length, length, 8)
    positions = jnp.tile(jnp.arange(length), (2, 1))
    whole = jax.jit(partial(attention, chunk=chunk, scale=0.5))(q, k, v, q_positions=positions, k_positions=positions)
    pad = [(0, 0), (0, 0), (0, slots - length), (0, 0)]
    k_slots, v_slots = np.pad(k, pad), np.pad(v, pad)

    @jax.jit
    def step(q, t):
        slot = jnp.arange(slots)
        k_positions = jnp.tile(jnp.where(slot <= t, slot, -1), (2, 1))
        q_positions = jnp.full((2, 1), t)
        return attention(
            q,
            jnp.asarray(k_slots),
            jnp.asarray(v_slots),
            q_positions=q_positions,
            k_positions=k_positions,
            chunk=chunk,
            scale=0.5,
        )

    steps = np.concatenate([step(q[:, :, t : t + 1], t) for t in range(length)], axis=2)
    assert relative(steps, whole) < 1e-6


@pytest.mark.parametrize("implementation", ALL)
def test_large_scores_do_not_overflow(implementation):
    arrays, keywords = case("causal")
    keywords["scale"] = 100.0
    got = jax.jit(bound(attention, keywords, implementation=implementation))(*arrays)
    assert relative(got, loops(*arrays, **keywords)) < 1e-4  # scores of about 3000 in float32


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("implementation", ["flash", "decode"])
def test_bfloat16_sums_in_float32(implementation, groups):
    arrays, keywords = case("packed and chunked")
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in tensors(2, 2 * groups, 2, 290, 290, 8)]
    cotangent = jnp.asarray(normal(*arrays[0].shape), jnp.bfloat16)
    f = bound(attention, keywords, implementation=implementation)
    got = value_and_gradients(f, arrays, cotangent)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    exact = [np.asarray(x, np.float32) for x in arrays]
    expected = torch_gradients(exact, np.asarray(cotangent, np.float32), keywords)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 1e-2  # bfloat16 has 8 bits: 2^-9 a rounding


# ---- work not done -------------------------------------------------------------------------------------------------


def brute_force_blocks(q_positions, k_positions, q_segments, k_segments, chunk, block):
    """Which blocks of scores hold a visible pair in some row."""
    seen = np.asarray(visible(*map(jnp.asarray, (q_positions, k_positions, q_segments, k_segments)), chunk)).any(0)
    return np.array(
        [
            [seen[i : i + block, j : j + block].any() for j in range(0, seen.shape[1], block)]
            for i in range(0, seen.shape[0], block)
        ]
    )


def planned_blocks(q_positions, k_positions, q_segments, k_segments, chunk, block):
    q_positions, k_positions, q_segments, k_segments = map(
        jnp.asarray, (q_positions, k_positions, q_segments, k_segments)
    )
    queries = Queries(first_visible(q_positions, chunk), q_positions, q_segments)
    plan = plan_blocks(queries, Keys(k_positions, k_segments), block, block)
    planned = np.zeros(plan.order.shape, bool)
    for i, (order, count) in enumerate(zip(plan.order, plan.num_visible, strict=True)):
        planned[i, order[:count]] = True
    return planned, plan


ROWS = [
    ((512,),),
    ((100, 60, 130, 222),),
    ((1, 1, 1, 509),),
    ((300, 212), (100, 412)),
]


@pytest.mark.parametrize("chunk", [None, 100, 128])
@pytest.mark.parametrize("rows", ROWS)
def test_for_contiguous_documents_the_plan_is_exact(rows, chunk):
    positions, segments = packed(*rows)
    expected = brute_force_blocks(positions, positions, segments, segments, chunk, 32)
    planned, _ = planned_blocks(positions, positions, segments, segments, chunk, 32)
    np.testing.assert_array_equal(planned, expected)
    assert planned.mean() < 0.6  # and most blocks are not in it


def test_padding_of_a_segment_of_its_own_costs_a_block_at_most():
    positions, segments = packed((60, 100, 61, 70, 221))
    for padding in (-1, 0, 99):
        ids = np.where(segments == 4, padding, segments + 1)
        expected = brute_force_blocks(positions, positions, ids, ids, None, 32)
        planned, _ = planned_blocks(positions, positions, ids, ids, None, 32)
        assert planned[expected].all() and planned.sum() <= expected.sum() + 1


@given(st.integers(0, 2**32), st.sampled_from([None, 3, 16]), st.integers(1, 4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_plan_never_misses_a_visible_pair_and_never_calls_a_hidden_one_visible(seed, chunk, kinds, in_order):
    rng = np.random.default_rng(seed)
    shape = 2, 32
    positions = [rng.integers(-3, 40, shape).astype(np.int32) for _ in "qk"]
    segments = [rng.integers(0, kinds, shape).astype(np.int32) for _ in "qk"]
    if in_order:
        positions, segments = ([np.sort(x) for x in xs] for xs in (positions, segments))
    planned, plan = planned_blocks(*positions, *segments, chunk, 4)
    assert planned[brute_force_blocks(*positions, *segments, chunk, 4)].all()
    seen = np.asarray(visible(*map(jnp.asarray, (*positions, *segments)), chunk))
    for i, (order, count) in enumerate(zip(plan.order, plan.num_whole, strict=True)):
        for j in order[:count]:
            assert seen[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].all()


@pytest.fixture
def executed(monkeypatch):
    """Counts the blocks of scores that a compiled program really computes."""
    blocks = []

    def counted(*args, scores=flash_module._scores):
        jax.debug.callback(lambda: blocks.append(1))
        return scores(*args)

    monkeypatch.setattr(flash_module, "_scores", counted)
    return blocks


@pytest.mark.parametrize("chunk, expected", [(None, 8 * 9 // 2), (64, 4 * 3), (32, 8)])
def test_forward_and_backward_compute_the_visible_blocks_only(executed, chunk, expected):
    length, block = 256, 32  # 64 blocks in all
    positions = jnp.arange(length)[None]
    at = {"q_positions": positions, "k_positions": positions, "q_segments": None, "k_segments": None}
    f = partial(flash_attention, chunk=chunk, scale=0.5, block_q=block, block_k=block, **at)
    arrays = tensors(1, 2, 1, length, length, 8)
    jax.block_until_ready(jax.jit(f)(*arrays))
    jax.effects_barrier()
    assert len(executed) == expected
    value_and_gradients(f, arrays, arrays[0])
    jax.effects_barrier()
    assert len(executed) == 3 * expected  # once more forward, once backward


def test_blocks_out_of_the_chunk_are_not_even_read():
    """Were they computed and masked, 0 · NaN would show."""
    chunk, length = 256, 768
    q, k, v = tensors(1, 2, 1, length, length, 8)
    positions = jnp.arange(length)[None]
    f = partial(attention, q_positions=positions, k_positions=positions, scale=0.5, implementation="flash")
    middle = slice(chunk, 2 * chunk)
    cotangent = np.zeros_like(q)
    cotangent[:, :, :chunk] = cotangent[:, :, 2 * chunk :] = 1
    clean = value_and_gradients(partial(f, chunk=chunk), (q, k, v), cotangent)
    k[:, :, middle] = v[:, :, middle] = np.nan
    dirty = value_and_gradients(partial(f, chunk=chunk), (q, k, v), cotangent)
    for a, b in zip(clean, dirty, strict=True):
        keep = np.delete(np.arange(length), middle)
        np.testing.assert_array_equal(a[:, :, keep], b[:, :, keep])
    global_layer = jax.jit(partial(f, chunk=None))(q, k, v)
    assert np.isnan(global_layer[:, :, 2 * chunk :]).all()  # the test can see a NaN


def compiled_temp_bytes(f, *shapes, dtype=jnp.float32) -> int:
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_flash_never_holds_the_scores():
    length, heads, kv_heads, dim = 4096, 8, 2, 64
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    f = partial(attention, q_positions=positions, k_positions=positions, scale=0.125, implementation="flash")

    def gradients(q, k, v, cotangent):
        return jax.vjp(f, q, k, v)[1](cotangent)

    q, kv = (1, heads, length, dim), (1, kv_heads, length, dim)
    scores = heads * length * length * 4
    assert compiled_temp_bytes(f, q, kv, kv) < scores / 16
    assert compiled_temp_bytes(gradients, q, kv, kv, q) < scores / 8


def test_flash_saves_inputs_output_and_one_float_a_query_and_head():
    length = 512
    q, k, v = tensors(1, 4, 2, length, length, 16)
    positions = jnp.arange(length)[None]
    f = partial(attention, q_positions=positions, k_positions=positions, scale=0.25, implementation="flash")
    _, vjp = jax.vjp(f, q, k, v)
    floats = [x for x in jax.tree.leaves(vjp) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating)]
    assert sum(x.size for x in floats) == q.size + k.size + v.size + q.size + q.shape[1] * length


@pytest.mark.parametrize("chunk", [None, 40])
@pytest.mark.parametrize("quantized", [False, True])
def test_reading_a_cache_in_blocks_is_reading_all_of_it(chunk, quantized):
    slots, block = 70, 16  # the last block is not a whole one
    q, k, v = map(jnp.asarray, tensors(4, 4, 2, 2, slots, 8))
    if quantized:
        k, v = (Quantized(jnp.round(x * 40).astype(jnp.int8), jnp.abs(x[..., 0])) for x in (k, v))
    for counts in ([70, 16, 17, 0], [1, 3, 0, 2], [90, 70, 5, 69]):  # of a part of a cache, more than its slots
        held = Held(jnp.array([0, 80, 80, 120]), jnp.array(counts))
        at = {"q_positions": (held.first + held.count - 1)[:, None] + jnp.arange(-1, 1), "chunk": chunk, "scale": 0.3}
        whole = decode_partial(q, k, v, k_positions=held.positions(jnp.arange(slots)), **at)
        parts = decode_held(q, k, v, held=held, block=block, **at)
        assert relative(normalize(parts, jnp.float32), normalize(whole, jnp.float32)) < 1e-6
        assert bool((parts.out[np.array(counts) == 0] == 0).all())


def test_what_a_row_gets_from_blocks_does_not_depend_on_how_long_others_are():
    q, k, v = map(jnp.asarray, tensors(3, 2, 2, 1, 64, 8))

    def row(*lengths):
        held = Held(jnp.zeros(3, jnp.int32), jnp.array(lengths))
        at = {"q_positions": held.count[:, None] - 1, "chunk": None, "scale": 0.3, "block": 16}
        return normalize(decode_held(q, k, v, held=held, **at), jnp.float32)[1]

    assert np.array_equal(row(0, 10, 0), row(64, 10, 33)) and np.array_equal(row(1, 10, 2), row(0, 10, 17))


def test_blocks_that_hold_nothing_are_not_read():
    q, k, v = map(jnp.asarray, tensors(1, 2, 2, 1, 64, 8))
    k, v = k.at[:, :, 16:].set(jnp.nan), v.at[:, :, 16:].set(jnp.nan)
    held = Held(jnp.zeros(1, jnp.int32), jnp.array([16]))
    at = {"q_positions": jnp.array([[15]]), "chunk": None, "scale": 0.3, "block": 16}
    assert bool(jnp.isfinite(normalize(decode_held(q, k, v, held=held, **at), jnp.float32)).all())


@pytest.mark.parametrize("groups", [1, 4])
def test_decode_copies_no_cache(groups):
    kv_heads, slots, dim = 4, 4096, 64
    at = {"q_positions": jnp.full((2, 1), 9), "k_positions": jnp.tile(jnp.arange(slots), (2, 1))}
    f = partial(attention, scale=0.125, **at)
    q, kv = (2, kv_heads * groups, 1, dim), (2, kv_heads, slots, dim)
    cache = np.prod(kv) * 2
    assert compiled_temp_bytes(f, q, kv, kv, dtype=jnp.bfloat16) < cache / 2


# ---- in a program --------------------------------------------------------------------------------------------------


def test_it_works_in_scan_and_checkpoint():
    q, k, v = tensors(1, 2, 1, 300, 300, 8)
    positions = jnp.arange(300)[None]
    f = partial(attention, q_positions=positions, k_positions=positions, chunk=100, scale=0.5)

    def layers(f, q, k, v):
        return jax.lax.scan(lambda x, _: (f(x, k, v), None), q, length=2)[0].sum()

    plain = jax.jit(jax.grad(partial(layers, partial(f, implementation="reference")), (0, 1, 2)))(q, k, v)
    again = jax.jit(jax.grad(partial(layers, jax.checkpoint(f)), (0, 1, 2)))(q, k, v)
    for a, b in zip(again, plain, strict=True):
        assert relative(a, b) < 5e-6


@pytest.mark.parametrize("implementation", ["flash", "decode"])
def test_sharded_over_batch_and_heads_it_is_the_same_and_moves_no_tensor(implementation):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    positions, segments = packed((300,), (100, 200), (290, 10), (150, 150))
    q, k, v = tensors(4, 4, 2, 300, 300, 8)
    cotangent = normal(*q.shape, seed=7)

    def run(q, k, v, cotangent, positions, segments):
        at = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
        f = partial(attention, chunk=128, scale=0.5, implementation=implementation, **at)
        out, vjp = jax.vjp(f, q, k, v)
        return out, *vjp(cotangent)

    arguments = q, k, v, cotangent, positions, segments
    names = [("batch", heads, "seq", "head_dim") for heads in ("q_heads", "kv_heads", "kv_heads", "q_heads")]
    names += [("batch", "seq")] * 2
    placed = [jax.device_put(x, activation_sharding(n, mesh)) for x, n in zip(arguments, names, strict=True)]
    program = jax.jit(run).lower(*placed).compile()
    for a, b in zip(program(*placed), jax.jit(run)(*arguments), strict=True):
        assert relative(a, b) < 1e-6
        assert len(a.sharding.device_set) == 8 and not a.sharding.is_fully_replicated
    # Devices agree on the plan, a few booleans, and exchange nothing else.
    moves = re.findall(r"= (\S+) (?:all-|reduce-scatter|collective-)[a-z-]*\(", program.as_text())
    assert all(shape.startswith("pred") for shape in moves), moves


def test_auto_decodes_few_queries_and_blocks_many(monkeypatch):
    q, k, v = tensors(1, 2, 1, 16, 16, 4)
    positions = jnp.arange(16)[None]
    used = []
    for name in ALL:
        monkeypatch.setitem(IMPLEMENTATIONS, name, lambda q, *_, name=name, **__: used.append(name) or q)
    q, k, v = map(jnp.asarray, (q, k, v))
    attention(q[:, :, :1], k, v, q_positions=positions[:, :1], k_positions=positions, scale=1.0)
    attention(q, k, v, q_positions=positions, k_positions=positions, scale=1.0)
    assert used == ["decode", "flash"]
    assert attention_module.DECODE_QUERIES < 16


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"implementation": "magic"},
            "implementation must be one of auto, reference, flash, decode, splash, cudnn, got 'magic'",
        ),
        ({"q_segments": jnp.zeros((1, 4), jnp.int32)}, "both q_segments and k_segments"),
        (
            {"implementation": "splash"},
            "'splash' cannot serve this: it runs on TPUs, and this program is compiled for a cpu",
        ),
        (
            {"implementation": "cudnn"},
            "'cudnn' cannot serve this: it runs on GPUs, and this program is compiled for a cpu",
        ),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"scale": -1.0}, "scale must be positive"),
    ],
)
def test_arguments_that_cannot_be_are_refused(change, message):
    positions = jnp.arange(4)[None]
    keywords = {"q_positions": positions, "k_positions": positions, "scale": 1.0} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(*map(jnp.asarray, tensors(1, 2, 1, 4, 4, 4)), **keywords)


def test_heads_that_do_not_divide_are_refused():
    positions = jnp.arange(4)[None]
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key/value heads"):
        attention(*map(jnp.asarray, tensors(1, 3, 2, 4, 4, 4)), q_positions=positions, k_positions=positions, scale=1.0)

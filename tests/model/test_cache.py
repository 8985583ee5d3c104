"""Caches: one chunk on chunked layers, the whole context on global ones, each row at a length of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.model import cache as cache_module
from llama4_jax.model.cache import LayerCache, empty_cache, extend, make_step
from llama4_jax.model.config import ModelConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import preset

# A chunked dense layer and a global expert layer in turn: two scanned repetitions and one layer left over.
CONFIG = ModelConfig(
    vocab_size=50, embed_dim=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
    expert_mlp_dim=24, num_experts=3, moe_interval=2, nope_interval=2, attention_chunk=4, temperature_floor=4,
    context_length=64, init_std=0.08,
)  # fmt: skip
SLOTS = 24

jitted_extend = jax.jit(extend, static_argnums=4)
one_pass = jax.jit(lambda model, tokens: model.hidden(tokens)[0])
step = jax.jit(lambda model, tokens, cache, counts: model.step(tokens, cache, counts))


def test_chunked_layers_hold_one_chunk_and_global_layers_the_whole_context():
    cache = jax.eval_shape(lambda: empty_cache(preset("scout"), 1, 1_000_000, jnp.bfloat16))
    slots = [layer.k.shape[2] for layer in cache.layers]
    assert slots == [8192, 8192, 8192, 1_000_000] * 12
    gigabytes = sum(2 * layer.k.size * layer.k.dtype.itemsize for layer in cache.layers) / 1e9
    assert gigabytes == pytest.approx(50.4, abs=0.1)  # instead of 196.6 with a full cache in every layer


@settings(max_examples=25, deadline=None)
@given(
    chunk=st.sampled_from([None, 1, 3, 4]),
    pieces=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
)
def test_a_query_sees_exactly_the_positions_of_its_chunk_so_far(chunk, pieces):
    """Two rows grow by arbitrary pieces, padded on the right; the key at each position carries that position."""
    slots = 64 if chunk is None else chunk
    cache = LayerCache(*(jnp.full((2, 1, slots, 1), -7.0) for _ in "kv"))
    lengths = np.zeros(2, int)
    for size, *counts in pieces:
        counts = np.minimum(counts, size)
        places = make_step(jnp.asarray(lengths, jnp.int32), jnp.asarray(counts, jnp.int32), size)
        new = jnp.where(places.valid, places.positions, -5).astype(jnp.float32)[:, None, :, None]
        cache, seen = jitted_extend(cache, new, 2 * new, places, chunk)
        for row in range(2):
            for t in range(counts[row]):
                position = lengths[row] + t
                first = 0 if chunk is None else position // chunk * chunk
                keys = np.asarray(seen.positions[row])
                mask = (keys >= first) & (keys <= position)
                if chunk is not None:
                    mask &= keys // chunk == position // chunk
                assert sorted(keys[mask]) == list(range(first, position + 1))
                np.testing.assert_array_equal(seen.k[row, 0, mask, 0], keys[mask])
                np.testing.assert_array_equal(seen.v[row, 0, mask, 0], 2 * keys[mask])
        lengths += counts


@pytest.mark.parametrize("scan_layers", [True, False])
def test_any_division_into_steps_gives_what_one_pass_gives(scan_layers):
    model = Llama4(CONFIG, scan_layers=scan_layers)
    tokens = jax.random.randint(jax.random.key(1), (2, SLOTS), 0, 50)
    cache, hidden, start = model.empty_cache(2, SLOTS), [], 0
    for size in (5, 1, 1, 1, 5, 5, 1, 5):  # longer than a chunk, and in and across its boundary
        out, cache = step(model, tokens[:, start : start + size], cache, jnp.full(2, size, jnp.int32))
        hidden.append(out)
        start += size
    np.testing.assert_allclose(jnp.concatenate(hidden, axis=1), one_pass(model, tokens), atol=1e-5)
    assert cache.lengths.tolist() == [SLOTS, SLOTS]


@pytest.mark.parametrize("block", [None, 3])
def test_rows_of_unequal_length_each_give_what_they_give_alone(block, monkeypatch):
    """Also where decoding reads each cache in blocks, as it does long ones."""
    monkeypatch.setattr(cache_module, "block_of_slots", lambda slots: block and min(block, slots))
    step = jax.jit(lambda model, tokens, cache, counts: model.step(tokens, cache, counts))
    model = Llama4(CONFIG, scan_layers=False)
    tokens = jax.random.randint(jax.random.key(1), (3, 14), 0, 50)
    counts = jnp.array([14, 3, 8], jnp.int32)
    one = jnp.ones(3, jnp.int32)
    prefill, cache = step(model, tokens, model.empty_cache(3, SLOTS), counts)
    second, cache = step(model, tokens[:, :1], cache, one)
    _, cache = step(model, tokens[:, 1:2], cache, one.at[1].set(0))  # row 1 takes nothing this time
    fourth, cache = step(model, tokens[:, 2:3], cache, one)
    sequences = np.zeros((3, 1, SLOTS), np.int32)  # what follows a sequence cannot change it
    for row, n in enumerate(counts.tolist()):
        sequence = [*tokens[row, :n], tokens[row, 0], *([] if row == 1 else [tokens[row, 1]]), tokens[row, 2]]
        sequences[row, 0, : len(sequence)] = sequence
        alone = one_pass(model, sequences[row])
        np.testing.assert_allclose(prefill[row, :n], alone[0, :n], atol=1e-5)
        np.testing.assert_allclose(second[row, 0], alone[0, n], atol=1e-5)
        np.testing.assert_allclose(fourth[row, 0], alone[0, len(sequence) - 1], atol=1e-5)

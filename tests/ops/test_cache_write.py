"""New entries of a cache, each in its slot: by XLA everywhere, by a kernel on TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from topologies import chips, one_chip

from llama4_jax.model.cache import LayerCache, cached_attention, make_step
from llama4_jax.ops.cache_write import scatter, write_slots, write_tile
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.sharding.hlo import costs


def numbers(shape, dtype, seed) -> np.ndarray:
    return jnp.asarray(np.random.default_rng(seed).integers(-100, 100, shape), dtype)


@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int8]),
    size=st.sampled_from([1, 5, 8, 32, 40, 150]),
    heads=st.integers(1, 3),
    rest=st.sampled_from([(), (16,)]),
    data=st.data(),
)
def test_the_kernel_writes_what_a_loop_over_rows_does_and_leaves_out_slots_that_are_not_there(
    dtype, size, heads, rest, data
):
    slots = data.draw(st.lists(st.integers(-2 * size, 2 * size), min_size=1, max_size=4))
    rows = len(slots)
    cache, new = numbers((rows, heads, size, *rest), dtype, 0), numbers((rows, heads, 1, *rest), dtype, 1)
    expected = np.array(cache)
    for row, slot in enumerate(slots):
        if 0 <= slot < size:
            expected[row, :, slot] = new[row, :, 0]
    slots = jnp.array(slots, jnp.int32)
    np.testing.assert_array_equal(scatter(cache, new, slots[:, None]), expected)
    np.testing.assert_array_equal(write_tile(cache, new, slots, interpret=True), expected)


def test_several_tokens_of_a_row_go_to_slots_of_their_own():
    cache, new = jnp.zeros((1, 1, 6, 1)), jnp.arange(1.0, 5.0)[None, None, :, None]
    written = write_slots(cache, new, jnp.array([[4, -1, 0, 6]]))
    np.testing.assert_array_equal(written[0, 0, :, 0], [3, 0, 0, 0, 1, 0])


def compiled_write(chip, shape, dtype):
    cache, new = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, (*shape[:2], 1, *shape[3:])))
    slots = jax.ShapeDtypeStruct((shape[0], 1), jnp.int32)
    with jax.set_mesh(one_chip(chip)):
        program = jax.jit(write_slots, donate_argnums=0).trace(cache, new, slots)
        return program.lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    ("shape", "dtype", "tile"),
    [((16, 2, 8192, 128), jnp.bfloat16, 16), ((16, 2, 8192, 128), jnp.int8, 32), ((16, 2, 8192), jnp.float32, 128)],
)
def test_the_kernel_compiles_for_every_tpu_and_the_cache_stays_where_it_is(chip, shape, dtype, tile):
    compiled = compiled_write(chip, shape, dtype)
    size = np.prod(shape) * jnp.dtype(dtype).itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 10
    read_and_written = 2 * tile / 8192 * size
    assert read_and_written < costs(compiled.as_text()).traffic < 1.2 * read_and_written


def test_slots_that_are_no_whole_tiles_and_narrow_heads_compile_too():
    compiled_write("v5p", (3, 4, 100, 64), jnp.bfloat16)


def test_a_token_costs_one_reading_of_the_cache():
    """Sixteen rows and six layers on two chips, as many bytes as their vector memory could never keep."""
    layers, turns = 6, 4
    shape = (16, 2, 4096, 128)

    def decode(x, caches, lengths):
        def token(_, carry):
            x, caches, lengths = carry
            step = make_step(lengths, jnp.ones_like(lengths), 1)
            new = []
            for cache in caches:
                k = x[:, ::5]
                x, cache = cached_attention(x, k, 2 * k, cache, step, chunk=8192, scale=0.1)
                new.append(cache)
            return x, new, lengths + 1

        return jax.lax.fori_loop(0, turns, token, (x, caches, lengths))

    mesh = make_mesh(MeshConfig(data=1, tensor=2), chips("v5e:2x2")[:2])
    heads = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=heads)
    x = jax.ShapeDtypeStruct((16, 10, 1, 128), jnp.bfloat16, sharding=heads)
    lengths = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        compiled = jax.jit(decode, donate_argnums=1).lower(x, [LayerCache(array, array)] * layers, lengths).compile()
    cache = 2 * layers * array.size * array.dtype.itemsize / 2
    assert cache <= costs(compiled.as_text()).traffic / turns < 1.05 * cache
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache and memory.temp_size_in_bytes < cache / 4

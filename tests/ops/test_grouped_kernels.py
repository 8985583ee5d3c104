"""Kernels of other machines: interpreted here where Pallas can, compiled ahead of time for the real ones, and refused
with a reason where they cannot serve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from topologies import one_chip

from llama4_jax.ops.grouped_matmul import PRODUCTS, grouped_matmul


def operands(dtype=jnp.float32, rows=300, sizes=(120, 0, 33, 140)):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, 192), (len(sizes), 192, 136), (rows, 136)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)], jnp.array(sizes, jnp.int32)


def value_and_gradients(implementation, x, w, g, sizes):
    value, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return value, *pull(g)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_megablox_equals_the_reference_where_groups_share_tiles_and_rows_are_left_over(dtype, tolerance):
    (x, w, g), sizes = operands(dtype)
    x, g = (a.at[293:].set(jnp.nan) for a in (x, g))  # of no group: never to be seen
    got = value_and_gradients("megablox", x, w, g, sizes)
    x, g = (jnp.nan_to_num(a) for a in (x, g))
    expected = value_and_gradients("reference", x, w, g, sizes)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        mine, theirs = (np.asarray(a, np.float32) for a in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("chip", "dtype"), [(chip, jnp.bfloat16) for chip in ("v5e", "v5p", "v6e", "tpu7x")] + [("v5p", jnp.float32)]
)
def test_on_a_tpu_all_three_products_are_kernels_that_compute_no_other_experts(chip, dtype):
    experts, rows, dim, width = 16, 4096, 1024, 2048
    with jax.set_mesh(one_chip(chip)):
        shapes = [(rows, dim), (experts, dim, width), (rows, width)]
        arguments = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]

        def all_three(x, w, g, sizes):
            return value_and_gradients("auto", x, w, g, sizes)

        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        compiled = jax.jit(all_three).trace(*arguments, sizes).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert " convolution(" not in text and " dot(" not in text
    # The transposed rows, at most, and a few lists of tiles: nothing for each expert.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * rows * max(dim, width) * jnp.dtype(dtype).itemsize


def test_a_kernel_of_another_machine_says_so():
    (x, w, _), sizes = operands(jnp.bfloat16)
    with pytest.raises(ValueError, match="mosaic_gpu is made for Hopper GPUs, and this is compiled for cpu"):
        grouped_matmul(x, w, sizes, implementation="mosaic_gpu")
    assert "mosaic_gpu" in PRODUCTS

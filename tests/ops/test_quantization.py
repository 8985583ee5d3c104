"""Matrices of few bits are as near to what they were as their format allows, and pack and unpack without loss."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.ops.quantization import Quantized, Scheme, dequantize, pack_int4, quantize, unpack_int4

GROUP_128, GROUP_32 = Scheme("int4", 128), Scheme("int4", 32)


def error(w: np.ndarray, scheme: Scheme, **where) -> float:
    """Of all numbers, as a fraction of their length; in float64."""
    q = quantize(w, scheme, **where)
    back = np.asarray(dequantize(q, **where), np.float64)
    return float(np.linalg.norm(back - w) / np.linalg.norm(w))


@pytest.mark.parametrize(
    ("scheme", "least", "most"),
    [
        (Scheme("int8"), 0.008, 0.0095),
        (Scheme("fp8"), 0.025, 0.027),
        (GROUP_128, 0.111, 0.119),
        (GROUP_32, 0.094, 0.099),
    ],
    ids=str,
)
def test_the_error_of_gaussian_weights_is_that_of_the_format(scheme, least, most):
    w = np.random.default_rng(0).normal(size=(2048, 64)).astype(np.float32)
    assert least < error(w, scheme) < most


def test_an_outlier_costs_its_own_group_only():
    w = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    ordinary = quantize(w, GROUP_32)
    w[5, 3] = 1e4
    outlier = quantize(w, GROUP_32)
    differs = (np.asarray(outlier.values, np.int8) != np.asarray(ordinary.values, np.int8)).nonzero()
    assert set(differs[1]) == {3} and max(differs[0]) < 32
    assert (outlier.scale != ordinary.scale).sum() == 1


# (shape, first contracted dimension, how many of them, scale's shape in groups of 4)
LAYOUTS = [
    ((16, 3, 5), 0, 1, (4, 3, 5)),
    ((2, 8, 5), 0, 2, (4, 5)),
    ((3, 2, 8, 5), 2, 1, (3, 2, 2, 5)),
    ((3, 8, 5), 1, 1, (3, 2, 5)),
]


@pytest.mark.parametrize(("shape", "start", "num_contract", "scales"), LAYOUTS)
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_each_scale_is_of_the_inputs_of_one_group(weights, shape, start, num_contract, scales):
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    where = {"start": start, "num_contract": num_contract}
    scheme = Scheme(weights, 4)
    q = quantize(w, scheme, **where)
    assert q.values.shape == shape and q.values.dtype == scheme.number.dtype
    assert q.scale.shape == scales and q.scale.dtype == ml_dtypes.bfloat16
    # By hand: every group of four along the flattened inputs.
    *_, outputs = w.shape[:start], w.shape[start + num_contract :]
    flat = w.reshape(-1, scales[start], 4, int(np.prod(outputs)))
    np.testing.assert_allclose(
        q.scale.reshape(-1, scales[start], int(np.prod(outputs))).astype(np.float32),
        np.abs(flat).max(2) / {"int8": 127, "int4": 7, "fp8": 448}[weights],
        rtol=2**-8,
    )
    assert error(w, scheme, **where) < {"int8": 0.006, "int4": 0.09, "fp8": 0.03}[weights]
    per_channel = quantize(w, Scheme(weights), **where)
    assert per_channel.scale.shape == (*shape[:start], 1, *outputs) and per_channel.scale.dtype == np.float32


@pytest.mark.parametrize("scheme", [Scheme("int8"), GROUP_32, Scheme("fp8")], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_numpy_and_jax_give_the_same_but_for_ties(scheme, dtype):
    w = np.random.default_rng(2).normal(size=(64, 16)).astype(dtype)
    w[:, 3] = 0
    ours, theirs = quantize(w, scheme), quantize(jnp.asarray(w), scheme)
    assert isinstance(ours.values, np.ndarray) and isinstance(theirs.values, jax.Array)
    np.testing.assert_array_equal(np.asarray(ours.scale), np.asarray(theirs.scale))
    assert np.mean(np.asarray(ours.values, np.float32) != np.asarray(theirs.values, np.float32)) < 0.005
    np.testing.assert_array_equal(dequantize(ours), dequantize(Quantized(*map(jnp.asarray, ours))))


@pytest.mark.parametrize("scheme", [Scheme("int8"), GROUP_32, Scheme("fp8")], ids=str)
def test_zeros_stay_zeros_and_the_smallest_numbers_are_no_nan(scheme):
    w = np.zeros((32, 3), np.float32)
    w[:, 1] = 1e-42
    w[0, 2] = -1e30
    q = quantize(w, scheme)
    np.testing.assert_array_equal(dequantize(q)[:, :2], 0)
    np.testing.assert_allclose(dequantize(q)[:, 2], w[:, 2], rtol=1e-6 if scheme.group is None else 2**-8)
    assert q.scale[0, 0] == 1


@pytest.mark.parametrize("scheme", [Scheme("int8"), GROUP_32, Scheme("fp8")], ids=str)
def test_what_was_quantized_is_quantized_to_itself(scheme):
    q = quantize(np.random.default_rng(3).normal(size=(64, 4)).astype(np.float32), scheme)
    again = quantize(dequantize(q), scheme)
    np.testing.assert_array_equal(np.asarray(again.values, np.float32), np.asarray(q.values, np.float32))


def test_a_group_that_does_not_divide_the_inputs_says_which_do():
    with pytest.raises(ValueError, match=r"layers.0.mlp.down has 96 inputs, which groups of 128 do not divide.*32, 16"):
        quantize(np.ones((96, 4), np.float32), GROUP_128, what="layers.0.mlp.down")
    with pytest.raises(ValueError, match="group must be at least 1, or None for one scale an output, got 0"):
        Scheme("int4", 0)
    with pytest.raises(ValueError, match="weights must be one of int8, int4, fp8, got 'int3'"):
        Scheme("int3")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(0, len(shape) - 1), st.integers(0, 2**31))
    ),
    st.booleans(),
)
def test_int4_packing_round_trips_in_both_nibble_orders(where, low_first):
    shape, axis, seed = where
    shape = [2 * n if i == axis else n for i, n in enumerate(shape)]
    values = np.random.default_rng(seed).integers(-8, 8, shape, np.int8)
    packed = pack_int4(values, axis, low_first=low_first)
    assert packed.dtype == np.uint8 and packed.size == values.size // 2
    back = unpack_int4(packed, axis, low_first=low_first)
    assert back.dtype == ml_dtypes.int4
    np.testing.assert_array_equal(back.astype(np.int8), values)
    np.testing.assert_array_equal(pack_int4(back, axis, low_first=low_first), packed)
    other = unpack_int4(packed, axis, low_first=not low_first).astype(np.int8)
    pairs = np.moveaxis(values, axis, -1).reshape(-1, 2)[:, ::-1]
    np.testing.assert_array_equal(np.moveaxis(other, axis, -1).reshape(-1, 2), pairs)


def test_a_byte_holds_its_first_number_in_the_half_that_was_asked_for():
    values = np.array([1, -2, 7, -8], np.int8)
    assert pack_int4(values, 0).tolist() == [0xE1, 0x87]
    assert pack_int4(values, 0, low_first=False).tolist() == [0x1E, 0x78]
    with pytest.raises(ValueError, match=r"axis 0 of \[3\] has an odd length"):
        pack_int4(values[:3], 0)


def test_a_quantized_matrix_is_a_tree_of_two_arrays():
    q = quantize(jnp.ones((4, 2)), Scheme("int8"))
    assert [leaf.dtype for leaf in jax.tree.leaves(q)] == [jnp.int8, jnp.float32]
    assert isinstance(jax.tree.map(lambda x: x, q), Quantized)

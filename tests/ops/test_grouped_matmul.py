"""grouped_matmul against every row times every matrix, in values and gradients; what it must not read or copy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.ops.grouped_matmul import grouped_matmul

WIDTH_IN, WIDTH_OUT = 24, 40


def operands(rows, groups, dtype=jnp.float32, seed=0):
    """x, w, and a cotangent of the result."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (rows, WIDTH_IN), (groups, WIDTH_IN, WIDTH_OUT), (rows, WIDTH_OUT)
    return [jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes, strict=True)]


@partial(jax.jit, static_argnames="implementation")
def value_and_grads(x, w, sizes, g, implementation):
    value, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return value, *pullback(g)


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30)


def assert_equals_reference(x, w, sizes, g, tolerance, implementation="auto"):
    sizes = jnp.asarray(sizes, jnp.int32)
    actual = value_and_grads(x, w, sizes, g, implementation)
    expected = value_and_grads(x, w, sizes, g, "reference")
    for name, a, b in zip(("value", "x_grad", "w_grad"), actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < tolerance, name


def test_reference_is_a_loop_over_groups():
    x, w, _ = operands(10, 3)
    expected = np.zeros((10, WIDTH_OUT))
    for rows, group in ((slice(0, 4), 0), (slice(4, 9), 2)):
        expected[rows] = np.asarray(x[rows], np.float64) @ np.asarray(w[group], np.float64)
    actual = grouped_matmul(x, w, jnp.array([4, 0, 5]), implementation="reference")
    assert relative_error(actual, expected) < 1e-6


CASES = {
    "uneven groups": (64, [5, 40, 1, 18]),
    "empty groups": (64, [0, 30, 0, 34]),
    "rows after the last group": (64, [3, 0, 20, 9]),
    "all rows in one group": (64, [0, 0, 64, 0]),
    "no rows in any group": (64, [0, 0, 0, 0]),
    "one group": (40, [40]),
    "one group, rows left over": (40, [13]),
    "fewer rows than groups": (3, [0, 1, 0, 0, 2, 0]),
    "one row": (1, [0, 0, 1, 0]),
    "one row of no group": (1, [0, 0, 0, 0]),
    "two rows": (2, [1, 0, 0, 1]),
    "a group at each end, taller blocks than rows": (17, [9, 0, 8]),
}


@pytest.mark.parametrize("implementation", ["blocks", "megablox", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case, implementation):
    rows, sizes = CASES[case]
    x, w, g = operands(rows, len(sizes))
    assert_equals_reference(x, w, sizes, g, 1e-6, implementation)


@pytest.mark.parametrize("case", ["uneven groups", "rows after the last group", "one row"])
def test_bfloat16_differs_from_the_reference_by_the_order_of_its_sums(case):
    rows, sizes = CASES[case]
    x, w, g = operands(rows, len(sizes), jnp.bfloat16)
    # Both sum in float32; a sum that lies between two bfloat16 may round to either: 2^-8 of the largest, at most.
    assert_equals_reference(x, w, sizes, g, 2**-8)


def test_bfloat16_gradients_are_summed_in_float32():
    x, w, g = operands(512, 2, jnp.bfloat16)
    sizes = jnp.array([256, 256])
    _, _, w_grad = value_and_grads(x, w, sizes, g, "auto")
    x64, g64 = np.asarray(x, np.float64), np.asarray(g, np.float64)
    exact = np.stack([x64[:256].T @ g64[:256], x64[256:].T @ g64[256:]])
    # Rounded once, at the end: half a unit in the last place of each entry.
    np.testing.assert_allclose(np.asarray(w_grad, np.float64), exact, rtol=2**-8, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (1, 20), (6, 4), (5, 40), (3, 100)]),
    weights=st.lists(st.floats(0, 1), min_size=7, max_size=7),
    empty=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 3),
)
def test_any_split_of_the_rows_equals_the_reference(shape, weights, empty, seed):
    groups, rows = shape
    *weights, left_over = [0 if i in empty else weight for i, weight in enumerate(weights)]
    share = np.cumsum(weights[:groups]) / max(sum(weights[:groups]) + left_over, 1e-9)
    ends = np.floor(np.minimum(share, 1) * rows).astype(int)
    sizes = np.diff(ends, prepend=0)
    x, w, g = operands(rows, groups, seed=seed)
    assert_equals_reference(x, w, sizes, g, 1e-6)


def test_rows_of_no_group_give_zero_and_get_zero_gradient():
    x, w, g = operands(64, 4)
    value, x_grad, _ = value_and_grads(x, w, jnp.array([3, 0, 20, 9]), g, "auto")
    assert not value[32:].any() and not x_grad[32:].any()
    assert value[:32].any() and x_grad[:32].any()


def test_nan_in_an_unused_group_does_not_leak():
    x, w, g = operands(64, 4)
    sizes = jnp.array([20, 0, 40, 0])
    clean = value_and_grads(x, w, sizes, g, "auto")
    poisoned = value_and_grads(x, w.at[jnp.array([1, 3])].set(jnp.nan), sizes, g, "auto")
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_in_a_row_stays_in_its_row_and_its_group():
    x, w, g = operands(64, 4)
    sizes = jnp.array([20, 10, 15, 0])
    clean = value_and_grads(x, w, sizes, g, "auto")
    # Row 25 is of group 1; row 50 is of no group.
    bad = jnp.array([25, 50])
    value, x_grad, w_grad = value_and_grads(x.at[bad].set(jnp.nan), w, sizes, g.at[bad].set(jnp.nan), "auto")
    others = np.delete(np.arange(64), 25)
    np.testing.assert_array_equal(value[others], clean[0][others])
    np.testing.assert_array_equal(x_grad[others], clean[1][others])
    np.testing.assert_array_equal(w_grad[np.array([0, 2, 3])], clean[2][np.array([0, 2, 3])])
    assert np.isnan(value[25]).all() and np.isnan(w_grad[1]).all()


def test_weights_of_another_dtype_are_cast_to_that_of_the_rows():
    x, w, g = operands(64, 4, jnp.bfloat16)
    w = w.astype(jnp.float32) * 1.001  # not representable in bfloat16
    sizes = jnp.array([5, 40, 1, 18])
    value, x_grad, w_grad = value_and_grads(x, w, sizes, g, "auto")
    expected = value_and_grads(x, w.astype(jnp.bfloat16), sizes, g, "auto")
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(x_grad, expected[1])
    assert w_grad.dtype == jnp.float32
    np.testing.assert_array_equal(w_grad.astype(jnp.bfloat16), expected[2])


@pytest.mark.parametrize("remat", [False, True])
def test_works_in_a_scan_over_layers(remat):
    layers, rows, width = 3, 40, 24
    x = jax.random.normal(jax.random.key(0), (rows, width))
    w = 0.2 * jax.random.normal(jax.random.key(1), (layers, 4, width, width))
    sizes = jnp.array([[10, 0, 25, 5], [40, 0, 0, 0], [1, 2, 3, 4]])

    def loss(x, w, implementation):
        def layer(x, layer):
            return x + jnp.tanh(grouped_matmul(x, *layer, implementation=implementation)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (w, sizes))[0] ** 2)

    grads = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    actual, expected = grads(x, w, "auto"), grads(x, w, "reference")
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("w_spec", [P("expert"), P(None, None, "tensor"), P("expert", None, "tensor")])
def test_sharded_operands_give_the_same_values_and_gradients(w_spec):
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
    x, w, g = operands(64, 4)
    sizes = jnp.array([5, 40, 1, 9])
    expected = value_and_grads(x, w, sizes, g, "auto")
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
    actual = value_and_grads(put(x, P("data")), put(w, w_spec), put(sizes, P()), put(g, P("data")), "auto")
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 1e-6


def test_unknown_implementation_names_the_known_ones():
    x, w, _ = operands(4, 2)
    with pytest.raises(ValueError, match="'fast'.*auto, reference, blocks"):
        grouped_matmul(x, w, jnp.array([1, 1]), implementation="fast")


def compiled(rows, groups, width, dtype, backward=False):
    def forward(x, w, sizes):
        return grouped_matmul(x, w, sizes)

    def gradients(x, w, sizes):
        return jax.grad(lambda x, w: grouped_matmul(x, w, sizes).astype(jnp.float32).var(), (0, 1))(x, w)

    shapes = (rows, width), (groups, width, width)
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    return jax.jit(gradients if backward else forward).lower(*arguments, sizes).compile()


def test_bfloat16_holds_no_float32_copy_of_all_groups():
    groups, width = 64, 128
    all_groups = groups * width * width * 4
    assert compiled(64, groups, width, jnp.bfloat16).memory_analysis().temp_size_in_bytes < all_groups / 8
    # The gradient of w is one bfloat16 array of that size while it is being filled.
    backward = compiled(64, groups, width, jnp.bfloat16, backward=True)
    assert backward.memory_analysis().temp_size_in_bytes < all_groups * (1 / 2 + 1 / 8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_row_holds_no_more_than_one_group(dtype):
    width = 128
    one_group = width * width * jnp.dtype(dtype).itemsize
    assert compiled(1, 64, width, dtype).memory_analysis().temp_size_in_bytes < 1.5 * one_group


@pytest.mark.parametrize("dtype, carried", [(jnp.float32, "f32"), (jnp.bfloat16, "u16")])
def test_loops_update_their_result_in_place(dtype, carried):
    rows, width = 96, 128
    text = compiled(rows, 4, width, dtype).as_text()
    assert f"{carried}[{rows},{width}]" in text
    for line in text.splitlines():
        assert not (f"[{rows},{width}]" in line and " copy(" in line), line


@pytest.mark.parametrize("implementation", ["reference", "blocks"])
def test_a_group_may_have_several_matrices(implementation):
    x, w, g = operands(40, 3)
    sizes = jnp.array([11, 0, 25])
    flat = value_and_grads(x, w, sizes, g, implementation)
    apart = w.reshape(3, WIDTH_IN, 2, -1).swapaxes(1, 2)
    y, d_x, d_w = value_and_grads(x, apart, sizes, g.reshape(40, 2, -1), implementation)
    together = y.reshape(40, -1), d_x, d_w.swapaxes(1, 2).reshape(w.shape)
    for a, b in zip(together, flat, strict=True):
        assert relative_error(a, b) < 1e-6

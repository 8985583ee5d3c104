"""Products in 8-bit floats against float64, on data that breaks careless scaling; and that nothing bad is silent."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_dot_general import PRODUCTS, draw, value_and_grads
from topologies import SMALLEST, one_chip

import llama4_jax
from llama4_jax.ops.dims import Dims
from llama4_jax.ops.dot_general import bfloat16_dot_general, linear
from llama4_jax.ops.experts import ExpertWeights, experts
from llama4_jax.ops.fp8 import fp8_dot_general, in_tiles, quantize, rounded
from llama4_jax.sharding import MeshConfig, make_mesh

GRANULARITIES = ["tensor", "row", "block"]
LINEAR = (((1,), (0,)), ((), ()))


def tokens(kind: str) -> np.ndarray:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(256, 1024))
    match kind:
        case "outlier channels":
            x[:, draw.choice(1024, 8)] *= 50
        case "outlier tokens":
            x[:2] *= 3e3
        case "huge outlier tokens":
            x[:2] *= 1e5
        case "log-normal tokens":
            x *= np.exp(3 * draw.normal(size=(256, 1)))
    return x.astype(np.float32)


def errors(kind: str, dot_general) -> tuple[float, float, float]:
    """Of x · w: over all, of the median row, of the worst row."""
    x = tokens(kind)
    w = np.random.default_rng(1).normal(0, 0.02, (1024, 256)).astype(np.float32)
    exact = x.astype(np.float64) @ w
    wrong = np.asarray(dot_general(jnp.asarray(x), jnp.asarray(w), LINEAR), np.float64) - exact
    rows = np.linalg.norm(wrong, axis=1) / np.linalg.norm(exact, axis=1)
    return float(np.linalg.norm(wrong) / np.linalg.norm(exact)), float(np.median(rows)), float(rows.max())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["gauss", "outlier channels", "outlier tokens"])
def test_the_error_is_that_of_the_format_wherever_the_outliers_are(granularity, kind):
    whole, median, worst = errors(kind, fp8_dot_general(granularity))
    # Two operands of three bits of mantissa: 3.7 %, and no more; bfloat16 has 0.23 %.
    assert 0.025 < whole < 0.040 and median < 0.040 and worst < 0.056
    assert errors(kind, bfloat16_dot_general)[0] < 0.0025


@pytest.mark.parametrize("granularity", ["row", "block"])
@pytest.mark.parametrize("kind", ["huge outlier tokens", "log-normal tokens"])
def test_scales_of_rows_and_tiles_keep_small_rows_beside_huge_ones(granularity, kind):
    assert max(errors(kind, fp8_dot_general(granularity))) < 0.046


def test_one_scale_for_all_loses_rows_that_are_much_smaller():
    """Known, and why the finer ones exist: numbers under the format's subnormals become 0."""
    _, median, _ = errors("huge outlier tokens", fp8_dot_general("tensor"))
    whole, _, worst = errors("log-normal tokens", fp8_dot_general("tensor"))
    assert median > 0.3 and worst == 1 and whole < 0.04


def test_a_scale_of_a_step_before_would_cost_ten_times_as_much():
    """Why scales are those of the numbers at hand: these are four times as large as the scale knows."""
    x, w = draw((256, 1024), (1024, 256))
    exact = x @ w

    def product(scale):
        values, columns = rounded(x, scale, "float8_e4m3fn"), quantize(w, "float8_e4m3fn")
        return values.astype(jnp.float32) @ columns.values.astype(jnp.float32) * (scale * columns.scale)

    right = quantize(x, "float8_e4m3fn").scale
    fresh, stale = (float(jnp.linalg.norm(product(s) - exact) / jnp.linalg.norm(exact)) for s in (right, right / 4))
    assert fresh < 0.04 and 0.25 < stale < 0.35


def test_two_bits_of_mantissa_are_too_few_for_the_forward_product():
    assert errors("gauss", fp8_dot_general(forward="float8_e5m2"))[0] > 0.07


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_any_product_and_its_gradients_are_those_of_float32_but_for_rounding(name, granularity):
    lhs_shape, rhs_shape, numbers = PRODUCTS[name]
    plain = partial(jax.lax.dot_general, dimension_numbers=numbers)
    lhs, rhs = draw(lhs_shape, rhs_shape, dtype=jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in (lhs, rhs)]
    (g,) = draw(plain(*wide).shape)
    expected = value_and_grads(plain, *wide, g)
    dot_general = partial(fp8_dot_general(granularity), dimension_numbers=numbers)
    actual = value_and_grads(dot_general, lhs, rhs, g)
    # Gradients have two bits of mantissa; of sums of a few numbers, some of which cancel, more is lost: measured 0.25.
    for a, b, tolerance in zip(actual, expected, (0.06, 0.3, 0.3), strict=True):
        assert a.dtype == jnp.bfloat16 and a.shape == b.shape
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("gradient", "most"), [("float8_e5m2", 0.062), ("float8_e4m3fn", 0.040)])
def test_gradients_of_a_large_product_have_the_error_of_their_format(granularity, gradient, most):
    x, w, g = draw((128, 512), (512, 256), (128, 256))
    expected = value_and_grads(partial(jax.lax.dot_general, dimension_numbers=LINEAR), x, w, g)
    dot_general = partial(fp8_dot_general(granularity, gradient=gradient), dimension_numbers=LINEAR)
    for a, b in zip(value_and_grads(dot_general, x, w, g)[1:], expected[1:], strict=True):
        assert np.linalg.norm(a - b) < most * np.linalg.norm(b)


def test_row_scales_are_those_of_rows_and_columns_in_all_three_products():
    """What each result is summed over has one scale: rows and columns of powers of two change nothing at all."""
    x, w, g = draw((16, 32), (32, 8), (16, 8))
    rows, columns = 2.0 ** (3 * jnp.arange(16) - 24)[:, None], 2.0 ** (5 * jnp.arange(8) - 20)[None]
    f = partial(fp8_dot_general("row"), dimension_numbers=LINEAR)
    y, d_x, d_w = value_and_grads(f, x, w, g)
    scaled = value_and_grads(f, x * rows, w * columns, g / rows / columns)
    for a, b in zip(scaled, (y * rows * columns, d_x / rows, d_w / columns), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tiles_have_scales_of_their_own_and_may_be_cut_short():
    (x,) = draw((3, 200, 300))
    scaled = np.repeat(np.repeat([[1, 2.0**20], [2.0**-20, 1]], 128, 0), 150, 1)[:200, :300]
    rounded = in_tiles(x, "float8_e4m3fn", (128, 150))
    np.testing.assert_array_equal(in_tiles(x * scaled, "float8_e4m3fn", (128, 150)), rounded * scaled)
    assert np.linalg.norm(rounded - x) < 0.03 * np.linalg.norm(x)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_becomes_a_number(granularity, bad):
    x, w, g = draw((4, 8), (8, 6), (4, 6))
    f = partial(fp8_dot_general(granularity), dimension_numbers=LINEAR)
    y, _, d_w = value_and_grads(f, x.at[1, 2].set(bad), w, g)
    assert not np.isfinite(y[1]).any() and not np.isfinite(d_w[2]).any()
    _, d_x, _ = value_and_grads(f, x, w, g.at[1, 2].set(bad))
    assert not np.isfinite(d_x[1]).any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_have_a_scale_and_give_zeros(granularity):
    x, w, g = jnp.zeros((4, 8)), jnp.ones((8, 6)), jnp.zeros((4, 6))
    for a in value_and_grads(partial(fp8_dot_general(granularity), dimension_numbers=LINEAR), x, w, g):
        assert not np.any(a)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1.0, 1e30, 3e38])
def test_the_largest_magnitude_becomes_the_largest_number_of_the_format(dtype, size):
    x = jnp.float32(size) * jnp.array([1.0, -1.0, 0.5, 0.0])
    values, scale = quantize(x, dtype)
    back = values.astype(jnp.float32) * scale
    assert np.isfinite(back).all() and scale > 0
    if size > 1e-35:  # smaller ones are flushed to 0
        assert float(values[0]) == -float(values[1]) == float(jnp.finfo(dtype).max)
        np.testing.assert_allclose(back, x, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "most"), [("float8_e4m3fn", 448), ("float8_e5m2", 57344)])
def test_what_is_too_large_for_a_scale_saturates(dtype, most):
    x = jnp.array([1e6, -1e6, 1.0])
    assert rounded(x, jnp.float32(1), dtype).astype(jnp.float32).tolist() == [most, -most, 1]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fits_flax_under_jit_and_remat_and_scan(granularity):
    dot_general = llama4_jax.ops.fp8_dot_general(granularity)
    layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0), dot_general=dot_general)
    graphdef, state = nnx.split(layer)
    (x,) = draw((3, 8))

    def loss(state, x):
        def each(x, _):
            return jax.checkpoint(lambda x: jnp.tanh(nnx.merge(graphdef, state)(x)))(x), None

        return jnp.sum(jax.lax.scan(each, x, None, length=3)[0] ** 2)

    def plain(state, x):
        for _ in range(3):
            x = jnp.tanh(nnx.merge(graphdef, state)(x))
        return jnp.sum(x**2)

    value, grads = jax.jit(jax.value_and_grad(loss))(state, x)
    expected, expected_grads = jax.value_and_grad(plain)(state, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        # A last bit before a rounding may be a last bit of 8 after it.
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())


def test_operands_are_kept_in_8_bits():
    x, w = draw((64, 512), (512, 256), dtype=jnp.bfloat16)
    _, pull = jax.vjp(partial(fp8_dot_general(), dimension_numbers=LINEAR), x, w)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes"))
    assert kept < 1.01 * (x.size + w.size)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_mesh_takes_the_largest_over_all_devices(granularity, mesh):
    x, w, g = draw((8, 4, 32), (32, 16), (8, 4, 16))
    x = x.at[5].multiply(1e3)  # on one device only
    matmul = {"tensor": "fp8", "row": "fp8_row", "block": "fp8_block"}[granularity]

    @jax.jit
    def f(x, w, g):
        y, pull = jax.vjp(lambda x, w: linear(x, w, ("embed", "mlp"), 1, matmul), x, w)
        return y, *pull(g)

    expected = f(x, w, g)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        rows, kernel = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("fsdp", "tensor"))
        placed = jax.device_put(x, rows), jax.device_put(w, kernel), jax.device_put(g, rows)
        got = f(*placed)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_a_product_has_batches_and_dimensions_in_any_order():
    dims = Dims.of(jnp.zeros((4, 5, 3)), jnp.zeros((3, 6, 4)), (((0, 2), (2, 0)), ((), ())))
    assert dims.lhs_kept == [1] and dims.rhs_kept == [1] and dims.result == ([], [0], [1])
    x, w = draw((4, 5, 3), (3, 6, 4))
    np.testing.assert_array_equal(dims.from_lhs_matrix(dims.lhs_matrix(x)), x)
    np.testing.assert_array_equal(dims.from_rhs_matrix(dims.rhs_matrix(w)), w)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"granularity": "tile"}, "granularity must be tensor, row or block, got 'tile'"),
        ({"forward": "float16"}, "forward must be one of float8_e4m3fn, float8_e5m2, got 'float16'"),
        ({"gradient": "int8"}, "gradient must be one of .*, got 'int8'"),
    ],
)
def test_an_unknown_format_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        fp8_dot_general(**wrong)


@pytest.mark.parametrize("kind", SMALLEST)
def test_it_compiles_for_tpus_with_such_units_and_without(kind):
    def loss(x, w, expert, gate, weights):
        x = linear(x, w, ("embed", "mlp"), 1, "fp8")
        return experts(x, expert, gate, weights, matmul="fp8", implementation="megablox").astype(jnp.float32).sum()

    array = jax.ShapeDtypeStruct
    weights = ExpertWeights(array((4, 2, 256, 256), jnp.float32), array((4, 256, 256), jnp.float32))
    x, choice = array((1, 512, 256), jnp.bfloat16), (1, 512, 1)
    arguments = x, array((256, 256), jnp.float32), array(choice, jnp.int32), array(choice, jnp.float32), weights
    with jax.set_mesh(one_chip(kind)):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 4))).lower(*arguments).compile()
    text = compiled.as_text()
    assert "f8e4m3fn" in text and "f8e5m2" in text

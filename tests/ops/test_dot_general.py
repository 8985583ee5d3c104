"""dot_general against float64 numpy and autodiff; what its sums are made in, and what it must not copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.ops.dot_general import contract, dot_general, make_dot_general

# name: (lhs shape, rhs shape, dimension numbers), with several, permuted and batched dimensions
PRODUCTS = {
    "linear": ((3, 5, 8), (8, 6), (((2,), (0,)), ((), ()))),
    "into heads": ((3, 5, 8), (8, 4, 2), (((2,), (0,)), ((), ()))),
    "out of heads": ((3, 5, 4, 2), (4, 2, 8), (((2, 3), (0, 1)), ((), ()))),
    "contracted in another order": ((4, 5, 3), (3, 6, 4), (((0, 2), (2, 0)), ((), ()))),
    "batched": ((7, 5, 8), (8, 7, 6), (((2,), (0,)), ((0,), (1,)))),
    "two batches, crossed": ((2, 7, 5, 8), (7, 6, 2, 8), (((3,), (3,)), ((0, 1), (2, 0)))),
    "vector times matrix": ((8,), (8, 6), (((0,), (0,)), ((), ()))),
    "one row": ((1, 1, 8), (8, 4, 2), (((2,), (0,)), ((), ()))),
    "one row, batched": ((7, 1, 8), (8, 7, 6), (((2,), (0,)), ((0,), (1,)))),
    "inner product": ((8,), (8,), (((0,), (0,)), ((), ()))),
    "outer product": ((3,), (4,), (((), ()), ((), ()))),
}


def draw(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def value_and_grads(f, lhs, rhs, g):
    value, pullback = jax.vjp(f, lhs, rhs)
    return value, *pullback(g.astype(value.dtype))


def in_numpy(lhs, rhs, numbers):
    """The product in float64."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    letters = iter("abcdefghijkl")
    rhs_names = [next(letters) for _ in rhs.shape]
    lhs_names = [next(letters) for _ in lhs.shape]
    for a, b in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
        lhs_names[a] = rhs_names[b]
    out = [lhs_names[d] for d in lhs_batch]
    out += [n for d, n in enumerate(lhs_names) if d not in (*lhs_contract, *lhs_batch)]
    out += [n for d, n in enumerate(rhs_names) if d not in (*rhs_contract, *rhs_batch)]
    equation = f"{''.join(lhs_names)},{''.join(rhs_names)}->{''.join(out)}"
    return np.einsum(equation, np.asarray(lhs, np.float64), np.asarray(rhs, np.float64))


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_values_equal_float64_up_to_one_rounding(name, dtype, tolerance):
    lhs_shape, rhs_shape, numbers = PRODUCTS[name]
    lhs, rhs = draw(lhs_shape, rhs_shape, dtype=dtype)
    actual = dot_general(lhs, rhs, numbers)
    assert actual.dtype == dtype
    np.testing.assert_allclose(np.asarray(actual, np.float64), in_numpy(lhs, rhs, numbers), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_gradients_equal_those_of_lax_in_float32(name, dtype, tolerance):
    lhs_shape, rhs_shape, numbers = PRODUCTS[name]
    lhs, rhs = draw(lhs_shape, rhs_shape, dtype=dtype)
    plain = lambda lhs, rhs: jax.lax.dot_general(lhs, rhs, numbers)  # noqa: E731
    wide = [a.astype(jnp.float32) for a in (lhs, rhs)]
    (g,) = draw(plain(*wide).shape, dtype=dtype)
    expected = value_and_grads(plain, *wide, g)
    actual = value_and_grads(lambda lhs, rhs: dot_general(lhs, rhs, numbers), lhs, rhs, g)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=tolerance, atol=1e-5)


def test_bfloat16_operands_are_summed_in_float32_in_all_three_products():
    x, w, g = draw((256, 512), (512, 128), (256, 128), dtype=jnp.bfloat16)

    def summed_in_bfloat16(x, w):
        eighths = [x[:, k::8] @ w[k::8] for k in range(8)]
        return sum(eighths[1:], eighths[0])

    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    exact = x64 @ w64, g64 @ w64.T, x64.T @ g64

    def errors(f):
        runs = zip(value_and_grads(f, x, w, g), exact, strict=True)
        return [np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in runs]

    assert max(errors(contract)) < 2e-3  # one rounding to bfloat16: measured 1.7e-3
    assert errors(summed_in_bfloat16)[0] > 3e-3


def test_preferred_element_type_is_that_of_the_result_only():
    lhs, rhs, g = draw((5, 8), (8, 6), (5, 6), dtype=jnp.bfloat16)
    numbers = (((1,), (0,)), ((), ()))
    f = lambda lhs, rhs: dot_general(lhs, rhs, numbers, preferred_element_type=jnp.float32)  # noqa: E731
    value, lhs_grad, rhs_grad = value_and_grads(f, lhs, rhs, g)
    assert value.dtype == jnp.float32 and lhs_grad.dtype == rhs_grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(value, np.float64), in_numpy(lhs, rhs, numbers), rtol=1e-6, atol=1e-6)


def test_float32_is_lax_dot_general_bit_for_bit():
    lhs, rhs, g = draw((3, 5, 8), (8, 6), (3, 5, 6))
    numbers = PRODUCTS["linear"][2]
    ours = value_and_grads(lambda lhs, rhs: dot_general(lhs, rhs, numbers), lhs, rhs, g)
    plain = value_and_grads(lambda lhs, rhs: jax.lax.dot_general(lhs, rhs, numbers), lhs, rhs, g)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_row_equals_the_same_row_of_two():
    x, w = draw((2, 64), (64, 48), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(contract(x[:1], w), contract(x, w)[:1])


def test_one_bfloat16_row_copies_no_weights_to_float32():
    x, w = jax.ShapeDtypeStruct((1, 1, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    product = jax.jit(contract).lower(x, w).compile()
    assert product.memory_analysis().temp_size_in_bytes < 512 * 512


def test_bfloat16_gradients_copy_no_weights_to_float32():
    x, w = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    x_grad = jax.grad(lambda x, w: contract(x, w).astype(jnp.float32).var())
    assert jax.jit(x_grad).lower(x, w).compile().memory_analysis().temp_size_in_bytes < 512 * 512


def test_contract_sums_over_trailing_and_leading_dimensions():
    x, w = draw((3, 5, 4, 2), (4, 2, 6))
    np.testing.assert_allclose(contract(x, w, num_contract=2), jnp.einsum("BTNH,NHD->BTD", x, w), rtol=1e-5, atol=1e-5)
    x, w = draw((3, 5, 8), (8, 4, 2))
    np.testing.assert_allclose(contract(x, w), jnp.einsum("BTD,DNH->BTNH", x, w), rtol=1e-5, atol=1e-5)


def test_contract_multiplies_with_the_dot_general_it_is_given():
    x, w = draw((3, 8), (8, 4))
    doubled = contract(x, w, dot_general=lambda *args: 2 * dot_general(*args))
    np.testing.assert_allclose(doubled, 2 * contract(x, w), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fits_a_flax_linear_layer_under_jit_and_remat(dtype):
    layer = nnx.Linear(8, 6, dtype=dtype, rngs=nnx.Rngs(0), dot_general=dot_general)
    plain = nnx.Linear(8, 6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    (x,) = draw((3, 5, 8))

    def loss(layer, x):
        return jnp.sum(layer(x).astype(jnp.float32) ** 2)

    value, grads = nnx.jit(nnx.value_and_grad(nnx.remat(loss)))(layer, x)
    expected, expected_grads = nnx.value_and_grad(loss)(plain, x)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    kernel_grad, expected_grad = grads.kernel[...], expected_grads.kernel[...]
    assert abs(value - expected) < tolerance * expected
    assert jnp.max(jnp.abs(kernel_grad - expected_grad)) < tolerance * jnp.max(jnp.abs(expected_grad))


def test_works_under_vmap():
    x, w = draw((4, 1, 8), (4, 8, 6), dtype=jnp.bfloat16)
    actual = jax.vmap(contract)(x, w)
    np.testing.assert_array_equal(actual, jnp.stack([contract(a, b) for a, b in zip(x, w, strict=True)]))


def test_make_dot_general_names_what_it_knows():
    assert make_dot_general("default") is dot_general
    with pytest.raises(ValueError, match="'fp4'.*default, bf16, fp8, fp8_row"):
        make_dot_general("fp4")


@pytest.mark.parametrize("name", ["linear", "batched", "one row"])
def test_bf16_multiplies_bfloat16_copies_and_returns_the_operands_dtype(name):
    lhs_shape, rhs_shape, numbers = PRODUCTS[name]
    lhs, rhs = draw(lhs_shape, rhs_shape)
    (g,) = draw(jax.lax.dot_general(lhs, rhs, numbers).shape)
    actual = value_and_grads(lambda lhs, rhs: make_dot_general("bf16")(lhs, rhs, numbers), lhs, rhs, g)
    copies = [a.astype(jnp.bfloat16) for a in (lhs, rhs)]
    exact = dot_general(*copies, numbers, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(actual[0], exact)
    assert all(a.dtype == jnp.float32 for a in actual)

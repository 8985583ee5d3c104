"""Products with quantized matrices are those with the numbers that these stand for, in every form and on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from topologies import one_chip

from llama4_jax.ops import quantized_matmul
from llama4_jax.ops.quantization import Quantized, Scheme, dequantize, quantize
from llama4_jax.ops.quantized_matmul import quantized_dot, quantized_grouped_matmul, quantized_linear
from llama4_jax.sharding import SERVING, MeshConfig, make_mesh, use_rules

SCHEMES = [Scheme("int8"), Scheme("fp8"), Scheme("int4"), Scheme("int4", 32)]
# Of the result's length, by the dtype of x.
CLOSE = {"float32": 1e-6, "bfloat16": 5e-3}


def gaussian(*shape: int, seed: int = 0, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def matrix(shape: tuple[int, ...], scheme: Scheme, **where) -> tuple[Quantized, np.ndarray]:
    """And the numbers that it stands for, in float64."""
    q = quantize(gaussian(*shape, seed=1), scheme, **where)
    return q, np.asarray(dequantize(q, **where), np.float64)


def distance(y, expected: np.ndarray) -> float:
    assert y.shape == expected.shape
    return float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))


@pytest.fixture(params=["cpu", "tpu", "gpu"])
def form(request, monkeypatch) -> str:
    """What each platform would compute, on this one."""
    monkeypatch.setattr(quantized_matmul, "platform", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("scheme", "dtype"), [*[(s, "float32") for s in SCHEMES], (SCHEMES[3], "bfloat16")], ids=str)
def test_float_activations_give_the_product_with_the_numbers_that_are_meant(form, scheme, dtype):
    q, w = matrix((384, 24), scheme)
    for rows in (1, 40):
        x = gaussian(rows, 384, dtype=dtype)
        y = jax.jit(lambda x, q: quantized_dot(x, q, activations="float"))(x, q)
        assert y.dtype == x.dtype
        assert distance(y, np.asarray(x, np.float64) @ w) < CLOSE[dtype]


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.weights != "fp8"], ids=str)
def test_int8_activations_add_the_rounding_of_a_row(form, scheme):
    q, w = matrix((384, 24), scheme)
    for rows in (1, 5):
        x = gaussian(rows, 384) * 10.0 ** jnp.arange(rows)[:, None].clip(0, 6)  # a row is none of another's business
        y = jax.jit(lambda x, q: quantized_dot(x, q, activations="int8"))(x, q)
        expected = np.asarray(x, np.float64) @ w
        for row in range(rows):
            assert 0.003 < distance(y[row], expected[row]) < 0.016
        # Exactly: the product with the rounded x.
        scale = np.abs(np.asarray(x)).max(1, keepdims=True) * np.float32(1 / 127)
        assert distance(y, (np.rint(np.asarray(x) / scale) * scale.astype(np.float64)) @ w) < CLOSE["float32"]


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("gaussian", 0.010, 0.013),
        ("large tokens", 0.005, 0.013),  # each has its own scale
        ("log-normal tokens", 0.010, 0.013),
        ("large channels", 0.035, 0.09),  # which share a row's scale with the others: int8 is not for these
    ],
)
def test_the_error_of_int8_times_int8_is_that_of_its_rows(kind, least, most):
    x = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    if kind == "large tokens":
        x[:2] *= 3e3
    if kind == "log-normal tokens":
        x *= np.exp(np.random.default_rng(1).normal(size=(64, 1)) * 3)
    if kind == "large channels":
        x[:, :8] *= 50
    w = gaussian(1024, 64, seed=1)
    y = jax.jit(lambda x, q: quantized_dot(x, q, activations="int8"))(x, quantize(w, Scheme("int8")))
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    rows = [distance(ours, theirs) for ours, theirs in zip(y, expected, strict=True)]
    assert least < np.median(rows) < most


def test_auto_rounds_activations_on_a_cpu_and_for_int8_alone(monkeypatch):
    x = gaussian(4, 64)

    def same(scheme, activations):
        q, _ = matrix((64, 16), scheme)
        return bool(
            jax.jit(lambda x, q: (quantized_dot(x, q) == quantized_dot(x, q, activations=activations)).all())(x, q)
        )

    assert same(Scheme("int8"), "int8") and not same(Scheme("int8"), "float")
    for scheme in (Scheme("int4", 32), Scheme("int4"), Scheme("fp8"), Scheme("int8", 32)):
        assert same(scheme, "float")
    monkeypatch.setattr(quantized_matmul, "platform", lambda: "tpu")
    assert same(Scheme("int8"), "float")


def test_activations_that_cannot_be_say_so():
    q, _ = matrix((64, 16), Scheme("fp8"))
    with pytest.raises(ValueError, match="int8 cannot be multiplied with a matrix of fp8: choose 'float' or 'auto'"):
        quantized_dot(gaussian(2, 64), q, activations="int8")
    with pytest.raises(ValueError, match="activations must be one of auto, float, int8, got 'int4'"):
        quantized_dot(gaussian(2, 64), q, activations="int4")


def test_a_row_of_zeros_gives_zeros_and_others_are_not_its_business():
    q, _ = matrix((64, 16), Scheme("int8"))
    x = gaussian(3, 64).at[1].set(0)
    y = quantized_dot(x, q, activations="int8")
    assert not np.asarray(y[1]).any() and np.isfinite(y).all()
    np.testing.assert_array_equal(y[2], quantized_dot(x[2:], q, activations="int8")[0])


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 32), Scheme("int4", 8)], ids=str)
def test_inputs_and_outputs_may_be_several_dimensions(form, scheme):
    q, w = matrix((4, 16, 6, 5), scheme, num_contract=2)
    x = gaussian(2, 3, 4, 16)
    y = quantized_dot(x, q, num_contract=2, activations="float")
    assert distance(y, np.einsum("btnh,nhpd->btpd", np.asarray(x, np.float64), w)) < CLOSE["float32"]


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 16)], ids=str)
def test_on_a_mesh_no_matrix_moves(scheme):
    """Gate and up are outputs together, of which the second dimension is split."""
    mesh, axes = make_mesh(MeshConfig(data=2, tensor=4)), ("embed", "gate_up", "mlp")
    q, w = matrix((32, 2, 64), scheme)
    x = gaussian(2, 3, 32)
    home = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    placed = Quantized(*(jax.device_put(part, home) for part in q))
    with jax.set_mesh(mesh), use_rules(SERVING):
        multiply = jax.jit(lambda x, q: quantized_linear(x, q, axes, num_contract=1, activations="float"))
        assert "all-gather" not in multiply.lower(x, placed).compile().as_text()
        y = multiply(x, placed)
    assert distance(y, np.einsum("btd,dpf->btpf", np.asarray(x, np.float64), w)) < CLOSE["float32"]


@pytest.mark.parametrize("inputs", [97, 130, 512, 1000])
def test_any_number_of_inputs_is_cut_into_blocks(inputs):
    q, w = matrix((inputs, 8), Scheme("int8"))
    x = gaussian(3, inputs)
    assert distance(quantized_dot(x, q, activations="float"), np.asarray(x, np.float64) @ w) < CLOSE["float32"]


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 16), Scheme("fp8")], ids=str)
@pytest.mark.parametrize(
    ("pairs", "sizes", "dtype"),
    [((2,), (0, 3, 1, 0), "float32"), ((), (1, 0, 0, 0), "float32"), ((), (40, 3, 0, 21), "bfloat16")],
)
def test_each_row_is_multiplied_with_the_matrix_of_its_group(form, scheme, pairs, sizes, dtype):
    q, w = matrix((4, *pairs, 64, 24), scheme, start=1 + len(pairs))
    rows = sum(sizes) + (2 if sum(sizes) > 1 else 0)  # the last ones belong to no group
    x = gaussian(rows, 64, dtype=dtype)
    multiply = jax.jit(lambda *a: quantized_grouped_matmul(*a, activations="float"))
    y = multiply(x, q, jnp.array(sizes, jnp.int32))
    expected = np.zeros((rows, *pairs, 24))
    for row, group in enumerate(np.repeat(np.arange(4), sizes)):
        expected[row] = np.einsum("i,...io->...o", np.asarray(x[row], np.float64), w[group])
    assert y.dtype == x.dtype and distance(y, expected) < CLOSE[dtype]


def test_grouped_products_with_int8_activations_are_those_of_single_ones():
    q, _ = matrix((3, 64, 24), Scheme("int8"), start=1)
    x, sizes = gaussian(7, 64), jnp.array([2, 0, 5], jnp.int32)
    y = quantized_grouped_matmul(x, q, sizes)
    for rows, group in ((slice(0, 2), 0), (slice(2, 7), 2)):
        own = Quantized(q.values[group], q.scale[group])
        np.testing.assert_allclose(y[rows], quantized_dot(x[rows], own), rtol=1e-6)


def test_nothing_of_a_matrixs_size_is_made_on_a_cpu():
    size = 2048 * 1024
    for scheme in (Scheme("int8"), Scheme("int4", 128), Scheme("fp8")):
        like = quantize(np.zeros((2048, 1024), np.float32), scheme)
        q = Quantized(*(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in like))
        x = jax.ShapeDtypeStruct((2, 2048), jnp.float32)
        for activations in ("auto", "float"):
            run = jax.jit(lambda x, q, a=activations: quantized_dot(x, q, activations=a))
            assert run.lower(x, q).compile().memory_analysis().temp_size_in_bytes < size
        stack = Quantized(*(jax.ShapeDtypeStruct((4, *part.shape), part.dtype) for part in like))
        run = jax.jit(quantized_grouped_matmul)
        compiled = run.lower(x, stack, jax.ShapeDtypeStruct((4,), jnp.int32)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < size


@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("int4", 128), Scheme("fp8")], ids=str)
def test_nor_on_a_tpu_and_few_bits_are_all_it_reads(scheme):
    mesh = one_chip("v5e")

    def like(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def stored(*shape: int) -> Quantized:
        q = jax.eval_shape(lambda: quantize(jnp.zeros(shape), scheme, start=len(shape) - 2))
        return Quantized(*(like(part.shape, part.dtype) for part in q))

    x, sizes = like((8, 2048), jnp.bfloat16), like((4,), jnp.int32)
    with jax.set_mesh(mesh):
        single = jax.jit(quantized_dot).lower(x, stored(2048, 1024)).compile()
        grouped = jax.jit(quantized_grouped_matmul).lower(x, stored(4, 2, 2048, 1024), sizes).compile()
    for compiled in (single, grouped):
        assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 1024 // 4
    bits = 4 if scheme.weights == "int4" else 8
    assert single.memory_analysis().argument_size_in_bytes < 1.1 * 2048 * 1024 * bits / 8

"""Cross entropy in pieces: the same numbers and gradients as from whole logits, in a fraction of their memory."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama4_jax.ops import cross_entropy
from llama4_jax.ops.cross_entropy import linear_cross_entropy, token_nll, token_scores
from llama4_jax.sharding import MeshConfig, activation_sharding, make_mesh, parameter_sharding


def problem(batch=2, tokens=13, dim=8, vocab=31, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(batch, tokens, dim)), dtype)
    head = jnp.asarray(rng.normal(size=(dim, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, tokens)), jnp.int32)
    weights = jnp.asarray(rng.random((batch, tokens)) * (rng.random((batch, tokens)) < 0.8), jnp.float32)
    return hidden, head, targets, weights


def whole(hidden, head, targets, weights):
    logits = jnp.einsum("btd,dv->btv", hidden.astype(jnp.float32), head, precision="highest")
    return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum(), weights.sum()


def mean(loss, hidden, head, targets, weights, **keywords):
    """A mean, so that the cotangent is not 1."""
    total, weight = loss(hidden, head, targets, weights, **keywords)
    return total / weight


@pytest.fixture(params=["", "in blocks"])
def columns(request, monkeypatch):
    """The head's columns as they are, and filled up to whole blocks as for TPUs."""
    if request.param:
        monkeypatch.setattr(cross_entropy, "BLOCK_COLUMNS", {"cpu": 24})
        monkeypatch.setattr(cross_entropy, "MOST_ADDED", 24)


def value_and_gradients(loss, arrays, **keywords):
    f = jax.value_and_grad(partial(mean, loss, **keywords), argnums=(0, 1, 3))
    value, gradients = jax.jit(f)(*arrays)
    return value, *gradients


def relative(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))  # zeros equal zeros


@pytest.mark.parametrize(
    "shape, pieces", [((2, 13, 8, 31), n) for n in (None, 1, 2, 5, 13)] + [((1, 1, 3, 2), 1), ((3, 4, 1, 7), 3)]
)
def test_values_and_gradients_are_those_of_whole_logits(shape, pieces, columns):
    arrays = problem(*shape)
    got = value_and_gradients(linear_cross_entropy, arrays, pieces=pieces)
    for a, b in zip(got, value_and_gradients(whole, arrays), strict=True):
        assert a.dtype == b.dtype and relative(a, b) < 2e-6


@pytest.mark.parametrize("pieces", [1, 4])
def test_the_likelihood_of_each_token_is_that_of_whole_logits(pieces, columns):
    hidden, head, targets, weights = problem()
    logits = hidden @ head
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    got = jax.jit(partial(token_nll, pieces=pieces))(hidden, head, targets)
    assert got.dtype == jnp.float32 and relative(got, expected) < 1e-6

    def by_token(hidden, head, targets, weights):
        return (token_nll(hidden, head, targets, pieces=pieces) * weights).sum(), weights.sum()

    arrays = hidden, head, targets, weights
    for a, b in zip(value_and_gradients(by_token, arrays), value_and_gradients(whole, arrays), strict=True):
        assert relative(a, b) < 2e-6


def test_a_token_of_weight_zero_adds_nothing():
    hidden, head, targets, weights = problem()
    weights = weights.at[:, 5:].set(0)
    other = hidden.at[:, 5:].set(7), head, (targets.at[:, 5:].set(3)), weights
    loss = partial(linear_cross_entropy, pieces=3)
    total, weight = loss(hidden, head, targets, weights)
    np.testing.assert_array_equal(loss(*other), (total, weight))
    alone = loss(hidden[:, :5], head, targets[:, :5], weights[:, :5])
    np.testing.assert_allclose(alone, (total, weight), rtol=1e-6)
    _, d_hidden, d_head, _ = value_and_gradients(linear_cross_entropy, (hidden, head, targets, weights), pieces=3)
    _, _, d_head_other, _ = value_and_gradients(linear_cross_entropy, other, pieces=3)
    assert not d_hidden[:, 5:].any()
    np.testing.assert_array_equal(d_head, d_head_other)


def test_all_weights_zero_give_zero_not_nan():
    hidden, head, targets, weights = problem()

    def total(hidden, head):
        return linear_cross_entropy(hidden, head, targets, 0 * weights)[0]

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    assert value == 0 and all((x == 0).all() for x in gradients)


def test_large_logits_do_not_overflow():
    hidden, head, targets, weights = problem()
    got = value_and_gradients(linear_cross_entropy, (hidden * 1000, head, targets, weights), pieces=2)
    expected = value_and_gradients(whole, (hidden * 1000, head, targets, weights))
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 2e-6


@pytest.mark.parametrize("compute_dtype", [None, jnp.float32])
def test_bfloat16_hidden_states_give_float32_loss_and_gradients_of_their_own_dtype(compute_dtype):
    hidden, head, targets, weights = problem(dim=32, dtype=jnp.bfloat16)
    arrays = hidden, head, targets, weights
    got = value_and_gradients(linear_cross_entropy, arrays, pieces=4, compute_dtype=compute_dtype)
    assert [x.dtype for x in got] == [jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32]
    expected = value_and_gradients(whole, (hidden.astype(jnp.float32), *arrays[1:]))
    # The head is rounded to bfloat16 too unless asked otherwise; d_hidden is rounded twice in any case.
    tolerances = (5e-4, 8e-3, 4e-3, 8e-3) if compute_dtype is None else (1e-6, 8e-3, 1e-6, 1e-6)
    for a, b, tolerance in zip(got, expected, tolerances, strict=True):
        assert relative(a, b) < tolerance


def test_the_gradient_of_the_head_is_summed_in_float32():
    """In bfloat16 a sum of 4096 equal terms stops growing at 256 of them."""
    hidden = jnp.ones((1, 4096, 1), jnp.bfloat16)
    head, targets = jnp.zeros((1, 2), jnp.float32), jnp.zeros((1, 4096), jnp.int32)

    def total(head):
        return linear_cross_entropy(hidden, head, targets, jnp.ones((1, 4096)), pieces=4096)[0]

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(head), [[-2048.0, 2048.0]])


def place(mesh, hidden, head, targets, weights):
    rows = activation_sharding(("batch", "seq"), mesh)
    return (
        jax.device_put(hidden, activation_sharding(("batch", "seq", "embed"), mesh)),
        jax.device_put(head, parameter_sharding(head.shape, ("embed", "vocab"), mesh)),
        jax.device_put(targets, rows),
        jax.device_put(weights, rows),
    )


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8), MeshConfig(data=2, context=2, tensor=2)]
)
def test_sharded_over_batch_sequence_and_vocabulary_it_is_the_same(mesh, columns):
    mesh = make_mesh(mesh)
    arrays = problem(batch=8, tokens=12, dim=8, vocab=32)
    expected = value_and_gradients(whole, arrays)
    logits = arrays[0] @ arrays[1]
    expected_nll = optax.softmax_cross_entropy_with_integer_labels(logits, arrays[2])
    with jax.set_mesh(mesh):
        placed = place(mesh, *arrays)
        got = value_and_gradients(linear_cross_entropy, placed, pieces=3)
        got_nll, likeliest = jax.jit(partial(token_scores, pieces=3))(*placed[:3])
    np.testing.assert_array_equal(likeliest, logits.argmax(-1) == arrays[2])
    for a, b in zip((*got, got_nll), (*expected, expected_nll), strict=True):
        assert relative(a, b) < 2e-6


def test_devices_exchange_neither_logits_nor_a_head_gradient_per_piece():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch, tokens, dim, vocab, pieces = 8, 15, 16, 64, 5
    arrays = problem(batch, tokens, dim, vocab)
    f = jax.grad(partial(mean, linear_cross_entropy, pieces=pieces), argnums=(0, 1))
    with jax.set_mesh(mesh):
        program = jax.jit(f).lower(*place(mesh, *arrays)).compile().as_text()
    sizes = {}
    for computation in re.split(r"\n(?=%|ENTRY)", program):
        moves = re.findall(r"= (\(?\w+\[.*?) (?:all-|reduce-scatter|collective-)[a-z-]*\(", computation)
        dims = [map(int, filter(None, x.split(","))) for move in moves for x in re.findall(r"\[([\d,]*)\]", move)]
        sizes.setdefault("ENTRY" if computation.startswith("ENTRY") else "loop", []).extend(
            int(np.prod(list(x))) for x in dims
        )
    # In the loop, per device: one number a token from each shard of the vocabulary, and a piece of d_hidden.
    rows = batch // 4
    assert max(sizes["loop"]) <= rows * (tokens // pieces) * dim
    assert dim * vocab // 2 in sizes["ENTRY"]  # the head's gradient, once


def test_it_never_holds_the_logits():
    batch, tokens, dim, vocab = 1, 2048, 64, 32768
    shapes = [(batch, tokens, dim), (dim, vocab), (batch, tokens), (batch, tokens)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    logits = batch * tokens * vocab * 4

    def temp_bytes(f, *arguments):
        return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    gradients = jax.grad(partial(mean, linear_cross_entropy, pieces=16), argnums=(0, 1))
    assert temp_bytes(gradients, *arguments) < logits / 4
    assert temp_bytes(partial(linear_cross_entropy, pieces=16), *arguments) < logits / 4
    assert temp_bytes(partial(token_nll, pieces=16), *arguments[:3]) < logits / 4


def test_an_impossible_number_of_pieces_is_refused():
    with pytest.raises(ValueError, match="pieces must be between 1 and the 13 tokens of a row, got 14"):
        linear_cross_entropy(*problem(), pieces=14)

"""Hidden states, router choices, layers by name and captures are the same however the model is compiled."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from llama4_jax import Llama4, ModelConfig
from llama4_jax.sharding import MeshConfig, make_mesh

CONFIG = ModelConfig(
    vocab_size=50, embed_dim=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, expert_mlp_dim=24,
    num_experts=3, top_k=2, moe_interval=2, nope_interval=2, attention_chunk=8, temperature_floor=4, context_length=64,
    init_std=0.08,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 50)
SEGMENTS = jnp.where(jnp.arange(16) < 6, 1, 2) * (jnp.arange(16) < 14) * jnp.ones((2, 1), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.where(jnp.arange(16) < 6, jnp.arange(16), jnp.arange(16) - 6), (2, 16))
PACKED = {"positions": POSITIONS, "segment_ids": SEGMENTS}
look = jax.jit(lambda model, tokens, **where: model(tokens, **where, return_hidden=True, return_router=True))


@pytest.fixture
def unchecked():
    """Without jaxtyping's checks, as a user has it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def plain():
    return Llama4(CONFIG, scan_layers=False)


@pytest.fixture(scope="module")
def expected(plain):
    return look(plain, TOKENS, **PACKED)


def test_hidden_states_are_what_each_layer_returns_and_choices_what_its_router_says(plain, expected):
    assert expected.hidden.shape == (6, 2, 16, 32)
    np.testing.assert_array_equal(expected.hidden[0], plain.embed.embedding[...][TOKENS])
    np.testing.assert_allclose(plain.logits(plain.final_norm(expected.hidden[-1])), expected.logits, atol=1e-6)
    place = plain._place(POSITIONS, SEGMENTS)
    for i in range(5):
        out, _, _ = plain.layers[i](expected.hidden[i], place, SEGMENTS > 0)
        np.testing.assert_allclose(expected.hidden[i + 1], out, atol=1e-6, err_msg=str(i))
    router = expected.router
    assert router.logits.shape == (2, 2, 16, 3) and router.experts.shape == router.gates.shape == (2, 2, 16, 2)
    real = np.broadcast_to(SEGMENTS > 0, (2, 2, 16))
    best = np.argsort(-np.asarray(router.logits), -1)[..., :2]
    np.testing.assert_array_equal(np.asarray(router.experts)[real], best[real])
    assert np.all(np.asarray(router.experts)[~real] == 3)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(router.gates), np.zeros_like(best[..., :1]), -1)[real],
        jax.nn.sigmoid(router.logits.max(-1, keepdims=True))[real],
        rtol=1e-6,
    )


@pytest.mark.parametrize("how", [{}, {"remat": "full"}, {"remat": "dots", "scan_layers": False}], ids=str)
def test_they_do_not_depend_on_scanning_or_recomputation(how, expected):
    found = look(Llama4(CONFIG, **how), TOKENS, **PACKED)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_they_do_not_depend_on_the_mesh(plain):
    expected = look(plain, TOKENS)
    mesh = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2])  # in zigzag order
    with jax.set_mesh(mesh):
        found = jax.jit(lambda model, tokens: model(tokens, return_hidden=True, return_router=True))(plain, TOKENS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


def test_what_is_not_asked_for_is_not_returned_nor_computed(plain, expected):
    assert isinstance(plain(TOKENS), jax.Array)
    alone = plain(TOKENS, return_router=True)
    assert alone.hidden is None and alone.router is not None
    dense = Llama4(dataclasses.replace(CONFIG, moe_interval=0, num_layers=1))
    assert dense(TOKENS, return_router=True).router is None


@pytest.mark.parametrize("remat", ["none", "full"])
def test_captures_of_scanned_layers_are_those_of_unscanned_ones_stacked(remat):
    def captured(model):
        capture = lambda model: nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(TOKENS)  # noqa: E731
        logits, found = nnx.jit(capture)(model)
        return logits, {path: value[...] for path, value in nnx.to_flat_state(found)}

    model = Llama4(CONFIG, remat=remat)
    a, scanned = captured(model)
    b, unscanned = captured(model.unscanned())
    np.testing.assert_allclose(a, b, atol=1e-6)
    every = model.decoder.num_scanned // 2
    for name in (("mlp", "__call__"), ("attention", "o", "__call__")):
        stacked = scanned["decoder", "group", 0, *name]
        apart = [unscanned["decoder", "rest", 2 * i, *name] for i in range(every)]
        assert every == 2
        np.testing.assert_allclose(stacked[0], np.stack([one[0] for one in apart]), atol=1e-6)
    (y, stats), *_ = scanned["decoder", "group", 1, "moe", "__call__"]
    assert y.shape == (2, 2, 16, 32) and stats.choices.experts.shape == (2, 2, 16, 2)
    assert not any(hasattr(module, "__captures__") for _, module in nnx.iter_modules(model))


def test_layers_have_the_names_of_inspect_whatever_the_layout(plain):
    from llama4_jax.weights.load import named_variables

    scanned = Llama4(CONFIG)
    for model in (plain, scanned):
        assert len(model.layers) == 5 and len(model.layers[1:3]) == 2
        for name, variable in named_variables(plain).items():
            if name.startswith("layers."):
                _, i, *path = name.split(".")
                found = model.layers[int(i)]
                for attribute in path:
                    found = getattr(found, attribute)
                np.testing.assert_array_equal(found[...], variable[...], err_msg=name)
        with pytest.raises(IndexError):
            model.layers[5]
    plain.layers[0].attention.q.kernel[...] = plain.layers[0].attention.q.kernel[...]  # its own
    with pytest.raises(ValueError, match="a slice of a scanned stack"):
        scanned.layers[0].attention.q.kernel[...] = jnp.zeros((32, 4, 8))
    np.testing.assert_array_equal(scanned.layers[-1].mlp.down.kernel[...], plain.layers[4].mlp.down.kernel[...])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [[1, 2]]}, r"tokens must be an array, int32 \[B, T\], got a list"),
        ({"tokens": jnp.arange(3)}, r"tokens must be int32 \[B, T\], .*got the shape \[3\].*tokens\[None\]"),
        ({"tokens": jnp.ones((1, 3))}, r"tokens must be integers, int32 \[B, T\], got float32 \[1, 3\]"),
        ({"tokens": jnp.ones((1, 3), bool)}, "tokens must be integers"),
        ({"tokens": jnp.array([[1, 50]])}, "tokens has the id 50, .* ids 0 to 49"),
        ({"tokens": np.array([[1, -1]])}, "tokens has the id -1"),
        ({"positions": jnp.arange(16)}, r"positions must be int32 \[B, T\] as tokens is, \[2, 16\], got .*\[16\]"),
        ({"segment_ids": jnp.ones((2, 15), jnp.int32)}, r"segment_ids must be int32 \[B, T\]"),
        ({"segment_ids": jnp.ones((2, 16))}, "segment_ids must be integers"),
        ({"images": jnp.ones((2, 8, 8, 3))}, r"images must be \[B, tiles, S, S, 3\] .*shape \[2, 8, 8, 3\]"),
        ({"images": ["a.jpg"]}, r"images must be tiles .* got a list"),
    ],
)  # fmt: skip
def test_arguments_of_another_shape_or_dtype_are_named(unchecked, plain, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        plain(**{"tokens": TOKENS, **arguments})
    assert len(str(error.value)) <= 500


def test_a_seed_may_be_any_integer_or_key(unchecked):
    small = dataclasses.replace(CONFIG, num_layers=1, embed_dim=8)
    table = lambda seed: np.asarray(Llama4(small, seed=seed).embed.embedding[...])  # noqa: E731
    for seed in (np.int64(3), np.uint8(3), jnp.int32(3), jax.random.key(3), jax.random.PRNGKey(3)):
        np.testing.assert_array_equal(table(seed), table(3))
    for wrong in (1.5, "3", jnp.float32(3), True, jnp.arange(3), None):
        with pytest.raises(ValueError, match="seed must be"):
            table(wrong)


def test_vmap_over_seeds_makes_stacked_models():
    small = dataclasses.replace(CONFIG, num_layers=4)
    seeds = jnp.arange(3)
    for models in (
        jax.vmap(lambda seed: Llama4(small, seed=seed))(seeds),
        nnx.vmap(lambda seed: Llama4(small, seed=seed))(seeds),
    ):
        logits = jax.vmap(lambda model: model(TOKENS))(models)
        np.testing.assert_allclose(logits[2], Llama4(small, seed=2)(TOKENS), atol=1e-5)


def test_help_shows_the_arguments(plain):
    assert list(inspect.signature(Llama4).parameters)[:3] == ["config", "precision", "scan_layers"]
    assert not hasattr(plain, "__signature__")


def test_wrong_arguments_of_the_model_are_named(unchecked):
    with pytest.raises(ValueError, match="attention must be one of auto, reference"):
        Llama4(CONFIG, attention="fast")
    with pytest.raises(ValueError, match="config must be a ModelConfig"):
        Llama4("scout")

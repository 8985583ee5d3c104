"""Pictures against both references: the encoder module by module, logits, decoding, gradients; and against itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import ours, pictures
from oracles.pictures import PATCH, TOKENS_PER_TILE, config
from test_parity_gradients import assert_gradients_equal

import llama4_jax
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.vision import normalized, patch_rotation, pixel_shuffle
from llama4_jax.sharding import MeshConfig, make_mesh, parameter_sharding
from llama4_jax.weights.table import to_hf

FEATURES = 2e-6  # of the output's scale; 1.1e-6 was the largest seen
MODULE = 1e-6
LOGITS = 2e-6

every_case = pytest.mark.parametrize("case", pictures.CASES, ids=lambda case: case.name)


@functools.cache
def model(case, scan_layers=False):
    return ours.filled(config(case), pictures.state_dict(case), scan_layers=scan_layers)


def ids(case):
    return jnp.asarray(pictures.ids(case), jnp.int32)


def error(mine, theirs):
    return np.abs(np.asarray(mine) - theirs).max() / np.abs(theirs).max()


@functools.cache
def forward(case, scan_layers=False):
    """The compiled forward pass: (ids, tiles) → logits."""
    graphdef, state = nnx.split(model(case, scan_layers))
    run = jax.jit(lambda state, ids, tiles: nnx.merge(graphdef, state)(ids, images=tiles))
    return lambda tiles: np.asarray(run(state, ids(case), None if tiles is None else jnp.asarray(tiles)))


@functools.cache
def logits(case, scan_layers=False):
    return forward(case, scan_layers)(pictures.tiles())


def test_each_module_of_the_encoder_equals_hugging_faces():
    case = pictures.CASES[0]
    trace = pictures.trace(case)
    encoder = model(case).vision
    rotation = patch_rotation(config(case).vision)
    parts = {
        "vision_model.layernorm_pre": encoder.pre_norm,
        "vision_model.layernorm_post": encoder.post_norm,
        "vision_model.vision_adapter": lambda x: encoder.adapter(pixel_shuffle(x, config(case).vision)),
        "multi_modal_projector": model(case).projector,
    }
    for i, layer in enumerate(encoder.layers()):
        parts |= {
            f"vision_model.model.layers.{i}.input_layernorm": layer.attention_norm,
            f"vision_model.model.layers.{i}.mlp.fc1": layer.mlp.fc1,
            f"vision_model.model.layers.{i}.mlp": layer.mlp,
            f"vision_model.model.layers.{i}": functools.partial(layer, rotation=rotation),
        }
    wrong = {}
    for name, part in parts.items():
        (given, expected) = next(pair for theirs, pair in trace.items() if theirs.removeprefix("model.") == name)
        mine = np.asarray(part(jnp.asarray(given))).reshape(expected.shape)
        if error(mine, expected) > MODULE:
            wrong[name] = error(mine, expected)
    assert not wrong


@every_case
def test_features_and_logits_equal_both_references(case):
    features = np.asarray(model(case).encode_images(jnp.asarray(pictures.tiles())))
    given = np.concatenate([row[: len(p) * TOKENS_PER_TILE] for row, p in zip(features, pictures.PLACES, strict=True)])
    expected = next(out for name, (_, out) in pictures.trace(case).items() if name.endswith("multi_modal_projector"))
    assert error(given, expected.reshape(given.shape)) <= FEATURES
    assert error(logits(case), pictures.hf_logits(case)) <= LOGITS
    assert error(logits(case), pictures.meta_logits(case)) <= LOGITS
    assert error(logits(case, True), logits(case)) <= LOGITS


@every_case
def test_pictures_change_what_the_model_says(case):
    """Else the parity above would compare nothing."""
    assert error(forward(case)(None), logits(case)) > 0.1
    assert error(forward(case)(np.roll(pictures.tiles(), 1, axis=2)), logits(case)) > 0.01


@every_case
def test_greedy_decoding_equals_hugging_faces(case):
    tiles = [row[: len(places)] for row, places in zip(pictures.tiles(), pictures.PLACES, strict=True)]
    replies = llama4_jax.generate(model(case), pictures.ids(case).tolist(), images=tiles, max_new_tokens=16)
    for row, reply in enumerate(replies):
        np.testing.assert_array_equal(reply, pictures.hf_greedy(case, row, 16))


@pytest.mark.parametrize("scan_layers", [False, True])
@every_case
def test_the_gradient_of_every_tensor_equals_torchs(case, scan_layers):
    graphdef, state = nnx.split(model(case, scan_layers))
    rows = ids(case)
    weights = rows[:, 1:] != PATCH

    @jax.jit
    def value_and_grad(state, tiles):
        def loss(state):
            logits = nnx.merge(graphdef, state)(rows, images=tiles)[:, :-1]
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
            return jnp.sum(nll * weights) / weights.sum()

        return jax.value_and_grad(loss)(state)

    loss, grads = value_and_grad(state, jnp.asarray(pictures.tiles()))
    expected = pictures.hf_step(case)
    assert float(loss) == pytest.approx(expected.loss, rel=1e-6)
    mine = {
        name if name.startswith(("vision_model.", "multi_modal_projector.")) else f"language_model.{name}": grad
        for name, grad in to_hf(model(case).config, ours.by_name(model(case, scan_layers), grads))
    }
    assert_gradients_equal(mine, expected.grads)


def test_pixels_are_normalized_as_the_image_processor_does():
    from llama4_jax.inputs.image import normalize

    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(jax.jit(normalized)(every), normalize(every), atol=1e-7)
    case = pictures.CASES[0]
    tiles = np.random.default_rng(0).integers(0, 256, pictures.tiles().shape, dtype=np.uint8)
    assert error(forward(case)(tiles), forward(case)(normalize(tiles))) < 1e-6


def test_tiles_on_a_mesh_give_the_same_logits():
    case = pictures.CASES[0]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2), jax.devices()[:8])
    graphdef, state = nnx.split(model(case))

    def place(path, variable):
        return variable.replace(parameter_sharding(variable.get_value().shape, variable.axes, mesh))

    shardings = jax.tree_util.tree_map_with_path(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    batch = [jnp.concatenate([x] * 4) for x in (ids(case), jnp.asarray(pictures.tiles()))]
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, shardings)
        run = jax.jit(lambda state, rows, tiles: nnx.merge(graphdef, state)(rows, images=tiles))
        got = np.asarray(run(placed, *batch))
    assert error(got[:4], np.concatenate([logits(case)] * 2)) <= LOGITS


def test_errors_name_what_does_not_fit():
    case = pictures.CASES[0]
    tiles = jnp.asarray(pictures.tiles())
    with pytest.raises(ValueError, match=r"tiles of \[24, 24, 3\], got \[25, 25, 3\]"):
        model(case)(ids(case), images=jnp.zeros((2, 1, 25, 25, 3)))
    with pytest.raises(ValueError, match=r"has 12 <\|patch\|> tokens, but the images have features for 8"):
        model(case)(ids(case), images=tiles[:, :2])
    assert np.isnan(forward(case)(pictures.tiles()[:, :2])).any()
    with pytest.raises(ValueError, match="has no vision encoder"):
        ours.model(case)(ids(case), images=tiles)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixel_shuffle_ratio": 0.3}, r"pixel_shuffle_ratio must be 1, 1/2, 1/3 … .* got 0.3"),
        ({"pixel_shuffle_ratio": 0.2}, r"divide the 4 patches"),
        ({"embed_dim": 24}, "a multiple of 4 for RoPE's pairs in two dimensions, got 6"),
        ({"image_size": 25}, "image_size .25. must be a multiple"),
    ],
)
def test_a_vision_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config(pictures.CASES[0]).vision, **fields)


def test_the_text_models_numbers_do_not_depend_on_having_an_encoder():
    case = pictures.CASES[0]
    make = jax.jit(lambda config: nnx.state(Llama4(config, seed=3)), static_argnums=0)
    with_encoder, without = (dict(nnx.to_flat_state(make(c))) for c in (config(case), ours.config(case)))
    assert {path[0] for path in with_encoder.keys() - without.keys()} == {"vision", "projector"}
    for path, variable in without.items():
        np.testing.assert_array_equal(variable[...], with_encoder[path][...])

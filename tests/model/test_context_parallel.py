"""Whole models whose sequences or caches are split over devices give what they give on one."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.model.cache import LayerCache, cached_attention, make_step
from llama4_jax.model.config import ModelConfig, VisionConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.sharding import SERVING, TRAINING, MeshConfig, Rules, make_mesh, use_rules

# A chunked layer and a global one. Rows of 32 tokens reach past chunks of 8 and several temperature buckets.
SCOUT = ModelConfig(
    vocab_size=96, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, expert_mlp_dim=16,
    num_experts=4, nope_interval=2, attention_chunk=8, temperature_floor=4, context_length=64, init_std=0.08,
)  # fmt: skip
MAVERICK = dataclasses.replace(
    SCOUT, num_experts=8, top_k=2, moe_interval=2, qk_norm=False, query_scale="ssmax_bias", attention_chunk=5
)
MODELS = {"scout": SCOUT, "maverick": MAVERICK}
MESHES = {
    "context 2": MeshConfig(data=1, context=2),
    "context 4": MeshConfig(data=1, context=4),
    "context 2, tensor 2, fsdp 2": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}
COLLECTIVE = re.compile(r"= ([^=]*?) ((?:all-|reduce-scatter|collective-|ragged-)[a-z-]*)\(")


def mesh_of(name: str):
    return make_mesh(MESHES[name], jax.devices()[: MESHES[name].named_size])


@functools.cache
def model_of(config: ModelConfig):
    return nnx.split(Llama4(config, seed=0))


def tokens_of(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 95, (batch, length), dtype=np.int32)


def packed(batch: int, length: int) -> dict[str, np.ndarray]:
    """Three documents a row and then padding."""
    segments = np.sort(np.random.default_rng(1).integers(1, 5, (batch, length))).astype(np.int32)
    positions = np.arange(length) - np.array([np.searchsorted(row, row) for row in segments])
    real = segments < 4
    return {
        "positions": np.where(real, positions, 0).astype(np.int32),
        "segment_ids": np.where(real, segments, 0).astype(np.int32),
    }


@functools.cache
def with_gradients(config: ModelConfig):
    """Compiled anew for each mesh in use: hidden states, and gradients of a weighted sum of them."""
    graphdef, _ = model_of(config)

    def run(state, tokens, places):
        weight = jax.random.normal(jax.random.key(2), (*tokens.shape, config.embed_dim))
        weight *= (places["segment_ids"] > 0)[..., None]

        def total(state):
            model = nnx.merge(graphdef, state)
            hidden, _ = model.hidden(tokens, **places)
            return (hidden * weight).sum(), (hidden * (weight != 0), model.logits(hidden[:, :4]))

        (_, out), gradients = jax.value_and_grad(total, has_aux=True)(state)
        return out, gradients

    return jax.jit(run)


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("scout", "context 4"),  # stripes of 4: the ring everywhere
        ("maverick", "context 2, tensor 2, fsdp 2"),  # stripes of 8, chunks of 5: a halo
    ],
)
def test_hidden_states_and_gradients_are_those_of_one_device(model, mesh):
    config = MODELS[model]
    _, state = model_of(config)
    tokens, places = tokens_of(2, 32), packed(2, 32)
    expected = with_gradients(config)(state, tokens, places)
    with jax.set_mesh(mesh_of(mesh)):
        got = with_gradients(config)(state, tokens, places)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 5e-6 * np.abs(b).max()


def test_pictures_stand_at_their_tokens_in_any_order_of_devices():
    vision = VisionConfig(
        embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, image_size=28, patch_size=7, adapter_dim=16, output_dim=16,
        patch_token_id=95,
    )  # fmt: skip
    graphdef, state = model_of(dataclasses.replace(SCOUT, num_layers=1, moe_interval=0, vision=vision))
    tokens = tokens_of(2, 32)
    tokens[0, [3, 9, 17, 30]] = tokens[1, 20:28] = 95
    images = np.random.default_rng(3).integers(0, 256, (2, 2, 28, 28, 3), dtype=np.uint8)
    run = jax.jit(lambda state, tokens, images: nnx.merge(graphdef, state)(tokens, images=images))
    expected = run(state, tokens, images)
    with jax.set_mesh(mesh_of("context 2")):  # stripes of 8: whole chunks
        np.testing.assert_allclose(run(state, tokens, images), expected, atol=2e-6)


def test_a_model_of_chunked_layers_moves_tokens_into_zigzag_order_and_back_and_nothing_else():
    config = dataclasses.replace(SCOUT, nope_interval=0, moe_interval=0)
    graphdef, state = model_of(config)
    whole = Rules({name: () for name in TRAINING.parameters}, TRAINING.activations)  # this is not about parameters
    with jax.set_mesh(mesh_of("context 2")), use_rules(whole):
        run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state).hidden(tokens)[0])
        text = run.lower(state, tokens_of(2, 64)).compile().as_text()
    found = COLLECTIVE.findall(text)
    assert {kind for _, kind in found} == {"collective-permute"}
    assert len(found) == 6  # an even and an odd stripe each: of tokens, positions, hidden states


# ---- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mesh", "batch"), [("context 4", 1), ("context 2, tensor 2, fsdp 2", 2)])
def test_prefill_and_decode_with_a_split_cache_are_those_without(mesh, batch):
    graphdef, state = model_of(dataclasses.replace(SCOUT, moe_interval=0))
    counts = np.array([11, 9], np.int32)[:batch]  # in a piece of 11, more than one pass of decoding takes
    sizes = 11, 1, 1
    tokens = tokens_of(batch, sum(sizes))

    def run(state, tokens):
        model = nnx.merge(graphdef, state).unscanned()
        cache, hidden, at = model.empty_cache(batch, 24), [], 0
        for size in sizes:
            new = tokens[:, at : at + size]
            out, cache = model.step(new, cache, jnp.asarray(counts) if at == 0 else None)
            hidden, at = [*hidden, out], at + size
        return hidden, cache

    expected, whole = jax.jit(run)(state, tokens)
    with jax.set_mesh(mesh_of(mesh)), use_rules(SERVING):
        got, cache = jax.jit(lambda *args: run(*args))(state, tokens)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        real = np.arange(sizes[i]) < (counts if i == 0 else np.full(batch, sizes[i]))[:, None]
        np.testing.assert_allclose(a[real], b[real], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, whole.lengths)
    ways = MESHES[mesh].context
    for layer, other, slots in zip(cache.layers, whole.layers, (8, 24 // ways), strict=True):
        assert layer.k.sharding.shard_shape(layer.k.shape)[2] == slots  # a chunk is whole, the context split
        np.testing.assert_allclose(layer.k, other.k, atol=1e-5)
        np.testing.assert_allclose(layer.v, other.v, atol=1e-5)


@pytest.mark.parametrize("new", [1, 12])
@pytest.mark.parametrize("chunk", [None, 16])
def test_no_cache_moves(new, chunk):
    """Of a cache over context only sums of the new tokens do; of a chunk's nothing."""
    batch, heads, kv_heads, slots, dim = 4, 4, 2, 16 if chunk else 256, 8
    q, kv, cached = (batch, heads, new, dim), (batch, kv_heads, new, dim), (batch, kv_heads, slots, dim)
    placed = jax.P("fsdp", "tensor", None if chunk else "context")

    def f(q, k, v, cache, lengths):
        step = make_step(lengths, jnp.full((batch,), new), new)
        return cached_attention(q, k, v, cache, step, chunk=chunk, scale=0.5)

    mesh = mesh_of("context 2, tensor 2, fsdp 2")
    with jax.set_mesh(mesh), use_rules(SERVING):

        def argument(shape, spec, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

        tokens = jax.P("fsdp", "tensor")
        cache = LayerCache(argument(cached, placed), argument(cached, placed))
        arguments = *(argument(s, tokens) for s in (q, kv, kv)), cache, argument((batch,), jax.P("fsdp"), jnp.int32)
        text = jax.jit(f).lower(*arguments).compile().as_text()
    found = COLLECTIVE.findall(text)
    if chunk:
        assert found == []
        return
    assert {kind for _, kind in found} == {"all-reduce"}
    sizes = [np.prod([int(n) for n in s.split(",")]) for shape, _ in found for s in re.findall(r"\[([\d,]+)\]", shape)]
    assert max(sizes) == batch // 2 * heads // 2 * new * dim  # the output of a device's rows and heads

"""Attention on meshes: the same as on one device, balanced, and what moves between devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.ops import flash_attention as flash_module
from llama4_jax.ops.attention import attention
from llama4_jax.ops.attention_reference import first_visible
from llama4_jax.ops.flash_attention import Keys, Queries, plan_blocks
from llama4_jax.ops.mesh_attention import self_attention
from llama4_jax.ops.order import Order
from llama4_jax.ops.ring_attention import ring_attention
from llama4_jax.ops.zigzag import can_zigzag, from_zigzag, to_zigzag
from llama4_jax.sharding import MeshConfig, activation_sharding, make_mesh

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.5
MESHES = {
    "context 2": MeshConfig(data=1, context=2),
    "context 4": MeshConfig(data=1, context=4),
    "context 8": MeshConfig(data=1, context=8),
    "context 2, tensor 2, fsdp 2": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}
Q_NAMES, KV_NAMES = ("batch", "q_heads", "seq", "head_dim"), ("batch", "kv_heads", "seq", "head_dim")
COLLECTIVE = re.compile(r"= ([^=]*?) ((?:all-|reduce-scatter|collective-|ragged-)[a-z-]*)\(")


@pytest.fixture(autouse=True)
def exact_halo(monkeypatch):
    """chunk - 1 tokens and none more, as the rounding for TPUs would have of such small chunks."""
    monkeypatch.setattr("llama4_jax.ops.mesh_attention.HALO_MULTIPLE", 1)


def mesh_of(name: str):
    return make_mesh(MESHES[name], jax.devices()[: MESHES[name].named_size])


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def rows(length: int, packed: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions and segments of two rows; packed ones hold documents of random lengths, then padding."""
    positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    if not packed:
        return positions, None
    segments = np.sort(np.random.default_rng(length).integers(0, 4, (2, length))).astype(np.int32)
    positions = positions - np.array([np.searchsorted(row, row) for row in segments])
    return np.where(segments == 3, -1, positions).astype(np.int32), segments


def along_sequence(move, x):
    """`move` for an array [B, heads, T, H]."""
    return move(x.swapaxes(1, 2)).swapaxes(1, 2)


def of_rows(q, k, v, positions, segments, *, chunk, order):
    """Attention as the model computes it: in zigzag order where the mesh allows it, and back."""
    if not can_zigzag(q.shape[2]):
        at = {"positions": positions, "segments": segments, "order": order}
        return self_attention(q, k, v, **at, chunk=chunk, scale=SCALE)
    q, k, v = (along_sequence(to_zigzag, x) for x in (q, k, v))
    at = {"positions": to_zigzag(positions), "segments": None if segments is None else to_zigzag(segments)}
    order = Order(order.contiguous, order.aligned, zigzag=True)
    return along_sequence(from_zigzag, self_attention(q, k, v, **at, chunk=chunk, scale=SCALE, order=order))


def on_one_device(q, k, v, positions, segments, *, chunk):
    at = {"q_positions": positions, "k_positions": positions, "q_segments": segments, "k_segments": segments}
    return attention(q, k, v, **at, chunk=chunk, scale=SCALE, implementation="reference")


@functools.cache
def with_gradients(f, **keywords):
    """Compiled anew for each mesh in use."""

    def run(q, k, v, cotangent, positions, segments):
        out, vjp = jax.vjp(lambda *qkv: f(*qkv, positions, segments, **keywords), q, k, v)
        return out, *vjp(cotangent)

    return jax.jit(run)


def tensors(batch: int, length: int, heads=HEADS, kv_heads=KV_HEADS):
    return [normal(batch, h, length, DIM, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads, heads))]


def assert_equal(got, expected, tolerance=1e-6):
    for what, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert np.abs(a - b).max() < tolerance * np.abs(b).max(), what


# ---- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "length", "chunk", "packed"),
    [
        ("context 8", 64, None, True),
        ("context 2, tensor 2, fsdp 2", 64, None, True),
        ("context 4", 36, None, True),  # no 8 equal stripes: runs of 9 in order
        ("context 2", 31, None, True),  # nothing divides it: whole on each device
        ("context 8", 64, 4, False),  # stripes of 4 are chunks
        ("context 4", 64, 6, True),  # stripes of 8 are longer than what a chunk may see of the past
        ("context 4", 64, 9, True),  # as long
        ("context 4", 36, 8, False),  # runs of 9 tokens in order: not whole chunks, though rows are single documents
        ("context 4", 64, 24, True),  # a chunk of three stripes: the ring
        ("context 2, tensor 2, fsdp 2", 64, 6, True),
        ("data 2, fsdp 2, tensor 2", 33, 6, True),
    ],
)
def test_on_a_mesh_attention_and_its_gradients_are_those_of_one_device(mesh, length, chunk, packed):
    batch = 4 if mesh.startswith("data") else 2
    positions, segments = (None if x is None else np.tile(x, (batch // 2, 1)) for x in rows(length, packed))
    arrays = *tensors(batch, length), jnp.asarray(positions), segments
    expected = with_gradients(on_one_device, chunk=chunk)(*arrays)
    with jax.set_mesh(mesh_of(mesh)):
        got = with_gradients(of_rows, chunk=chunk, order=Order(contiguous=True, aligned=not packed))(*arrays)
    assert_equal(got, expected)


@given(st.integers(0, 2**32), st.sampled_from([None, 5]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_ring_is_attention_for_tokens_in_any_order(seed, chunk, few_documents):
    rng = np.random.default_rng(seed)
    positions = rng.integers(-2, 20, (2, 16)).astype(np.int32)
    segments = rng.integers(0, 2 if few_documents else 6, (2, 16)).astype(np.int32)
    arrays = *(normal(2, h, 16, DIM, seed=seed) for h in (2, 1, 1, 2)), jnp.asarray(positions), segments
    expected = with_gradients(on_one_device, chunk=chunk)(*arrays)
    with jax.set_mesh(mesh_of("context 4")):
        got = with_gradients(of_rows, chunk=chunk, order=Order())(*arrays)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_kv_heads_that_the_mesh_does_not_divide_stay_with_their_query_heads():
    positions, _ = rows(16, False)
    arrays = *tensors(2, 16, heads=6, kv_heads=3), jnp.asarray(positions), None
    expected = with_gradients(on_one_device, chunk=None)(*arrays)
    with jax.set_mesh(mesh_of("context 2, tensor 2, fsdp 2")):
        got = with_gradients(of_rows, chunk=None, order=Order(True))(*arrays)
    assert_equal(got, expected)


def test_bfloat16_partial_sums_are_float32():
    """On eight devices an output is as close to the exact one as on one."""
    positions, _ = rows(64, False)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in tensors(2, 64)]
    exact = with_gradients(on_one_device, chunk=None)(*(x.astype(jnp.float32) for x in arrays), positions, None)
    with jax.set_mesh(mesh_of("context 8")):
        got = with_gradients(of_rows, chunk=None, order=Order(True))(*arrays, jnp.asarray(positions), None)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    assert_equal([np.asarray(x, np.float32) for x in got], exact, 1e-2)  # 2^-9 a rounding


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_zigzag_gives_each_device_an_early_and_a_late_stripe_and_back(devices):
    mesh = make_mesh(MeshConfig(data=1, context=devices), jax.devices()[:devices])
    x = np.arange(2 * 4 * devices).reshape(2, 4 * devices)
    with jax.set_mesh(mesh):
        there = jax.jit(to_zigzag)(x)
        back = jax.jit(from_zigzag)(there)
    np.testing.assert_array_equal(back, x)
    for d, shard in enumerate(sorted(there.addressable_shards, key=lambda s: s.index[1].start)):
        stripes = 2 * d, 2 * (2 * devices - 1 - d)
        expected = np.concatenate([np.arange(s, s + 2) for s in stripes])
        np.testing.assert_array_equal(shard.data[0], expected)


# ---- work ----------------------------------------------------------------------------------------------------------


def planned(devices: int, order: list[np.ndarray], stripe: int) -> np.ndarray:
    """Blocks of scores that each device computes in each step of the ring, one block a stripe."""
    blocks = np.zeros((devices, devices), int)
    for d in range(devices):
        for step in range(devices):
            at, keys_at = (jnp.asarray(order[i], jnp.int32)[None] for i in (d, (d - step) % devices))
            queries = Queries(first_visible(at, None), at, jnp.zeros_like(at))
            blocks[d, step] = plan_blocks(queries, Keys(keys_at, jnp.zeros_like(keys_at)), stripe, stripe)[2].sum()
    return blocks


def test_in_zigzag_order_all_devices_compute_as_much_at_every_step():
    devices, stripe = 4, 4
    stripes = np.arange(2 * devices * stripe).reshape(2 * devices, stripe)
    zigzag = [np.concatenate([stripes[d], stripes[2 * devices - 1 - d]]) for d in range(devices)]
    blocks = planned(devices, zigzag, stripe)
    np.testing.assert_array_equal(blocks[:, 0], 3)  # own stripes: two diagonals and one whole
    np.testing.assert_array_equal(blocks[:, 1:], 2)  # of four: half, at each step on each device
    in_order = planned(devices, list(stripes.reshape(devices, 2 * stripe)), stripe)
    assert in_order.sum() == blocks.sum()
    assert in_order.sum(1).max() == 15  # the last device, 9 with zigzag


def test_the_ring_computes_visible_blocks_only(monkeypatch):
    computed = []

    def counted(*args, scores=flash_module._scores):
        jax.debug.callback(lambda: computed.append(1))
        return scores(*args)

    monkeypatch.setattr(flash_module, "_scores", counted)
    positions, _ = rows(32, False)
    arrays = *tensors(2, 32), jnp.asarray(positions), None

    def f(*args, **how):  # not one that was compiled before
        return of_rows(*args, **how)

    with jax.set_mesh(mesh_of("context 4")):
        jax.block_until_ready(with_gradients(f, chunk=None, order=Order(True))(*arrays))
    jax.effects_barrier()
    assert len(computed) == 2 * 8 * 9 // 2  # 8 stripes, a triangle; forward and backward


def test_the_ring_saves_what_one_device_saves():
    """Its own q, k, v, output and log-sum-exp, whatever goes round."""
    positions, _ = rows(32, False)
    q, k, v, _ = (jnp.asarray(x) for x in tensors(2, 32))

    def saved(q, k, v):
        at = {"positions": jnp.asarray(positions), "scale": SCALE, "order": Order(True)}
        return jax.vjp(lambda *qkv: self_attention(*qkv, **at), q, k, v)[1]

    with jax.set_mesh(mesh_of("context 4")):
        leaves = jax.tree.leaves(jax.eval_shape(saved, q, k, v))
    floats = [x for x in leaves if x.ndim > 2 and jnp.issubdtype(x.dtype, jnp.floating)]
    assert sum(x.size for x in floats) == 2 * q.size + k.size + v.size + q.size // DIM


# ---- what moves ----------------------------------------------------------------------------------------------------


def collectives(mesh: str, length: int, *, chunk, order: Order, packed=False, batch=4, kv_heads=KV_HEADS):
    """(kind, shapes) of each in the compiled forward and backward pass of attention alone, without zigzag's own."""
    names = (Q_NAMES, KV_NAMES, KV_NAMES, Q_NAMES, ("batch", "seq"), ("batch", "seq"))
    shapes = [(batch, h, length, DIM) for h in (HEADS, kv_heads, kv_heads, HEADS)] + [(batch, length)] * 2
    dtypes = [jnp.float32] * 4 + [jnp.int32] * 2

    def f(q, k, v, positions, segments, **how):
        segments = segments if packed else None
        return self_attention(q, k, v, positions=positions, segments=segments, scale=SCALE, **how)

    with jax.set_mesh(mesh_of(mesh)):
        shardings = [activation_sharding(n, mesh_of(mesh)) for n in names]
        arguments = [jax.ShapeDtypeStruct(s, d, sharding=p) for s, d, p in zip(shapes, dtypes, shardings, strict=True)]
        text = with_gradients(f, chunk=chunk, order=order).lower(*arguments).compile().as_text()
    return [(kind, shape) for shape, kind in COLLECTIVE.findall(text)]


@pytest.mark.parametrize("chunk", [None, 6])
def test_where_the_sequence_is_whole_attention_moves_nothing(chunk):
    assert collectives("data 2, fsdp 2, tensor 2", 40, chunk=chunk, order=Order(True), packed=True) == []


@pytest.mark.parametrize("zigzag", [False, True])
def test_whole_chunks_move_nothing(zigzag):
    order = Order(contiguous=True, aligned=True, zigzag=zigzag)
    assert collectives("context 2, tensor 2, fsdp 2", 64, chunk=8, order=order) == []


def test_the_ring_passes_keys_and_values_on_and_gathers_nothing():
    found = collectives("context 2, tensor 2, fsdp 2", 64, chunk=None, order=Order(True, zigzag=True), packed=True)
    assert found and {kind for kind, _ in found} <= {"collective-permute", "collective-permute-start"}
    sizes = {tuple(map(int, s.split(","))) for _, shape in found for s in re.findall(r"\[([\d,]+)\]", shape)}
    assert max(np.prod(s) for s in sizes) == 2 * 1 * 32 * DIM  # a device's rows, kv heads and tokens, never more


@pytest.mark.parametrize("zigzag", [False, True])
def test_chunks_that_begin_anywhere_fetch_less_than_a_chunk(zigzag):
    order = Order(contiguous=True, zigzag=zigzag)
    found = collectives("context 2, tensor 2, fsdp 2", 128, chunk=9, order=order, packed=True)
    assert found and {kind for kind, _ in found} <= {"collective-permute", "collective-permute-start"}
    sizes = {tuple(map(int, s.split(","))) for _, shape in found for s in re.findall(r"\[([\d,]+)\]", shape)}
    assert max(np.prod(s) for s in sizes) == 2 * 1 * 8 * DIM  # 8 of the 32 or 64 tokens of a stripe


def test_ring_attention_alone_takes_any_mesh_axes():
    """A sequence over two axes at once: `axes` is what the rules say, whatever that is."""
    mesh = mesh_of("context 2, tensor 2, fsdp 2")
    positions, segments = rows(32, True)
    arrays = *tensors(2, 32), jnp.asarray(positions), segments
    spec, by_row = (jax.P(None, None, ("fsdp", "context"), None), jax.P(None, ("fsdp", "context")))

    def split(q, k, v, positions, segments):
        def local(q, k, v, positions, segments):
            how = {"chunk": None, "scale": SCALE, "axes": ("fsdp", "context"), "size": 4}
            return ring_attention(q, k, v, positions=positions, segments=segments, **how)

        in_specs = (spec, spec, spec, by_row, by_row)
        return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, v, positions, segments)

    expected = with_gradients(on_one_device, chunk=None)(*arrays)
    with jax.set_mesh(mesh):
        assert_equal(with_gradients(split)(*arrays), expected)

"""The kernels of TPUs and GPUs, as far as a CPU can run them, and compiled for real TPUs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from topologies import chips

from llama4_jax.ops import attention as attention_module
from llama4_jax.ops import splash_attention as splash_module
from llama4_jax.ops.attention import attention
from llama4_jax.ops.attention_reference import attention_reference
from llama4_jax.ops.cudnn_attention import cudnn_attention
from llama4_jax.ops.cudnn_attention import obstacle as cudnn_obstacle
from llama4_jax.ops.mesh_attention import self_attention
from llama4_jax.ops.order import Order
from llama4_jax.ops.splash_attention import obstacle as splash_obstacle
from llama4_jax.ops.splash_attention import refined_segments, splash_attention
from llama4_jax.sharding import MeshConfig, activation_sharding, make_mesh

CONTIGUOUS, ALIGNED = Order(contiguous=True), Order(contiguous=True, aligned=True)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def tensors(batch, heads, kv_heads, queries, keys, dim, dtype=jnp.float32):
    shapes = (heads, queries), (kv_heads, keys), (kv_heads, keys), (heads, queries)
    return [normal(batch, h, t, dim, seed=i, dtype=dtype) for i, (h, t) in enumerate(shapes)]


def documents(*lengths: int, start: int = 0, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of a row; the first document begins at position `start`."""
    positions = [np.arange(n) for n in lengths]
    positions[0] = positions[0] + start
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions, segments = np.concatenate(positions), np.pad(segments, (0, padding))
    return np.pad(positions, (0, padding), constant_values=-1).astype(np.int32), segments.astype(np.int32)


def with_gradients(f, q, k, v, cotangent):
    out, vjp = jax.vjp(f, q, k, v)
    return out, *vjp(cotangent)


def assert_equal(got, expected, tolerance):
    for what, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() < tolerance * np.abs(b).max(), what


# ---- the meaning, emulated -----------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """So that small arrays have several, and either backward pass."""

    def set_fused(fused: bool):
        for name in ("BLOCK_Q", "BLOCK_K", "BLOCK_K_COMPUTE"):
            monkeypatch.setattr(splash_module, name, 128)
        monkeypatch.setattr(splash_module, "FUSED_BLOCKS", 8 if fused else 0)

    splash_module._kernel.cache_clear()
    yield set_fused
    splash_module._kernel.cache_clear()


@pytest.mark.parametrize(
    ("rows", "queries", "chunk", "dtype", "fused"),
    [
        ([documents(256), documents(200, padding=56)], 256, None, jnp.float32, True),
        ([documents(100, 60, 96), documents(7, 240, padding=9)], 256, 50, jnp.float32, False),
        ([documents(30, 98, 256), documents(384, start=77)], 256, 100, jnp.float32, True),  # a halo before the queries
        ([documents(100, 60, 96), documents(7, 240, padding=9)], 256, None, jnp.bfloat16, False),
    ],
    ids=["causal", "packed and chunked", "after a halo", "bfloat16"],
)
def test_splash_is_attention_for_documents_one_after_another(small_blocks, rows, queries, chunk, dtype, fused):
    small_blocks(fused)
    positions, segments = (jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True))
    arrays = tensors(len(rows), 4, 2, queries, positions.shape[1], 16, dtype)
    at = {"q_positions": positions[:, -queries:], "k_positions": positions, "chunk": chunk, "scale": 0.3}
    at |= {"q_segments": segments[:, -queries:], "k_segments": segments}
    got = jax.jit(partial(with_gradients, partial(splash_attention, **at, interpret=True)))(*arrays)
    exact = [x.astype(jnp.float32) for x in arrays]
    expected = jax.jit(partial(with_gradients, partial(attention_reference, **at)))(*exact)
    assert all(x.dtype == dtype for x in got)
    assert_equal(got, expected, 2e-6 if dtype == jnp.float32 else 2e-2)
    out, dq, dk, dv = got
    padding = np.asarray(positions) < 0
    for x, where in ((out, padding[:, -queries:]), (dq, padding[:, -queries:]), (dk, padding), (dv, padding)):
        assert not np.asarray(x, np.float32).swapaxes(1, 2)[where].any()


def test_a_run_that_may_see_itself_ends_with_its_document_its_chunk_and_at_padding():
    positions, segments = documents(3, 5, start=6, padding=2)
    runs = refined_segments(jnp.asarray(positions)[None], jnp.asarray(segments)[None], 4)
    np.testing.assert_array_equal(runs[0], [0, 0, 1, 2, 2, 2, 2, 3, 4, 4])  # 6 7 | 8 || 0 1 2 3 | 4 || padding
    runs = refined_segments(jnp.asarray(positions)[None], None, None)
    np.testing.assert_array_equal(runs[0], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize("chunk", [None, 16, 100])
def test_chunks_of_a_document_as_rows_of_their_own_are_attention(chunk):
    length = 64
    positions = jnp.tile(jnp.arange(length), (2, 1))
    at = {"q_positions": positions, "k_positions": positions, "q_segments": None, "k_segments": None}
    at |= {"chunk": chunk, "scale": 0.3}
    arrays = tensors(2, 4, 2, length, length, 8)
    got = jax.jit(partial(with_gradients, partial(cudnn_attention, **at, kernel="xla")))(*arrays)
    assert_equal(got, jax.jit(partial(with_gradients, partial(attention_reference, **at)))(*arrays), 2e-6)


# ---- which serves what ---------------------------------------------------------------------------------------------


@pytest.fixture
def compiling_for(monkeypatch):
    def set_platform(name: str):
        for module in ("splash_attention", "cudnn_attention"):
            monkeypatch.setattr(f"llama4_jax.ops.{module}.platform", lambda: name)

    return set_platform


def shapes(queries=256, keys=256, dim=128, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((1, h, t, dim), dtype) for h, t in ((4, queries), (2, keys), (2, keys))]


@pytest.mark.parametrize(
    ("change", "order", "message"),
    [
        ({}, Order(), "documents stand one after another, which `order` does not promise"),
        ({"queries": 192}, CONTIGUOUS, "multiples of 128, got 192 and 256"),
        ({"keys": 128}, CONTIGUOUS, "multiples of 128, got 256 and 128"),
        ({"dtype": jnp.float16}, CONTIGUOUS, "float32 or bfloat16"),
    ],
)
def test_what_splash_cannot_serve_it_says(compiling_for, change, order, message):
    compiling_for("tpu")
    assert splash_obstacle(*shapes(), None, None, CONTIGUOUS) is None
    assert message in splash_obstacle(*shapes(**change), None, None, order)


@pytest.mark.parametrize(
    ("change", "segments", "chunk", "order", "message"),
    [
        ({}, None, None, CONTIGUOUS, "one document each"),
        ({}, "some", None, ALIGNED, "one document each"),
        ({"keys": 512}, None, None, ALIGNED, "one document each"),
        ({}, None, 100, ALIGNED, "a row has 256 tokens, which is no multiple of 100"),
        ({"dtype": jnp.float32}, None, None, ALIGNED, "it needs bfloat16"),
        ({"dim": 132}, None, None, ALIGNED, "got 132"),
    ],
)
def test_what_cudnn_cannot_serve_it_says(compiling_for, change, segments, chunk, order, message):
    compiling_for("gpu")
    assert cudnn_obstacle(*shapes(), None, 64, ALIGNED) is None
    segments = segments and jnp.zeros((1, 256), jnp.int32)
    assert message in cudnn_obstacle(*shapes(**change), segments, chunk, order)


@pytest.mark.parametrize(
    ("platform", "order", "queries", "expected"),
    [
        ("tpu", CONTIGUOUS, 256, "splash"),
        ("tpu", Order(), 256, "flash"),
        ("tpu", CONTIGUOUS, 1, "decode"),
        ("gpu", ALIGNED, 256, "cudnn"),
        ("gpu", CONTIGUOUS, 256, "flash"),
        ("cpu", ALIGNED, 256, "flash"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform_where_it_can_serve(compiling_for, platform, order, queries, expected):
    compiling_for(platform)
    assert attention_module._choose(*shapes(queries), None, None, order) == expected


# ---- compiled for TPUs ---------------------------------------------------------------------------------------------


def compiled_for(devices, mesh: MeshConfig, *, chunk, order=CONTIGUOUS, dtype=jnp.bfloat16, length=8192, batch=4):
    """Forward and backward pass of 5 query heads to a key/value head, for each device of a slice of four."""
    mesh = make_mesh(mesh, devices)
    heads = mesh.shape["tensor"]
    names = [("batch", h, "seq", None) for h in ("q_heads", "kv_heads", "kv_heads", "q_heads")] + [("batch", "seq")] * 2
    sizes = [(batch, n * heads, length, 128) for n in (5, 1, 1, 5)] + [(batch, length)] * 2
    arguments = [
        jax.ShapeDtypeStruct(size, jnp.int32 if len(size) == 2 else dtype, sharding=activation_sharding(axes, mesh))
        for size, axes in zip(sizes, names, strict=True)
    ]

    def run(q, k, v, cotangent, positions, segments):
        at = {"positions": positions, "segments": segments, "scale": 128**-0.5, "chunk": chunk, "order": order}
        return with_gradients(partial(self_attention, **at), q, k, v, cotangent)

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*arguments).compile()


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_kernel_compiles_for_every_tpu(name):
    """8192 tokens a device, chunks of 2048: the model's shapes."""
    devices = chips(name)
    compiled = compiled_for(devices, MeshConfig(data=len(devices)), chunk=2048, batch=len(devices))
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 2 and "all-" not in text and "collective-permute" not in text
    q = 5 * 8192 * 128 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * q  # dq of eight blocks of keys, and small things


@pytest.mark.parametrize(("chunk", "dtype"), [(None, jnp.bfloat16), (8192, jnp.float32)])
def test_global_layers_and_float32_compile_too(chunk, dtype):
    compiled = compiled_for(chips("v5e:2x2"), MeshConfig(data=2, tensor=2), chunk=chunk, dtype=dtype, length=4096)
    assert re.findall("tpu_custom_call", compiled.as_text())


def test_chunks_of_a_split_sequence_use_the_kernel_too_and_global_layers_the_ring():
    devices, mesh = chips("v5e:2x2"), MeshConfig(data=2, context=2)
    text = compiled_for(devices, mesh, chunk=1024, length=8192, order=Order(True, zigzag=True)).as_text()
    assert "tpu_custom_call" in text and "collective-permute" in text
    aligned = Order(True, aligned=True, zigzag=True)
    text = compiled_for(devices, mesh, chunk=1024, length=8192, order=aligned).as_text()
    assert "tpu_custom_call" in text and "collective-permute" not in text


def test_a_named_kernel_on_another_platform_is_refused():
    positions = jnp.arange(128)[None]
    q, k, v, _ = tensors(1, 2, 1, 128, 128, 8)
    at = {"q_positions": positions, "k_positions": positions, "scale": 1.0, "order": ALIGNED}
    with pytest.raises(ValueError, match="'splash' cannot serve this: it runs on TPUs, and this program is .* a cpu"):
        attention(q, k, v, **at, implementation="splash")

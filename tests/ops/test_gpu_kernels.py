"""What the compiler makes for Hopper GPUs that are not there. Numbers can be checked on a GPU only."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from llama4_jax.ops.dot_general import linear
from llama4_jax.ops.experts import ExpertWeights, experts
from llama4_jax.ops.grouped_matmul import grouped_matmul
from llama4_jax.sharding import MeshConfig, make_mesh

# What the compiler asks of a device. Sizes of an H100 SXM, as its driver reports them.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  runtime_version: "12.9.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture
def h100s(monkeypatch):
    """Eight of them."""
    name = next((n for n in ("xla_cuda12", "xla_cuda13") if _is_installed(f"jax_plugins.{n}")), None)
    if name is None:
        pytest.skip("the GPU compiler is not installed: pip install -e '.[gpu-compiler]'")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if "cuda" not in jax._src.xla_bridge._backend_factories:
        importlib.import_module(f"jax_plugins.{name}").initialize()
    devices = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x8").devices

    class Device:  # the kernel asks JAX's first device how many multiprocessors it has
        core_count = 132

    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
    return list(devices)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_on_a_hopper_gpu_all_three_products_are_kernels_that_compute_no_other_experts(h100s):
    experts, rows, dim, width = 16, 4096, 1024, 1024

    def all_three(x, w, g, sizes):
        value, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="mosaic_gpu"), x, w)
        return value, *pull(g)

    shapes = [(rows, dim), (experts, dim, width), (rows, width)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    with jax.set_mesh(make_mesh(MeshConfig(data=1), h100s[:1])):
        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        compiled = jax.jit(all_three).trace(*arguments, sizes).lower(lowering_platforms=("cuda",)).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3
    assert " dot(" not in text and "cublas" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * 2 * width * 2


# Without a GPU nothing can be tuned; and cuBLAS is what takes 8-bit floats with scales by name.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@pytest.mark.parametrize("matmul", ["fp8", "fp8_row"])
def test_on_hopper_gpus_all_three_products_are_of_8_bit_floats_and_so_are_the_weights_that_travel(h100s, matmul):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), h100s)

    def all_three(x, w, g):
        y, pull = jax.vjp(lambda x, w: linear(x, w, ("embed", "mlp"), 1, matmul), x, w)
        return y, *pull(g)

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    x, g = array((8, 512, 1024), jnp.bfloat16, "fsdp"), array((8, 512, 2048), jnp.bfloat16, "fsdp")
    w = array((1024, 2048), jnp.float32, "fsdp")
    with jax.set_mesh(mesh):
        lowered = jax.jit(all_three).trace(x, w, g).lower(lowering_platforms=("cuda",))
        text = lowered.compile(compiler_options=OPTIONS).as_text()
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 3
    assert '__cublas$lt$matmul"' not in text and "__cublas$gemm" not in text and " dot(" not in text
    gathers = re.findall(r"(\w+)\[[\d,]*\]\S* all-gather(?:-start)?\(", text) + re.findall(
        r"= \(\w+\[[\d,]*\]\S*, (\w+)\[[\d,]*\]\S*\) all-gather-start\(", text
    )
    assert gathers and set(gathers) <= {"f8e4m3fn", "u8", "s8"}, gathers


def test_on_hopper_gpus_experts_multiply_8_bit_floats(h100s):
    def all_three(x, expert, gate, weights):
        return jax.grad(lambda x, w: experts(x, expert, gate, w, matmul="fp8").astype(jnp.float32).sum(), (0, 1))(
            x, weights
        )

    array = jax.ShapeDtypeStruct
    weights = ExpertWeights(array((4, 2, 256, 512), jnp.float32), array((4, 512, 256), jnp.float32))
    x, choice = array((2, 512, 256), jnp.bfloat16), (2, 512, 1)
    with jax.set_mesh(make_mesh(MeshConfig(data=1), h100s[:1])):
        traced = jax.jit(all_three).trace(x, array(choice, jnp.int32), array(choice, jnp.float32), weights)
        text = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=OPTIONS).as_text()
    assert "__cublas$lt$matmul$f8" in text
    assert '__cublas$lt$matmul"' not in text and "__cublas$gemm" not in text


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")
def test_on_a_gpu_the_kernel_gives_the_numbers_of_the_reference():
    draw = np.random.default_rng(0)
    x, w, g = (jnp.asarray(draw.normal(size=s), jnp.bfloat16) for s in [(300, 128), (4, 128, 256), (300, 256)])
    sizes = jnp.array([120, 0, 33, 140])

    def all_three(implementation):
        value, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return value, *pull(g)

    for mine, theirs in zip(all_three("mosaic_gpu"), all_three("reference"), strict=True):
        mine, theirs = (np.asarray(a, np.float32) for a in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2**-7 * np.abs(theirs).max())

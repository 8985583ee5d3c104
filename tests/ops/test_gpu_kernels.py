"""The kernel for Hopper GPUs, compiled for an H100 that is not there. Its numbers can be checked on a GPU only."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from llama4_jax.ops.grouped_matmul import grouped_matmul
from sharding import MeshConfig, make_mesh

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
def h100(monkeypatch):
    """A mesh of one."""
    name = next((n for n in ("xla_cuda12", "xla_cuda13") if _is_installed(f"jax_plugins.{n}")), None)
    if name is None:
        pytest.skip("the GPU compiler is not installed: pip install -e '.[gpu-compiler]'")
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if "cuda" not in jax._src.xla_bridge._backend_factories:
        importlib.import_module(f"jax_plugins.{name}").initialize()
    (device,) = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices

    class Device:  # the kernel asks JAX's first device how many multiprocessors it has
        core_count = 132

    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
    return make_mesh(MeshConfig(data=1), [device])


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_on_a_hopper_gpu_all_three_products_are_kernels_that_compute_no_other_experts(h100):
    experts, rows, dim, width = 16, 4096, 1024, 1024

    def all_three(x, w, g, sizes):
        value, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="mosaic_gpu"), x, w)
        return value, *pull(g)

    shapes = [(rows, dim), (experts, dim, width), (rows, width)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    with jax.set_mesh(h100):
        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        compiled = jax.jit(all_three).trace(*arguments, sizes).lower(lowering_platforms=("cuda",)).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 3
    assert " dot(" not in text and "cublas" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * 2 * width * 2


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

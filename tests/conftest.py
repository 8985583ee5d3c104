"""Eight virtual CPU devices for every test, so that each mesh can be tested on any machine."""

import os
import pathlib

# Tests compile hundreds of tiny programs once: most of their time is the compiler, which this cuts to a third. The
# processes that tests start inherit it. `xla_cpu_disable_new_fusion_emitters` is known to jax 0.10 and 0.11 alike.
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    quick = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true --xla_cpu_parallel_codegen_split_count=4 "
    )
    os.environ["XLA_FLAGS"] = quick + os.environ.get("XLA_FLAGS", "")

import jax
import pytest
from buckets import Bucket
from etils import epath
from etils.epath import backend

# On another platform some tests say more: JAX_PLATFORMS=cuda pytest tests/ops/test_gpu_kernels.py
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)

# Subprocess tests start the command line as a user would; keep their thread pools from fighting for four cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def each_program_is_compiled_once():
    """Also in later runs of the tests, and in the processes that they start: most of the time is the compiler's."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    from llama4_jax.compilation_cache import cpu_kind  # not at the top: jaxtyping wants to see the package imported

    directory = pathlib.Path.home() / ".cache" / "llama4_jax" / f"tests-{cpu_kind()}"
    options = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True, scope="module")
def programs_do_not_pile_up():
    """Those of a file are of no use to the next, and those of all files take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def bucket(monkeypatch):
    """A folder of an empty one."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    google = Bucket()
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: google)
    return epath.Path("gs://bucket/folder")

"""What was compiled once is found by the next start: JAX's persistent compilation cache, on for every command.

Entries are keyed by the program, the compiler and its options, so a cached program is the one that would be compiled,
and a run resumes with the same numbers. What the key leaves out is the CPU: code compiled for one with AVX-512 would
be loaded on one without. So each kind of CPU has a directory of its own, for homes that machines share.

JAX_COMPILATION_CACHE_DIR names another directory, and an empty one turns the cache off.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Use the cache, unless the user has said where it is, or that there is none."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        home = Path.home()
    except RuntimeError:  # a user without one
        return
    jax.config.update("jax_compilation_cache_dir", str(home / ".cache" / "llama4_jax" / cpu_kind()))


def cpu_kind() -> str:
    """Equal for two machines whose CPUs can do the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "".join(lines[:1]))
    return f"{platform.machine()}-{hashlib.blake2b(features.encode(), digest_size=6).hexdigest()}"

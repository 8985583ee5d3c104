"""Real TPUs that are not there: their compiler comes with libtpu."""

import functools
import os

import jax
import pytest
from jax.experimental import topologies

from sharding import MeshConfig, make_mesh

SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# So that libtpu neither looks for a TPU nor minds another process that has loaded it.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def tpu(topology: str, config: MeshConfig | None = None) -> jax.sharding.Mesh:
    """A mesh of a topology's chips, such as "v5p:2x2x1", or of one chip of "v5p"."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")
    devices = _devices(SMALLEST.get(topology, topology))
    return make_mesh(MeshConfig(data=1), list(devices[:1])) if config is None else make_mesh(config, list(devices))


@functools.cache
def _devices(name: str) -> tuple:
    os.environ.update(QUIET)
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)

"""Real TPUs that are not there: their compiler comes with libtpu."""

import functools
import os

import jax
import pytest
from jax.experimental import topologies

from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.sharding.plan import QUIET

SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def chips(topology: str, **more) -> list:
    """The devices of a slice. Skips where libtpu, which knows and compiles for them, is not installed."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")
    return list(_chips(topology, **more))


@functools.cache
def _chips(topology: str, **more) -> tuple:
    os.environ.update(QUIET)
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)


def one_chip(kind: str) -> jax.sharding.Mesh:
    """A mesh of a single "v5p"."""
    return make_mesh(MeshConfig(data=1), chips(SMALLEST[kind])[:1])

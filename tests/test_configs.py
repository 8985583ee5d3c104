"""Every file of configs/ is a run that fits the machine it is written for."""

import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from llama4_jax.configs import CONFIGS, load_config
from llama4_jax.train.next_token import next_token
from llama4_jax.train.step import make_trainer

NAMES = sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_the_mesh_divides_the_batch_and_every_parameter(name):
    config = load_config(name)
    (said,) = re.findall(r"(\d+) (?:chips|accelerators)", (CONFIGS / f"{name}.py").read_text()) or ["1"]
    mesh = config.check_mesh(int(said))
    axes = ("data", "fsdp", "expert", "tensor", "context")
    abstract = make_trainer(config, AbstractMesh(mesh.shape, axes, (AxisType.Auto,) * 5), next_token).abstract
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    here = sum(x.dtype.itemsize * jax.numpy.prod(jax.numpy.array(x.sharding.shard_shape(x.shape), float))
               for x in jax.tree.leaves(abstract))  # fmt: skip
    assert here < max(40e9, 0.1 * size)  # of a chip's 95 GB, so that activations have room


def test_each_has_the_name_of_its_file():
    assert {load_config(name).name for name in NAMES} == set(NAMES)

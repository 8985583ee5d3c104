"""Where arrays live. Knows jax, not Llama."""

from sharding.mesh import MeshConfig as MeshConfig
from sharding.mesh import make_mesh as make_mesh
from sharding.rules import activation_sharding as activation_sharding
from sharding.rules import constrain as constrain
from sharding.rules import parameter_sharding as parameter_sharding

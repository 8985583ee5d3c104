"""Where arrays live. Knows jax, not Llama."""

from llama4_jax.sharding.collectives import all_parts as all_parts
from llama4_jax.sharding.collectives import gathered as gathered
from llama4_jax.sharding.collectives import given_back as given_back
from llama4_jax.sharding.collectives import own_part as own_part
from llama4_jax.sharding.mesh import MeshConfig as MeshConfig
from llama4_jax.sharding.mesh import make_mesh as make_mesh
from llama4_jax.sharding.mesh import platform as platform
from llama4_jax.sharding.rules import SERVING as SERVING
from llama4_jax.sharding.rules import TRAINING as TRAINING
from llama4_jax.sharding.rules import Rules as Rules
from llama4_jax.sharding.rules import activation_sharding as activation_sharding
from llama4_jax.sharding.rules import activation_spec as activation_spec
from llama4_jax.sharding.rules import axes_of as axes_of
from llama4_jax.sharding.rules import brought as brought
from llama4_jax.sharding.rules import constrain as constrain
from llama4_jax.sharding.rules import for_use as for_use
from llama4_jax.sharding.rules import given_home as given_home
from llama4_jax.sharding.rules import mesh_axes as mesh_axes
from llama4_jax.sharding.rules import parameter_sharding as parameter_sharding
from llama4_jax.sharding.rules import parameter_spec as parameter_spec
from llama4_jax.sharding.rules import use_rules as use_rules
from llama4_jax.sharding.rules import ways as ways
from llama4_jax.sharding.rules import where_used as where_used

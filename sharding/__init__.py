"""Where arrays live. Knows jax, not Llama."""

from sharding.collectives import all_parts as all_parts
from sharding.collectives import gathered as gathered
from sharding.collectives import given_back as given_back
from sharding.collectives import own_part as own_part
from sharding.mesh import MeshConfig as MeshConfig
from sharding.mesh import make_mesh as make_mesh
from sharding.mesh import platform as platform
from sharding.rules import SERVING as SERVING
from sharding.rules import TRAINING as TRAINING
from sharding.rules import Rules as Rules
from sharding.rules import activation_sharding as activation_sharding
from sharding.rules import activation_spec as activation_spec
from sharding.rules import axes_of as axes_of
from sharding.rules import brought as brought
from sharding.rules import constrain as constrain
from sharding.rules import for_use as for_use
from sharding.rules import given_home as given_home
from sharding.rules import mesh_axes as mesh_axes
from sharding.rules import parameter_sharding as parameter_sharding
from sharding.rules import parameter_spec as parameter_spec
from sharding.rules import use_rules as use_rules
from sharding.rules import ways as ways
from sharding.rules import where_used as where_used

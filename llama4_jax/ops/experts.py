"""The routed experts of a layer, on one device or on a mesh: tokens move, experts stay where they are.

On a mesh everything here runs in `shard_map`, so that every collective is written out:

- weights: each device gathers, over the axes that split their embed dimension (fsdp), the part it multiplies with
- tokens split over `expert`: they go to the devices of their experts and back (`exchange`)
- tokens that all devices of `expert` hold, as when decoding: each device computes those that chose its experts, and
  the results are summed; a few tokens are not worth sending to and fro
- `tensor` splits the width of every expert: partial results are summed

Dropless: sorted by expert and multiplied in groups, every choice of every token is computed, on whatever mesh.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llama4_jax.ops.dot_general import bfloat16_dot_general, make_dot_general
from llama4_jax.ops.exchange import exchange
from llama4_jax.ops.expert_feed_forward import ExpertWeights, FeedForward, feed_forward
from llama4_jax.ops.expert_products import Split, make_product
from llama4_jax.ops.fp8 import Fp8DotGeneral
from llama4_jax.ops.grouped_matmul import KERNELS, choose
from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.ops.plain import is_plain, own_gradient
from llama4_jax.sharding import activation_spec, axes_of, parameter_spec, ways

GATE_UP_AXES = ("experts", "gate_up", "embed", "mlp")
DOWN_AXES = ("experts", "mlp", "embed")


def experts(
    x: Float[Array, "B T D"],
    expert: Int[Array, "B T top_k"],
    gate: Float[Array, "B T top_k"],
    weights: ExpertWeights,
    *,
    matmul: str = "default",
    implementation: str = "auto",
    transport: str = "auto",
) -> Float[Array, "B T D"]:
    """Σ over a token's choices of expert(gate · x): a gate scales the *input*. In x's dtype, summed in float32.

    - expert: which experts each token chose; one that does not exist, such as E, is none, and gives 0
    - matmul: what is multiplied, a name of `dot_general.DOT_GENERALS`
    - implementation: of `grouped_matmul`
    - transport: of `exchange`, where the mesh in use splits tokens and experts

    Raises ValueError for an unknown matmul, implementation or transport.
    """
    dot_general = make_dot_general(matmul)
    if dot_general is bfloat16_dot_general and x.dtype != jnp.bfloat16:
        how = {"matmul": "default", "implementation": implementation, "transport": transport}
        return experts(x.astype(jnp.bfloat16), expert, gate, weights, **how).astype(x.dtype)
    tokens = activation_spec(x.shape, "rows", "seq", "embed")
    choices = PartitionSpec(*tokens[:2], None)
    token_axes = (*axes_of(tokens[0]), *axes_of(tokens[1]))
    if implementation == "auto":
        implementation = "reference" if is_plain() else choose(math.prod(expert.shape) // ways(token_axes))
    parts = ExpertWeights(
        parameter_spec(weights.gate_up.shape, *GATE_UP_AXES), parameter_spec(weights.down.shape, *DOWN_AXES)
    )
    expert_axes, width_axes = axes_of(parts.down[0]), axes_of(parts.down[1])
    travel = set(expert_axes) <= set(token_axes)
    row_axes = tuple(axis for axis in token_axes if axis not in expert_axes)
    recipe = dot_general if isinstance(dot_general, Fp8DotGeneral) else None
    into = Split(gathered=axes_of(parts.gate_up[2]), dimension=-2, outer=width_axes, rows=row_axes)
    out_of = Split(gathered=axes_of(parts.down[2]), dimension=-1, inner=width_axes, rows=row_axes)
    how = FeedForward(
        make_product(implementation, recipe, into),
        make_product(implementation, recipe, out_of),
        flat=implementation in KERNELS,
    )

    def on_device(x, expert, gate, weights):
        rows, expert, gate = (rearrange(y, "B T n -> (B T) n") for y in (x, expert, gate))
        if expert_axes and travel:
            routing = sort_by_expert(expert, gate, len(weights.down) * ways(expert_axes))
            sent = dispatch(rows, routing) * routing.gate.astype(x.dtype)[:, None]
            y = exchange(how, expert_axes, token_axes, transport, sent, routing.group_sizes, weights)
            y, summed = combine(y, routing), width_axes
        else:
            expert -= lax.axis_index(expert_axes) * len(weights.down) if expert_axes else 0
            y, summed = _local(how, rows, expert, gate, weights), (*expert_axes, *width_axes)
        return (lax.psum(y, summed) if summed else y).reshape(x.shape)

    return on_mesh(on_device, (tokens, choices, choices, parts), tokens)(x, expert, gate, weights)


def _local(how: FeedForward, rows, expert, gate, weights: ExpertWeights) -> Float[Array, "tokens D"]:
    """Of the experts that are here; choices of others give 0."""
    routing = sort_by_expert(expert, gate, len(weights.down))
    x = dispatch(rows, routing) * routing.gate.astype(rows.dtype)[:, None]
    return combine(feed_forward(how, x, routing.group_sizes, weights), routing)


class Routing(NamedTuple):
    """Which rows go where. R = tokens · top_k choices, sorted by expert; those of no expert come last."""

    token: Int[Array, " R"]  # of each sorted choice
    gate: Float[Array, " R"]  # of each sorted choice, float32
    sorted_at: Int[Array, "tokens top_k"]  # where each token's choices went: the inverse of `token`
    group_sizes: Int[Array, " E"]


def sort_by_expert(expert: Int[Array, "tokens top_k"], gate: Float[Array, "tokens top_k"], num_experts: int) -> Routing:
    """Orders all choices by expert, stably. One that is not in [0, num_experts) comes last and is never computed."""
    tokens, top_k = expert.shape
    flat = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sorted_at = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Routing(order // top_k, gate.reshape(-1)[order], sorted_at.reshape(tokens, top_k), group_sizes)


def dispatch(rows: Float[Array, "tokens D"], routing: Routing) -> Float[Array, "R D"]:
    """The row of each sorted choice's token."""
    return _dispatch(rows, routing.token, routing.sorted_at)


def combine(y: Float[Array, "R D"], routing: Routing) -> Float[Array, "tokens D"]:
    """The sum of each token's choices."""
    return _combine(y, routing.token, routing.sorted_at)


# Copying rows to their places and summing them back are each other's transposes. Written as gathers in both
# directions, since the scatter-add that autodiff would make of a gather is slow everywhere.


@own_gradient
def _dispatch(rows, token, sorted_at):
    return rows[token]


@own_gradient
def _combine(y, token, sorted_at):
    return jnp.sum(y[sorted_at], axis=1)


_dispatch.defvjp(
    lambda rows, token, sorted_at: (_dispatch(rows, token, sorted_at), (token, sorted_at)),
    lambda places, g: (_combine(g, *places), None, None),
)
_combine.defvjp(
    lambda y, token, sorted_at: (_combine(y, token, sorted_at), (token, sorted_at)),
    lambda places, g: (_dispatch(g, *places), None, None),
)

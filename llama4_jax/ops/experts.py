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
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llama4_jax.ops.dot_general import bfloat16_dot_general, make_dot_general
from llama4_jax.ops.exchange import exchange
from llama4_jax.ops.expert_feed_forward import ExpertWeights, FeedForward, feed_forward
from llama4_jax.ops.expert_products import Adapted, AdaptedProduct, Product, QuantizedProduct, Split, make_product
from llama4_jax.ops.fp8 import Fp8DotGeneral
from llama4_jax.ops.grouped_matmul import KERNELS, choose
from llama4_jax.ops.on_mesh import on_mesh
from llama4_jax.ops.plain import is_plain, own_gradient
from llama4_jax.ops.quantization import Quantized, scale_axes
from llama4_jax.sharding import activation_spec, axes_of, parameter_spec, ways

GATE_UP_AXES = ("experts", "gate_up", "embed", "mlp")
DOWN_AXES = ("experts", "mlp", "embed")
_NARROW = 1024  # columns: a device's low-rank factors side by side, up to which one product with all of them is best


def experts(
    x: Float[Array, "B T D"],
    expert: Int[Array, "B T top_k"],
    gate: Float[Array, "B T top_k"],
    weights: ExpertWeights,
    *,
    matmul: str = "default",
    implementation: str = "auto",
    transport: str = "auto",
    activations: str = "float",
    learns: bool = True,
) -> Float[Array, "B T D"]:
    """Σ over a token's choices of expert(gate · x): a gate scales the *input*. In x's dtype, summed in float32.

    - expert: which experts each token chose; one that does not exist, such as E, is none, and gives 0
    - matmul: what is multiplied, a name of `dot_general.DOT_GENERALS`
    - implementation: of `grouped_matmul`
    - transport: of `exchange`, where the mesh in use splits tokens and experts
    - activations: of `quantized_matmul`, for quantized weights
    - learns: whether the weights do. Where not, and of quantized ones, no gradient is computed but that of x and of
      low-rank factors

    Raises ValueError for an unknown matmul, implementation or transport.
    """
    dot_general = make_dot_general(matmul)
    if dot_general is bfloat16_dot_general and x.dtype != jnp.bfloat16:
        how = {"matmul": "default", "implementation": implementation, "transport": transport,
               "activations": activations, "learns": learns}  # fmt: skip
        return experts(x.astype(jnp.bfloat16), expert, gate, weights, **how).astype(x.dtype)
    tokens = activation_spec(x.shape, "rows", "seq", "embed")
    choices = PartitionSpec(*tokens[:2], None)
    token_axes = (*axes_of(tokens[0]), *axes_of(tokens[1]))
    if any(isinstance(_matrix(w), Quantized) for w in weights):
        implementation = "blocks"
    elif implementation == "auto":
        implementation = "reference" if is_plain() else choose(math.prod(expert.shape) // ways(token_axes))
    of_gate_up, of_down = _places(weights.gate_up, GATE_UP_AXES, -2), _places(weights.down, DOWN_AXES, -2)
    parts = ExpertWeights(of_gate_up, of_down)
    home = _matrix(of_down)
    home = home.values if isinstance(home, Quantized) else home
    expert_axes, width_axes = axes_of(home[0]), axes_of(home[1])
    travel = set(expert_axes) <= set(token_axes)
    row_axes = tuple(axis for axis in token_axes if axis not in expert_axes)
    recipe = dot_general if isinstance(dot_general, Fp8DotGeneral) else None
    make = _Maker(implementation, recipe, row_axes, width_axes, activations, learns)
    how = FeedForward(
        make.product(weights.gate_up, of_gate_up, "outer"),
        make.product(weights.down, of_down, "inner"),
        flat=implementation in KERNELS,
    )

    def on_device(x, expert, gate, weights):
        rows, expert, gate = (rearrange(y, "B T n -> (B T) n") for y in (x, expert, gate))
        if expert_axes and travel:
            routing = sort_by_expert(expert, gate, _count(weights) * ways(expert_axes))
            sent = dispatch(rows, routing) * routing.gate.astype(x.dtype)[:, None]
            y = exchange(how, expert_axes, token_axes, transport, sent, routing.group_sizes, weights)
            y, summed = combine(y, routing), width_axes
        else:
            expert -= lax.axis_index(expert_axes) * _count(weights) if expert_axes else 0
            y, summed = _local(how, rows, expert, gate, weights), (*expert_axes, *width_axes)
        return (lax.psum(y, summed) if summed else y).reshape(x.shape)

    return on_mesh(on_device, (tokens, choices, choices, parts), tokens)(x, expert, gate, weights)


@dataclass(frozen=True)
class _Maker:
    """Makes the products of a layer's experts."""

    implementation: str
    recipe: Fp8DotGeneral | None
    row_axes: tuple[str, ...]
    width_axes: tuple[str, ...]  # that split each expert's width
    activations: str
    learns: bool

    def product(self, w, places, width: Literal["inner", "outer"]) -> Product | AdaptedProduct:
        """With matrices that live at these places; `width` is what their inner or outer dimension is."""
        if isinstance(w, Adapted):
            at = -2 if width == "outer" else -1  # what is gathered: the embedding's dimension, not the width
            a, b = (axes_of(spec[dimension]) for spec, dimension in ((places.a, -2), (places.b, -1)))
            split_a = Split(a, -2, rows=self.row_axes) if at == -2 else Split(inner=a, rows=self.row_axes)
            split_b = Split(b, -1, rows=self.row_axes) if at == -1 else Split(outer=b, rows=self.row_axes)
            together = w.a.shape[0] // ways(axes_of(places.a[0])) * w.a.shape[-1]
            narrow = self.implementation != "reference" and together <= _NARROW
            implementation = "masked" if narrow else self.implementation
            factors = (make_product(implementation, None, split) for split in (split_a, split_b))
            return AdaptedProduct(self.product(w.w, places.w, width), *factors)
        dimension = -2 if width == "outer" else -1
        values = places.values if isinstance(w, Quantized) else places
        split = Split(axes_of(values[dimension]), dimension, rows=self.row_axes, **{width: self.width_axes})
        if not isinstance(w, Quantized):
            return make_product(self.implementation, self.recipe, split, learns=self.learns)
        check_groups_of_width(w, places, width, self.width_axes)
        of_scales = axes_of(places.scale[dimension])
        return QuantizedProduct(self.implementation, split, of_scales=of_scales, activations=self.activations)


def check_groups_of_width(w: Quantized, places: Quantized, width: str, width_axes: tuple[str, ...]) -> None:
    """Raises ValueError where a mesh splits the inputs of `down` otherwise than its groups."""
    if width == "inner" and w.scale.shape[-2] > 1 and axes_of(places.scale[-2]) != width_axes:
        raise ValueError(
            f"the mesh splits the {w.values.shape[-2]} inputs of the experts' down over {', '.join(width_axes)}, "
            f"which do not divide their {w.scale.shape[-2]} groups: choose a smaller mesh.tensor, or smaller groups."
        )


def _places(w, axes: tuple[str, ...], inputs: int):
    """Where weights live whose matrices have these axes, as the weights have their parts."""
    if isinstance(w, Adapted):
        a_axes, b_axes = factor_axes(axes)
        b = parameter_spec(w.b.shape, *b_axes)
        return Adapted(_places(w.w, axes, inputs), parameter_spec(w.a.shape, *a_axes), b)
    if isinstance(w, Quantized):
        of_scale = scale_axes(axes, w.scale.shape[inputs], start=len(axes) + inputs)
        return Quantized(parameter_spec(w.values.shape, *axes), parameter_spec(w.scale.shape, *of_scale))
    return parameter_spec(w.shape, *axes)


def factor_axes(axes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the axes of low-rank factors, given those of the experts' matrices: [E, I, r] and [E, *P, r, O]."""
    return (axes[0], axes[-2], "rank"), (*axes[:-2], "rank", axes[-1])


def _matrix(w):
    return w.w if isinstance(w, Adapted) else w


def _count(weights: ExpertWeights) -> int:
    """The number of a device's experts."""
    return len(jax.tree.leaves(weights.down)[0])


def _local(how: FeedForward, rows, expert, gate, weights: ExpertWeights) -> Float[Array, "tokens D"]:
    """Of the experts that are here; choices of others give 0."""
    routing = sort_by_expert(expert, gate, _count(weights))
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

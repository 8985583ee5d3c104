"""down(swiglu(gate_up(x))) of the routed experts, on rows sorted by expert, with its backward pass written out.

Written out, because the two halves of it run where autodiff does not reach: in rounds, between which rows travel
(`exchange`). And because weights that are rounded to 8 bits before they are gathered have no gradient of that dtype.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama4_jax.ops.dot_general import PRODUCT
from llama4_jax.ops.expert_products import Adapted, AdaptedProduct, Product
from llama4_jax.ops.plain import own_gradient
from llama4_jax.ops.swiglu import swiglu, swiglu_flat


class ExpertWeights(NamedTuple):
    """Each also `Quantized`, or `Adapted` with low-rank factors."""

    gate_up: Any  # Float[Array, "E 2 D F"]
    down: Any  # Float[Array, "E F D"]


class Saved(NamedTuple):
    """Of the forward pass, for the backward pass."""

    kept: Any  # of the rows, as the first product keeps them
    hidden: Float[Array, "R 2 F"] | Float[Array, "R FF"]


@dataclass(frozen=True)
class FeedForward:
    """How it is computed. Hashable.

    - first, second: the products with gate_up and down
    - flat: gate and up lie side by side, [E D 2F], as kernels want one matrix
    """

    first: Product | AdaptedProduct
    second: Product | AdaptedProduct
    flat: bool

    def prepare(self, weights: ExpertWeights, dtype) -> tuple[Any, Any]:
        """The weights of this device's experts as the products use them: gathered, in `dtype` or in 8 bits."""
        gate_up = weights.gate_up
        if self.flat:  # before it is gathered, when it is the least to copy
            gate_up = _of_outputs(lambda w: rearrange(w, "E two D F -> E D (two F)"), gate_up)
        return self.first.prepare(gate_up, dtype), self.second.prepare(weights.down, dtype)

    def give_back(self, gradients: tuple[Any, Any], like: ExpertWeights) -> ExpertWeights:
        """The gradients of a device's own part of the weights, of those of what it used."""
        gate_up = self.first.give_back(gradients[0], like.gate_up)
        if self.flat:
            gate_up = _of_outputs(lambda w: rearrange(w, "E D (two F) -> E two D F", two=2), gate_up)
        return ExpertWeights(gate_up, self.second.give_back(gradients[1], like.down))

    def gradients_like(self, used: tuple[Any, Any]) -> tuple[Any, Any]:
        """Zeros, in float32, to which the gradients of what was used can be added."""
        return self.first.gradient_like(used[0]), self.second.gradient_like(used[1])

    def forward(
        self, x: Float[Array, "R D"], group_sizes: Int[Array, " E"], used: tuple[Any, Any]
    ) -> tuple[Float[Array, "R D"], Saved]:
        kept = self.first.keep(x, group_sizes)
        hidden = self.first.forward(kept, used[0], group_sizes, x.dtype)
        active = self.second.keep(self._between(hidden), group_sizes)
        return self.second.forward(active, used[1], group_sizes, x.dtype), Saved(kept, hidden)

    def backward(
        self, saved: Saved, group_sizes: Int[Array, " E"], used: tuple[Any, Any], g: Float[Array, "R D"]
    ) -> tuple[Float[Array, "R D"], tuple[Any, Any]]:
        """The gradients of x and of what was used of the weights, all in g's dtype."""
        active, pull = jax.vjp(self._between, saved.hidden)
        kept = self.second.keep(active, group_sizes)
        d_active, d_down = self.second.backward(kept, used[1], group_sizes, g, g.dtype)
        (d_hidden,) = pull(d_active)
        d_x, d_gate_up = self.first.backward(saved.kept, used[0], group_sizes, d_hidden, g.dtype)
        return d_x, (d_gate_up, d_down)

    def _between(self, hidden):
        return swiglu_flat(hidden) if self.flat else swiglu(hidden)


@own_gradient(nondiff_argnums=(0,))
def feed_forward(
    how: FeedForward, x: Float[Array, "R D"], group_sizes: Int[Array, " E"], weights: ExpertWeights
) -> Float[Array, "R D"]:
    """Each row through the expert of its group. Rows after the last group give 0."""
    return how.forward(x, group_sizes, how.prepare(weights, x.dtype))[0]


def _forward(how: FeedForward, x, group_sizes, weights: ExpertWeights):
    used = how.prepare(weights, x.dtype)
    y, saved = how.forward(x, group_sizes, used)
    return y, (checkpoint_name(saved, PRODUCT), group_sizes, used, scalars_like(weights))


def _backward(how: FeedForward, residuals, g):
    saved, group_sizes, used, like = residuals
    d_x, gradients = how.backward(saved, group_sizes, used, g)
    return d_x, None, how.give_back(gradients, like)


feed_forward.defvjp(_forward, _backward)


def scalars_like(weights: ExpertWeights) -> ExpertWeights:
    """Scalars that carry the dtypes to a backward pass."""
    return jax.tree.map(lambda w: jnp.zeros((), w.dtype), weights)


def _of_outputs(change, w):
    """`change` of what has the outputs of a product: its matrices, and of low-rank factors the second."""
    if isinstance(w, Adapted):
        return Adapted(_of_outputs(change, w.w), w.a, _of_outputs(change, w.b))
    return None if w is None else change(w)

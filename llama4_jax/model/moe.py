"""Llama 4's mixture of experts: a sigmoid router that scales the expert's *input*, and one shared expert.

Dropless: tokens are sorted by expert and multiplied in groups, so no token is ever left out and no expert is
computed on tokens that did not choose it. Reference: `Llama4TextMoe` of transformers, `MoE` of llama-models (both
compute every expert on every token, which gives the same numbers).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.layers import Linear, SwiGLU, normal_param, swiglu
from llama4_jax.ops.grouped_matmul import grouped_matmul
from sharding import constrain


class BalanceBias(nnx.Variable):
    """Added to the gates when experts are chosen; moved by the training step, not by gradients."""


class RouterStats(NamedTuple):
    """What balancing and logging need to know of one layer's routing, over the tokens that are not padding."""

    counts: Float[Array, "*layer E"]  # choices that went to each expert
    probabilities: Float[Array, "*layer E"]  # mean softmax of the router logits
    z: Float[Array, "*layer"]  # mean squared logsumexp of the router logits
    gate: Float[Array, "*layer"]  # mean sigmoid of the chosen logits


class Routing(NamedTuple):
    """Which rows go where. R = tokens · top_k choices, sorted by expert; those of padding come last."""

    token: Int[Array, " R"]  # of each sorted choice
    gate: Float[Array, " R"]  # of each sorted choice, float32
    sorted_at: Int[Array, "tokens top_k"]  # where each token's choices went: the inverse of `token`
    group_sizes: Int[Array, " E"]


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig, precision: Precision, *, rngs: nnx.Rngs):
        dim, width, experts = config.embed_dim, config.expert_mlp_dim, config.num_experts
        make = {"std": config.init_std, "dtype": precision.params, "rngs": rngs}
        self.router = Linear({"embed": dim}, {"router": experts}, **make)
        self.gate_up = normal_param(
            rngs, (experts, dim, 2, width), ("experts", "embed", "gate_up", "mlp"), config.init_std, precision.params
        )
        self.down = normal_param(
            rngs, (experts, width, dim), ("experts", "mlp", "embed"), config.init_std, precision.params
        )
        self.shared = SwiGLU(dim, width, matmul=precision.matmul, **make)
        if config.router_bias:
            self.bias = BalanceBias(jnp.zeros((experts,), jnp.float32), axes=("router",), eager_sharding=False)
        self.biased = config.router_bias
        self.top_k = config.top_k

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        rows = rearrange(x, "B T D -> (B T) D")
        kept = jnp.ones(rows.shape[0], bool) if valid is None else rearrange(valid, "B T -> (B T)")
        logits = self.router(rows.astype(jnp.float32))
        expert, gate = self.choose(logits)
        routing = sort_by_expert(expert, gate, kept, logits.shape[-1])
        routed = rearrange(self.experts(rows, routing), "(B T) D -> B T D", B=x.shape[0])
        out = self.shared(x) + constrain(routed, "batch", "seq", "embed")
        return out, router_stats(logits, gate, routing.group_sizes, kept)

    def choose(
        self, logits: Float[Array, "tokens E"]
    ) -> tuple[Int[Array, "tokens top_k"], Float[Array, "tokens top_k"]]:
        """The top_k experts of each token and their gates, sigmoid(logit). Gates are not normalised: with one
        expert a normalised gate is 1, and the router would learn nothing."""
        if not self.biased:
            chosen, expert = jax.lax.top_k(logits, self.top_k)
            return expert, jax.nn.sigmoid(chosen)
        gates = jax.nn.sigmoid(logits)
        # The bias decides who is chosen, never how much they count (arXiv 2408.15664).
        _, expert = jax.lax.top_k(jax.lax.stop_gradient(gates) + self.bias[...], self.top_k)
        return expert, jnp.take_along_axis(gates, expert, axis=-1)

    def experts(self, rows: Float[Array, "tokens D"], routing: Routing) -> Float[Array, "tokens D"]:
        x = dispatch(rows, routing.token, routing.sorted_at) * routing.gate.astype(rows.dtype)[:, None]
        gate_up_kernel = rearrange(self.gate_up[...].astype(x.dtype), "E D two F -> E D (two F)")
        gate_up = grouped_matmul(x, gate_up_kernel, routing.group_sizes)
        hidden = swiglu(rearrange(gate_up, "R (two F) -> R two F", two=2))
        y = grouped_matmul(hidden, self.down[...].astype(x.dtype), routing.group_sizes)
        return combine(y, routing.token, routing.sorted_at)


def sort_by_expert(
    expert: Int[Array, "tokens top_k"],
    gate: Float[Array, "tokens top_k"],
    kept: Bool[Array, " tokens"],
    num_experts: int,
) -> Routing:
    """Orders all choices by expert, stably. Padding belongs to no expert: it comes last and is never computed."""
    tokens, top_k = expert.shape
    flat = jnp.where(kept[:, None], expert, num_experts).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sorted_at = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Routing(order // top_k, gate.reshape(-1)[order], sorted_at.reshape(tokens, top_k), group_sizes)


# Copying rows to their places and summing them back are each other's transposes. Written as gathers in both
# directions, since the scatter-add that autodiff would make of a gather is slow everywhere.


@jax.custom_vjp
def dispatch(
    rows: Float[Array, "tokens D"], token: Int[Array, " R"], sorted_at: Int[Array, "tokens top_k"]
) -> Float[Array, "R D"]:
    """Row token[r] for each sorted choice r."""
    return rows[token]


@jax.custom_vjp
def combine(
    y: Float[Array, "R D"], token: Int[Array, " R"], sorted_at: Int[Array, "tokens top_k"]
) -> Float[Array, "tokens D"]:
    """The sum of each token's choices."""
    return jnp.sum(y[sorted_at], axis=1)


dispatch.defvjp(
    lambda rows, token, sorted_at: (dispatch(rows, token, sorted_at), (token, sorted_at)),
    lambda places, g: (combine(g, *places), None, None),
)
combine.defvjp(
    lambda y, token, sorted_at: (combine(y, token, sorted_at), (token, sorted_at)),
    lambda places, g: (dispatch(g, *places), None, None),
)


def router_stats(
    logits: Float[Array, "tokens E"],
    gate: Float[Array, "tokens top_k"],
    group_sizes: Int[Array, " E"],
    kept: Bool[Array, " tokens"],
) -> RouterStats:
    weight = kept.astype(jnp.float32) / jnp.maximum(jnp.sum(kept), 1)
    return RouterStats(
        counts=group_sizes.astype(jnp.float32),
        probabilities=weight @ jax.nn.softmax(logits, axis=-1),
        z=weight @ jnp.square(jax.nn.logsumexp(logits, axis=-1)),
        gate=weight @ jnp.mean(gate, axis=-1),
    )

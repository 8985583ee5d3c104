"""Llama 4's mixture of experts: a sigmoid router that scales the expert's *input*, and one shared expert.

Dropless: tokens are sorted by expert and multiplied in groups, so no token is ever left out and no expert is
computed on tokens that did not choose it. Reference: `Llama4TextMoe` of transformers, `MoE` of llama-models (both
compute every expert on every token, which gives the same numbers).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.layers import Linear, SwiGLU, normal_param
from llama4_jax.ops.experts import DOWN_AXES, GATE_UP_AXES, ExpertWeights, experts
from llama4_jax.ops.quantization import Quantized
from llama4_jax.ops.quantized_experts import quantized_experts
from llama4_jax.sharding import constrain


class BalanceBias(nnx.Variable):
    """Added to the gates when experts are chosen; moved by the training step, not by gradients."""


class RouterChoices(NamedTuple):
    """What the router said of each token, in one layer or in several."""

    logits: Float[Array, "*layer B T E"]  # float32
    experts: Int[Array, "*layer B T top_k"]  # chosen, the likeliest first; E, which is none, for padding
    gates: Float[Array, "*layer B T top_k"]  # sigmoid of their logits: what the input of each is multiplied by


class RouterStats(NamedTuple):
    """What balancing and logging need to know of one layer's routing, over the tokens that are not padding."""

    counts: Float[Array, "*layer E"]  # choices that went to each expert
    probabilities: Float[Array, "*layer E"]  # mean softmax of the router logits
    z: Float[Array, "*layer"]  # mean squared logsumexp of the router logits
    gate: Float[Array, "*layer"]  # mean sigmoid of the chosen logits
    choices: RouterChoices | None = None  # of each token, where they are asked for


class MoE(nnx.Module):
    def __init__(self, config: ModelConfig, precision: Precision, *, rngs: nnx.Rngs):
        dim, width, num_experts = config.embed_dim, config.expert_mlp_dim, config.num_experts
        make = {"std": config.init_std, "dtype": precision.params, "rngs": rngs}
        self.router = Linear({"embed": dim}, {"router": num_experts}, **make)
        own = {"std": config.init_std, "dtype": precision.params}
        self.gate_up = normal_param(rngs, (num_experts, 2, dim, width), GATE_UP_AXES, **own)
        self.down = normal_param(rngs, (num_experts, width, dim), DOWN_AXES, **own)
        self.shared = SwiGLU(dim, width, **make)
        if config.router_bias:
            self.bias = BalanceBias(jnp.zeros((num_experts,), jnp.float32), axes=("router",), eager_sharding=False)
        self.biased = config.router_bias
        self.matmul = "default"  # of the routed experts; see `matmuls.choose_matmuls`
        self.implementation = "auto"  # of the routed experts; see `Llama4`
        self.top_k = config.top_k
        self.gate_up_scale = self.down_scale = None  # of quantized experts: see `quantized`
        self.activations = "auto"  # that these multiply
        self.gate_up_lora = self.down_lora = None  # low-rank factors of each expert: see `lora`
        self.learns = True  # whether the experts' matrices do; see `lora`

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        kept = jnp.ones(x.shape[:2], bool) if valid is None else valid
        x = constrain(x, "rows", "seq", "embed")
        # Products of float32 on a TPU would otherwise be products of bfloat16, and choose other experts.
        with jax.default_matmul_precision("highest"):
            logits = self.router(x.astype(jnp.float32))
        expert, gate = self.choose(logits)
        expert = jnp.where(kept[..., None], expert, logits.shape[-1])  # padding belongs to no expert
        routed = self.routed(x, expert, gate)
        y = self.shared(x) + routed
        return y, router_stats(logits, expert, gate, kept)._replace(choices=RouterChoices(logits, expert, gate))

    def routed(
        self, x: Float[Array, "B T D"], expert: Int[Array, "B T top_k"], gate: Float[Array, "B T top_k"]
    ) -> Float[Array, "B T D"]:
        gate_up, down = self.gate_up[...], self.down[...]
        if self.gate_up_scale is not None:
            gate_up, down = Quantized(gate_up, self.gate_up_scale[...]), Quantized(down, self.down_scale[...])
            if self.learns:  # nothing beside them does: inference
                return quantized_experts(x, expert, gate, gate_up, down, activations=self.activations)
        if self.gate_up_lora is not None:
            gate_up, down = self.gate_up_lora.beside(gate_up), self.down_lora.beside(down)
        how = {"matmul": self.matmul, "implementation": self.implementation, "activations": self.activations}
        return experts(x, expert, gate, ExpertWeights(gate_up, down), **how, learns=self.learns)

    def choose(self, logits: Float[Array, "B T E"]) -> tuple[Int[Array, "B T top_k"], Float[Array, "B T top_k"]]:
        """The top_k experts of each token and their gates, sigmoid(logit). Gates are not normalised: with one
        expert a normalised gate is 1, and the router would learn nothing."""
        if not self.biased:
            chosen, expert = jax.lax.top_k(logits, self.top_k)
            return expert, jax.nn.sigmoid(chosen)
        gates = jax.nn.sigmoid(logits)
        # The bias decides who is chosen, never how much they count (arXiv 2408.15664).
        _, expert = jax.lax.top_k(jax.lax.stop_gradient(gates) + self.bias[...], self.top_k)
        return expert, jnp.take_along_axis(gates, expert, axis=-1)


def router_stats(
    logits: Float[Array, "B T E"],
    expert: Int[Array, "B T top_k"],
    gate: Float[Array, "B T top_k"],
    kept: Bool[Array, "B T"],
) -> RouterStats:
    weight = kept.astype(jnp.float32) / jnp.maximum(jnp.sum(kept), 1)
    return RouterStats(
        counts=jnp.sum(expert[..., None] == jnp.arange(logits.shape[-1]), axis=(0, 1, 2), dtype=jnp.float32),
        probabilities=jnp.einsum("bt,bte->e", weight, jax.nn.softmax(logits, axis=-1), precision="highest"),
        z=jnp.sum(weight * jnp.square(jax.nn.logsumexp(logits, axis=-1))),
        gate=jnp.sum(weight * jnp.mean(gate, axis=-1)),
    )

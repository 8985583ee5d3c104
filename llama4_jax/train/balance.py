"""Keeping the experts evenly used, and saying how evenly they are.

Three methods, each off or on. What Meta used for Llama 4 is not public.
- Switch loss (arXiv 2101.03961, Eq. 4-6): E · Σ_i f_i P_i with f the share of choices and P the mean router
  probability (softmax of the logits: the sigmoid gates do not sum to one)
- z-loss (ST-MoE, arXiv 2202.08906, Eq. 5): keeps the router's logits small; it balances nothing
- loss-free bias (arXiv 2408.15664): after each step, b_i += rate · sign(mean count - count_i), on what chooses experts
  and not on what weighs them
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from llama4_jax.model.moe import RouterStats


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """0 turns a method off."""

    switch: float = 0.0  # coefficient of the Switch loss; 1e-2 is usual
    z: float = 0.0  # coefficient of the z-loss; 1e-3 is usual
    bias_rate: float = 0.0  # of the loss-free bias, which needs model.router_bias; 1e-3 is usual

    def __post_init__(self):
        for name in ("switch", "z", "bias_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"balance.{name} must not be negative, got {getattr(self, name)}.")


def balance_loss(stats: RouterStats, config: BalanceConfig) -> Float[Array, ""]:
    """The sum of the losses that are on, each a mean over the expert layers."""
    share = stats.counts / jnp.maximum(stats.counts.sum(-1, keepdims=True), 1)
    switch = stats.counts.shape[-1] * jnp.sum(share * stats.probabilities, axis=-1)
    return config.switch * jnp.mean(switch) + config.z * jnp.mean(stats.z)


def moved_bias(
    bias: Float[Array, "*layer E"], counts: Float[Array, "*layer E"], rate: float
) -> Float[Array, "*layer E"]:
    """The bias after one step, from the choices of the whole step. Its sum stays 0: only differences choose."""
    step = rate * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)
    return bias + step - jnp.mean(step, axis=-1, keepdims=True)


class BalanceMetrics(NamedTuple):
    """Means over the expert layers, but for max_violation_worst."""

    max_violation: Float[Array, ""]  # MaxVio: the busiest expert's choices over the mean, less one; 0 is perfect
    max_violation_worst: Float[Array, ""]  # of the worst layer
    load_entropy: Float[Array, ""]  # of the shares, over that of even shares; 1 is perfect
    dead_experts: Float[Array, ""]  # experts a layer with less than a hundredth of the mean
    gate_mean: Float[Array, ""]  # sigmoid of the chosen logits


def balance_metrics(counts: Float[Array, "layers E"], gate: Float[Array, " layers"]) -> BalanceMetrics:
    mean = jnp.maximum(counts.mean(-1, keepdims=True), 1e-9)
    share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    violation = jnp.max(counts / mean, axis=-1) - 1
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), axis=-1)
    return BalanceMetrics(
        max_violation=violation.mean(),
        max_violation_worst=violation.max(),
        load_entropy=entropy.mean() / max(math.log(counts.shape[-1]), 1e-9),
        dead_experts=jnp.sum(counts < 0.01 * mean, axis=-1).mean(),
        gate_mean=gate.mean(),
    )

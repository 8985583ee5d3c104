"""AdamW (arXiv 1711.05101) by optax, its schedules, and which parameters decay."""

from dataclasses import dataclass
from typing import Literal

import jax
import optax
from flax import nnx
from jaxtyping import Array, Int


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Lengths are in steps, fractions are of the run's steps or of the peak rate."""

    peak_lr: float = 3e-4
    schedule: Literal["cosine", "wsd"] = "cosine"  # wsd: warm up, stay, decay (arXiv 2405.18392)
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # of the run, for wsd: the length of its linear decay
    final_lr_fraction: float = 0.1  # of peak_lr, at the end
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; norms and the scales of scalable softmax do not decay
    clip_norm: float = 1.0  # the gradient's global norm is scaled down to this

    def __post_init__(self):
        for name in ("peak_lr", "eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name} must be positive, got {getattr(self, name)}.")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must not be negative, got {getattr(self, name)}.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("decay_fraction", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1], got {getattr(self, name)}.")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate at each step, counted from 0: linear from 0 to the peak, then cosine to the end, or constant and linear
    to the end."""
    warmup = min(config.warmup_steps, steps)
    rise = optax.linear_schedule(0.0, config.peak_lr, max(warmup, 1))
    after = max(steps - warmup, 1)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(config.peak_lr, after, config.final_lr_fraction)
    else:
        decay = max(1, min(round(config.decay_fraction * steps), after))
        stay = optax.constant_schedule(config.peak_lr)
        end = optax.linear_schedule(config.peak_lr, config.peak_lr * config.final_lr_fraction, decay)
        fall = optax.join_schedules([stay, end], [after - decay])
    # The first update is made at rate(1), so that it is not lost to a rate of 0.
    return lambda step: optax.join_schedules([rise, fall], [warmup])(step + (1 if warmup else 0))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping and AdamW. Its state and its updates are float32 if gradients and parameters are given in float32."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def at_step(state: optax.OptState, step: Int[Array, ""]) -> optax.OptState:
    """The optimizer's state with its schedule at this step. optax counts updates; a run counts steps, those that were
    left out included, so that its schedule ends when it does. Adam's bias correction goes on counting updates."""

    def scheduled(part) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    return jax.tree.map(lambda part: part._replace(count=step) if scheduled(part) else part, state, is_leaf=scheduled)


def decays(params: nnx.State) -> nnx.State:
    """True for matrices: parameters with two axes or more, not counting that of stacked layers."""
    return jax.tree.map(
        lambda v: v.replace(len([axis for axis in v.axes if axis != "layers"]) >= 2),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )

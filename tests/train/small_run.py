"""A run small enough to compile in seconds, a packed batch for it, and what one step makes of them."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from llama4_jax.config import RunConfig
from llama4_jax.data.batch import Batch
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import ModelConfig
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.next_token import next_token
from llama4_jax.train.optimizer import OptimizerConfig
from llama4_jax.train.step import StepMetrics, Trainer, TrainState, make_trainer

# Rows of 32 tokens reach past two chunks of 8 and several temperature buckets; weights are large enough to matter.
SCOUT = ModelConfig(
    vocab_size=96, embed_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, expert_mlp_dim=16,
    num_experts=4, nope_interval=2, attention_chunk=8, temperature_floor=4, context_length=64, init_std=0.08,
    router_bias=True,
)  # fmt: skip
MAVERICK = dataclasses.replace(SCOUT, num_experts=8, top_k=2, moe_interval=2, qk_norm=False, query_scale="ssmax_bias")


def config(model: ModelConfig = SCOUT, **fields) -> RunConfig:
    defaults = {
        "name": "small",
        "model": model,
        "data": DataConfig(seq_len=32, batch_size=8),
        "optimizer": OptimizerConfig(peak_lr=1e-2, warmup_steps=0),
        "balance": BalanceConfig(bias_rate=1e-3, switch=1e-2, z=1e-3),
        "steps": 20,
    }
    return RunConfig(**{**defaults, **fields})


def packed_batch(config: RunConfig, seed: int = 0) -> Batch:
    """Random documents of 1 to 20 tokens in every row, and padding after them."""
    draw = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.seq_len)
    tokens, targets = draw.integers(0, config.model.vocab_size, (2, *shape), dtype=np.int32)
    positions, segment_ids = np.zeros((2, *shape), np.int32)
    for row in range(shape[0]):
        at = segment = 0
        while at < shape[1] - 4:
            length = min(int(draw.integers(1, 21)), shape[1] - 2 - at)
            segment += 1
            positions[row, at : at + length] = np.arange(length)
            segment_ids[row, at : at + length] = segment
            at += length
    real = segment_ids > 0
    return Batch(tokens * real, targets * real, positions, segment_ids, real.astype(np.float32), real.astype(np.int32))


@functools.cache  # what is compiled with it stays, and a loss must be the same function to be the same program
def trainer(config: RunConfig, mesh: MeshConfig | None = None, loss=next_token) -> Trainer:
    mesh = MeshConfig(data=1) if mesh is None else mesh
    return make_trainer(config, make_mesh(mesh, jax.devices()[: mesh.named_size]), loss)


def start(trainer: Trainer) -> TrainState:
    """The first state, the same on every mesh. Drawn once for a structure, since compiling that takes seconds."""
    key = str(jax.tree.map(lambda x: (x.shape, x.dtype), trainer.abstract))
    if key not in _drawn:
        with jax.set_mesh(trainer.mesh):
            _drawn[key] = jax.device_get(trainer.init())
    return jax.device_put(_drawn[key], jax.tree.map(lambda x: x.sharding, trainer.abstract))


_drawn: dict[str, TrainState] = {}


def run(
    trainer: Trainer, batches: list[Batch], state: TrainState | None = None
) -> tuple[TrainState, list[StepMetrics]]:
    """The state after these batches, and what was measured at each."""
    figures = []
    with jax.set_mesh(trainer.mesh):
        state = start(trainer) if state is None else state
        for batch in batches:
            state, metrics = trainer.step(state, batch, None)
            figures.append(jax.device_get(metrics))
    return state, figures


def gradients(state: TrainState) -> dict[str, np.ndarray]:
    """Those of the first step, clipped, times 1 - b1: Adam's first moment after it."""
    (adam,) = [s for s in jax.tree.leaves(state.optimizer, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return arrays(adam.mu)


def arrays(tree: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(tree)}


def largest_error(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Of all tensors, each relative to its own largest value."""
    assert mine.keys() == theirs.keys()
    for name, x in theirs.items():
        assert np.abs(x).max() > 0, f"{name} is 0: nothing is compared"
    return max(float(np.abs(mine[name] - x).max() / np.abs(x).max()) for name, x in theirs.items())

"""A base small enough to compile in seconds, with attention, dense, shared and routed experts; and LoRA runs beside
it. Two layers: one dense, one with five experts, of which the sizes are all different."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import llama4_jax
from llama4_jax import Llama4
from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.model.config import LoraConfig, ModelConfig
from llama4_jax.train.optimizer import OptimizerConfig

MODEL = ModelConfig(
    vocab_size=320, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=40, expert_mlp_dim=16,
    num_experts=5, moe_interval=2, nope_interval=2, attention_chunk=16, temperature_floor=16, context_length=64,
    init_std=0.1,
)  # fmt: skip
# Every kind of linear layer, the router and the head too.
EVERYTHING = LoraConfig(rank=4, alpha=8.0, targets=("*", "*.router", "lm_head"))
TEXT = "def f(x):\n    return x + 1\n\n" * 200


def new_model(seed: int = 7) -> Llama4:
    """Its layers one by one. Filled by numpy: to compile the drawing of every shape takes ten times as long."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama4(MODEL, scan_layers=False)))
    draw = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(state):
        value = draw.normal(0, 0.15, variable.shape) + ("norm" in "".join(map(str, path)))
        variable.set_value(jnp.asarray(value, variable.dtype))
    return nnx.merge(graphdef, state)


@jax.jit
def _logits(split, tokens):
    return nnx.merge(*split)(tokens)


def logits(model: Llama4, tokens) -> np.ndarray:
    return np.asarray(_logits(nnx.split(model), jnp.asarray(tokens, jnp.int32)))


def base(directory: Path, seed: int = 7) -> Path:
    return llama4_jax.save(new_model(seed), directory, tokenizer=ByteTokenizer())


def run_config(place: Path, base: Path, **fields) -> RunConfig:
    text = place / "text.txt"
    text.write_text(TEXT)
    defaults = {
        "name": "lora",
        "run_dir": str(place),
        "model": MODEL,
        "init_from": str(base),
        "lora": EVERYTHING,
        "data": DataConfig(sources=(f"text:{text}",), seq_len=32, batch_size=8, heldout_fraction=0.0),
        "optimizer": OptimizerConfig(peak_lr=1e-2, warmup_steps=0, weight_decay=0.0),
        "steps": 4,
        "checkpoint_every": 2,
        "sample_tokens": 1,
        "sample_prompt": "d",
    }
    return RunConfig(**{**defaults, **fields})


def random_factors(model: Llama4, seed: int = 0) -> None:
    """Other values for every factor, as if it had learned."""
    draw = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        if type(variable).__name__ == "Factor":
            variable.set_value(jnp.asarray(draw.normal(0, 0.2, variable.shape), jnp.float32))


def replaced(config: RunConfig, **fields) -> RunConfig:
    return dataclasses.replace(config, **fields)

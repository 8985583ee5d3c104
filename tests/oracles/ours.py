"""Our model of a case, carrying the oracles' weights, and its arrays by the table's names whatever its layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from llama4_jax.model.config import ModelConfig, Precision, RopeScaling
from llama4_jax.model.llama4 import Llama4
from llama4_jax.weights.table import InMemory, from_hf
from oracles import hf
from oracles.cases import Case, tokens


def config(case: Case) -> ModelConfig:
    """The case in our words."""
    rope = case.rope_scaling
    return ModelConfig(
        vocab_size=case.vocab,
        embed_dim=case.embed,
        num_layers=case.layers,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        mlp_dim=case.mlp,
        expert_mlp_dim=case.expert_mlp,
        num_experts=case.experts,
        top_k=case.top_k,
        moe_layers=case.moe,
        rope_layers=case.rope,
        attention_chunk=case.chunk,
        qk_norm=case.qk_norm,
        rope_theta=case.rope_theta,
        rope_scaling=rope
        and RopeScaling(
            factor=rope.factor,
            low_freq_factor=rope.low,
            high_freq_factor=rope.high,
            original_context=rope.original,
        ),
        query_scale="temperature" if case.temperature else "none",
        temperature_floor=case.temperature_floor,
        temperature_coef=case.temperature_coef,
        norm_eps=case.norm_eps,
        context_length=1024,
    )


def model(case: Case, *, scan_layers: bool = False, precision: Precision | None = None) -> Llama4:
    """A new model with the Hugging Face oracle's weights."""
    return filled(config(case), hf.reference(case).state_dict, scan_layers=scan_layers, precision=precision)


def filled(
    config: ModelConfig,
    hf_weights: dict[str, np.ndarray],
    *,
    scan_layers: bool = False,
    precision: Precision | None = None,
) -> Llama4:
    """A new model with weights under Hugging Face's names."""
    # abstract, since drawing random weights of every shape only to replace them takes seconds of compilation
    made = nnx.eval_shape(lambda: Llama4(config, scan_layers=scan_layers, precision=precision))
    weights = dict(from_hf(made.config, InMemory(hf_weights)))
    graphdef, state = nnx.split(made)
    for path, variable in nnx.to_flat_state(state):
        names = _names(made, path)
        value = np.stack([weights.pop(name) for name in names]) if _stacked(path) else weights.pop(names[0])
        assert value.shape == variable.shape, names
        variable.set_value(jnp.asarray(value, variable.dtype))
    assert not weights, f"the model has no place for {list(weights)}"
    return nnx.merge(graphdef, state)


def by_name(model: Llama4, state: nnx.State) -> dict[str, np.ndarray]:
    """Arrays of the structure of the model's parameters (themselves, gradients) by the table's names."""
    arrays = {}
    for path, variable in nnx.to_flat_state(state):
        value = np.asarray(variable[...])
        arrays.update(zip(_names(model, path), value if _stacked(path) else [value], strict=True))
    return arrays


def _stacked(path: tuple) -> bool:
    return path[1] == "group"


def _names(model: Llama4, path: tuple) -> list[str]:
    """The table's names of one parameter: several where the layers of the repeating group are stacked."""
    if path[1] not in ("group", "rest"):
        return [".".join(path)]
    part, where, number, *rest = path
    prefix = ("layers",) if part == "decoder" else (part, "layers")
    repeats, period = getattr(model, part).repeats, len(getattr(model, part).group)
    layers = range(number, repeats * period, period) if where == "group" else [repeats * period + number]
    return [".".join((*prefix, str(layer), *rest)) for layer in layers]


@functools.cache
def forward(case: Case):
    """The compiled forward pass, with nothing stacked: tokens [B, T] → logits [B, T, V]."""
    graphdef, state = nnx.split(model(case))
    run = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
    return lambda ids: np.asarray(run(state, jnp.asarray(ids, jnp.int32)))


@functools.cache
def logits(case: Case) -> Float[np.ndarray, "B T V"]:
    """Of the case's own tokens."""
    return forward(case)(tokens(case))

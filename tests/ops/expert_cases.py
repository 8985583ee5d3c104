"""Routed experts on one device and on meshes: examples, their outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from llama4_jax.ops.experts import DOWN_AXES, GATE_UP_AXES, ExpertWeights, experts
from llama4_jax.sharding import TRAINING, MeshConfig, activation_spec, parameter_spec, use_rules

MESHES = {
    "expert 8": MeshConfig(data=1, expert=8),
    "expert 4, tensor 2": MeshConfig(data=1, expert=4, tensor=2),
    "data 2, expert 2, tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "fsdp 2, expert 4": MeshConfig(data=1, fsdp=2, expert=4),
    "expert 4, context 2": MeshConfig(data=1, expert=4, context=2),
    "fsdp 4, tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
}
EVEN, SKEWED, ONE = "even", "skewed", "one"


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `lax.ragged_all_to_all` says that it does, which XLA has not on a CPU."""
    every = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    me = jax.lax.axis_index(axis_name)
    row = jnp.arange(len(output))
    for operand, start, size, to in zip(*every, strict=True):
        place = row - to[me]
        came = (place >= 0) & (place < size[me])
        output = jnp.where(came[:, None], operand[jnp.where(came, start[me] + place, 0)], output)
    return output


def example(load: str, top_k: int = 1, batch: int = 8, seq: int = 6, num_experts: int = 8, seed: int = 0):
    draw = np.random.default_rng(seed)
    dim, width = 16, 8
    if load == ONE:
        expert = np.full((batch, seq, top_k), 3) + np.arange(top_k)
    else:
        odds = np.full(num_experts, 1.0) if load == EVEN else np.exp(-1.5 * np.arange(num_experts))
        expert = np.argsort(-np.log(odds) + draw.gumbel(size=(batch, seq, num_experts)), axis=-1)[..., :top_k]
    expert = np.where(draw.random((batch, seq, 1)) < 0.1, num_experts, expert)  # padding
    weights = ExpertWeights(
        draw.normal(0, 0.3, (num_experts, 2, dim, width)).astype(np.float32),
        draw.normal(0, 0.3, (num_experts, width, dim)).astype(np.float32),
    )
    x, gate = draw.normal(size=(batch, seq, dim)), draw.random((batch, seq, top_k))
    return x.astype(np.float32), expert.astype(np.int32), gate.astype(np.float32), weights


@functools.partial(jax.jit, static_argnames=("transport", "mesh", "rules", "matmul"))
def value_and_gradients(x, expert, gate, weights, *, transport="auto", mesh=None, rules=TRAINING, matmul="default"):
    def loss(x, gate, weights):
        with use_rules(rules):
            y = experts(x, expert, gate, weights, transport=transport, matmul=matmul)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gate, weights)
    return y, gradients


def on_mesh(arguments, mesh, transport, rules=TRAINING, matmul="default"):
    x, *_, weights = arguments
    with jax.set_mesh(mesh), use_rules(rules):
        tokens = activation_spec(x.shape, "rows", "seq", "embed")
        places = (
            tokens, tokens, tokens,
            ExpertWeights(
                parameter_spec(weights.gate_up.shape, *GATE_UP_AXES), parameter_spec(weights.down.shape, *DOWN_AXES)
            ),
        )  # fmt: skip
        arguments = jax.tree.map(lambda a, p: jax.device_put(a, NamedSharding(mesh, p)), arguments, places)
        return value_and_gradients(*arguments, transport=transport, mesh=mesh, rules=rules, matmul=matmul)


def assert_equal(mine, theirs, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(np.abs(b).max()))

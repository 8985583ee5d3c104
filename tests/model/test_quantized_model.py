"""A model with quantized matrices computes what one with the numbers they stand for does, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.infer.generate import generate
from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.quantized import is_of_decoder, matrices, quantized
from llama4_jax.ops.quantization import Quantized, Scheme, dequantize
from llama4_jax.sharding import SERVING, TRAINING, MeshConfig, make_mesh, parameter_sharding, use_rules
from llama4_jax.weights.load import named_variables

CONFIG = ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=64, expert_mlp_dim=64,
    num_experts=4, top_k=2, moe_interval=2, nope_interval=2, attention_chunk=8, context_length=64, init_std=0.2,
)  # fmt: skip
INT8, INT4, FP8 = Scheme("int8"), Scheme("int4", 16), Scheme("fp8")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)


@pytest.fixture(scope="module")
def model() -> Llama4:
    return Llama4(CONFIG, scan_layers=False)


@jax.jit
def logits_of(model: Llama4) -> jax.Array:
    return model(TOKENS)


@functools.partial(jax.jit, static_argnames=("scheme", "activations"))
def few_bits_of(model: Llama4, scheme: Scheme, activations: str = "auto") -> Llama4:
    """Compiled at once: operation by operation it takes longer."""
    return quantized(model, scheme, activations=activations)


@jax.jit
def dequantized(model: Llama4) -> Llama4:
    """The same numbers, as a model that is not quantized has them."""
    copy = nnx.eval_shape(lambda: Llama4(model.config, scan_layers=False))
    ours, theirs = named_variables(model), named_variables(copy)
    where = {matrix.name: {"start": matrix.start, "num_contract": matrix.num_contract} for matrix in matrices(copy)}
    for name, variable in theirs.items():
        value = ours[name].get_value()
        if name + "_scale" in ours:
            value = dequantize(Quantized(value, ours[name + "_scale"].get_value()), **where[name])
        variable.set_value(value)
    return copy


def on(mesh: jax.sharding.Mesh, model: Llama4) -> Llama4:
    """A copy whose parameters are where serving has them."""
    graphdef, state = nnx.split(model)
    placed = jax.tree.map(
        lambda v: v.replace(
            jax.device_put(v.get_value(), parameter_sharding(v.shape, v.axes, mesh, "parameter", SERVING))
        ),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return nnx.merge(graphdef, placed)


@pytest.mark.parametrize("scheme", [INT8, INT4, FP8], ids=str)
def test_logits_are_those_of_the_numbers_that_are_meant(model, scheme):
    few_bits = few_bits_of(model, scheme, activations="float")
    expected = logits_of(dequantized(few_bits))
    assert np.abs(logits_of(few_bits) - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(expected - logits_of(model)).max() > 1e-3 * np.abs(expected).max()


def test_every_matrix_of_the_decoder_is_quantized_and_nothing_else(model):
    before, after = named_variables(model), named_variables(few_bits_of(model, INT8))
    for name, variable in before.items():
        matrix = variable.get_value().ndim > 1 and name.startswith("layers.") and "router" not in name
        assert matrix == (name + "_scale" in after) == (after[name].get_value().dtype == jnp.int8), name
        if not matrix:
            np.testing.assert_array_equal(after[name].get_value(), variable.get_value())
    scales = {name for name in after if name not in before}
    assert len(scales) == 2 * 4 + 2 + 4 and all(after[name].get_value().dtype == jnp.float32 for name in scales)
    assert all(variable.get_value().dtype == jnp.float32 for variable in before.values())  # the model given is unharmed


def test_a_scheme_may_be_chosen_matrix_by_matrix(model):
    def scheme(name: str) -> Scheme | None:
        return INT4 if name == "lm_head.kernel" else INT8 if ".moe." in name else None

    mixed = nnx.eval_shape(lambda: quantized(model, scheme))
    dtypes = {name: variable.get_value().dtype for name, variable in named_variables(mixed).items()}
    assert dtypes["lm_head.kernel"] == jnp.int4 and dtypes["layers.1.moe.router.kernel"] == jnp.int8
    assert dtypes["layers.1.moe.down"] == jnp.int8 and dtypes["layers.0.mlp.down.kernel"] == jnp.float32
    assert not is_of_decoder("layers.1.moe.router.kernel") and not is_of_decoder("vision.layers.0.attention.q.kernel")


def test_scanned_layers_come_one_by_one():
    config = dataclasses.replace(CONFIG, num_layers=4)
    one_by_one, scanned = (
        nnx.eval_shape(lambda scan=scan: quantized(Llama4(config, scan_layers=scan), INT8)) for scan in (False, True)
    )
    assert nnx.eval_shape(lambda: Llama4(config, scan_layers=True)).decoder.repeats == 2
    assert jax.tree.structure(nnx.state(scanned)) == jax.tree.structure(nnx.state(one_by_one))
    assert jax.tree.leaves(nnx.state(scanned)) == jax.tree.leaves(nnx.state(one_by_one))


def test_a_model_that_cannot_be_quantized_says_which_matrix(model):
    with pytest.raises(
        ValueError, match=r"layers.0.attention.[qkv].kernel has 32 inputs, which groups of 64 do not div"
    ):
        quantized(model, Scheme("int4", 64))
    with pytest.raises(ValueError, match=r"layers.0.attention.[qkv].kernel is quantized already"):
        quantized(quantized(model, INT8), INT8)


def test_of_experts_both_matrices_are_quantized_or_neither(model):
    with pytest.raises(ValueError, match=r"of layers.1.moe.gate_up and layers.1.moe.down one is quantized"):
        nnx.eval_shape(lambda: quantized(model, lambda name: INT8 if name.endswith("moe.down") else None))


def test_shapes_alone_say_what_a_quantized_model_takes():
    """For the planner: nothing is allocated."""
    precision = Precision(params="bfloat16", compute="bfloat16")
    abstract = nnx.eval_shape(
        lambda: quantized(Llama4(CONFIG, precision=precision, scan_layers=False), Scheme("int4", 16))
    )
    variables = named_variables(abstract)
    down, scale = (variables[f"layers.1.moe.down{end}"] for end in ("", "_scale"))
    assert down.get_value() == jax.ShapeDtypeStruct((4, 64, 32), jnp.int4)
    assert scale.get_value() == jax.ShapeDtypeStruct((4, 4, 32), jnp.bfloat16)
    assert scale.axes == ("experts", "mlp", "embed")
    assert variables["layers.0.attention.o.kernel_scale"].get_value().shape == (4, 32)
    per_channel = named_variables(nnx.eval_shape(lambda: quantized(Llama4(CONFIG, scan_layers=False), INT8)))
    assert per_channel["layers.1.moe.gate_up_scale"].axes == ("experts", "gate_up", None, "mlp")


@pytest.mark.parametrize(
    ("mesh", "scheme", "rules"),
    [
        (MeshConfig(fsdp=2, expert=2, tensor=2), INT8, SERVING),
        (MeshConfig(data=2, tensor=4), INT4, SERVING),
        (MeshConfig(expert=4, tensor=2), FP8, TRAINING),  # as in scoring
    ],
)
def test_on_a_mesh_the_numbers_are_the_same(model, mesh, scheme, rules):
    few_bits = few_bits_of(model, scheme)
    expected = logits_of(few_bits)
    mesh = make_mesh(mesh)
    placed = on(mesh, few_bits)
    down = placed.decoder.rest[1].moe.down[...]
    assert down.dtype == scheme.number.dtype and len({str(s.index) for s in down.addressable_shards}) > 1
    with jax.set_mesh(mesh), use_rules(rules):
        logits = jax.jit(lambda model: model(TOKENS))(placed)
    # int8 sums of int8 activations are exact, but what comes before is not: a number may round to the other side.
    assert np.abs(logits - expected).max() < (2e-2 if scheme == INT8 else 1e-5) * np.abs(expected).max()
    assert np.abs(logits - expected).mean() < (1e-3 if scheme == INT8 else 1e-6) * np.abs(expected).max()


def test_greedy_tokens_are_those_of_a_pass_over_the_whole_row(model):
    few_bits = few_bits_of(model, INT4)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]]
    replies = generate(few_bits, prompts, max_new_tokens=5)
    rows = np.zeros((2, 12), np.int32)
    for row, prompt, reply in zip(rows, prompts, replies, strict=True):
        row[: len(prompt) + 5] = prompt + reply
    best = np.argmax(jax.jit(lambda model, rows: model(rows))(few_bits, rows), axis=-1)
    for row, prompt, reply in zip(best, prompts, replies, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 4].tolist() == reply


def test_groups_that_a_mesh_would_cut_are_said(model):
    few_bits = few_bits_of(model, Scheme("int4", 32))  # down has two groups, and its inputs go to four devices
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with pytest.raises(ValueError, match="axis has size 2, which mesh.tensor=4 does not divide"):
        on(mesh, few_bits)

"""Layout, recomputation and precision change how the model is compiled, never what it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.model.config import ModelConfig, Precision
from llama4_jax.model.llama4 import Llama4
from llama4_jax.sharding import MeshConfig, hlo, make_mesh

SIZES = dict(
    vocab_size=50, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, expert_mlp_dim=24,
    num_experts=3, attention_chunk=8, temperature_floor=4, context_length=64, init_std=0.08,
)  # fmt: skip
hidden = jax.jit(lambda model, tokens: model.hidden(tokens))
logits = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs))
TOKENS = jax.random.randint(jax.random.key(1), (2, 21), 0, 50)


@pytest.mark.parametrize(("num_layers", "moe_interval"), [(4, 1), (5, 2), (7, 3), (2, 2)])
def test_scanned_and_unscanned_layers_give_the_same_numbers(num_layers, moe_interval):
    config = ModelConfig(**SIZES, num_layers=num_layers, moe_interval=moe_interval, nope_interval=2)
    scanned, unscanned = Llama4(config), Llama4(config, scan_layers=False)
    (a, a_stats), (b, b_stats) = hidden(scanned, TOKENS), hidden(unscanned, TOKENS)
    np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a_stats, b_stats)
    assert a_stats.counts.shape == (config.num_moe_layers, 3)
    np.testing.assert_allclose(hidden(scanned.unscanned(), TOKENS)[0], b, atol=1e-6)


def test_unstacking_gives_the_layout_that_was_never_stacked():
    config = ModelConfig(**SIZES, num_layers=9, moe_interval=2)
    ours, theirs = (nnx.state(m) for m in (Llama4(config).unscanned(), Llama4(config, scan_layers=False)))
    flat, expected = (nnx.to_flat_state(state) for state in (ours, theirs))
    assert [path for path, _ in flat] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(flat, expected, strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
        assert a.axes == b.axes and len(a.axes) == a[...].ndim


def test_every_parameter_names_each_of_its_axes():
    model = Llama4(ModelConfig(**SIZES, num_layers=9, moe_interval=2, query_scale="ssmax_bias", router_bias=True))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert len(variable.axes) == variable[...].ndim, path


@functools.cache
def value_and_grad(remat, scan_layers):
    """The compiled program, and the state that it is for."""
    config = ModelConfig(**SIZES, num_layers=6, moe_interval=0, nope_interval=2)
    graphdef, state = nnx.split(Llama4(config, remat=remat, scan_layers=scan_layers))
    loss = lambda state: jnp.mean(jnp.square(nnx.merge(graphdef, state).hidden(TOKENS)[0]))  # noqa: E731
    return jax.jit(jax.value_and_grad(loss)).lower(state).compile(), state


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_recomputing_activations_changes_no_gradient_and_saves_memory(remat, scan_layers):
    (plain, state), (saving, _) = value_and_grad("none", scan_layers), value_and_grad(remat, scan_layers)
    for a, b in zip(jax.tree.leaves(plain(state)), jax.tree.leaves(saving(state)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    if scan_layers and remat == "full":
        assert saving.memory_analysis().temp_size_in_bytes < 0.8 * plain.memory_analysis().temp_size_in_bytes


def test_an_unknown_remat_policy_lists_the_known_ones():
    with pytest.raises(ValueError, match="remat must be one of none, dots, full, offload, got 'some'"):
        Llama4(ModelConfig(**SIZES, num_layers=2), remat="some")


def test_the_three_dtypes_are_set_apart():
    config = ModelConfig(**SIZES, num_layers=4)
    model = Llama4(config, precision=Precision(params="float32", compute="bfloat16", logits="float32"))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    states = jax.eval_shape(lambda: model.hidden(TOKENS)[0])
    assert states.dtype == jnp.bfloat16 and jax.eval_shape(model.logits, states).dtype == jnp.float32
    model = Llama4(config, precision=Precision(params="bfloat16", compute="bfloat16", logits="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(model, TOKENS).dtype == jnp.bfloat16


def test_bfloat16_stays_near_float32():
    config = ModelConfig(**SIZES, num_layers=4, moe_interval=0)  # without routers, whose choices may flip
    exact = logits(Llama4(config), TOKENS)
    rounded = logits(Llama4(config, precision=Precision(compute="bfloat16")), TOKENS)
    assert float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max()) < 0.02


def test_the_numbers_of_a_seed_do_not_depend_on_the_dtype():
    config = ModelConfig(**SIZES, num_layers=4)
    a = nnx.state(Llama4(config, seed=3), nnx.Param)
    b = nnx.state(Llama4(config, seed=3, precision=Precision(params="bfloat16")), nnx.Param)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y), a, b)


def test_packed_documents_give_what_each_gives_alone():
    """Positions, chunks, temperature and masks all start anew with each document of a row."""
    model = Llama4(ModelConfig(**SIZES, num_layers=4, moe_interval=2))
    lengths = (13, 9, 11)
    tokens = jax.random.randint(jax.random.key(2), (1, 40), 0, 50)
    segment_ids = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([*lengths, 7]), total_repeat_length=40)[None]
    positions = jnp.concatenate([jnp.arange(n) for n in (*lengths, 7)])[None]
    packed = logits(model, tokens, positions=positions, segment_ids=segment_ids)
    start = 0
    for n in lengths:
        alone = logits(model, tokens[:, start : start + n])
        np.testing.assert_allclose(packed[:, start : start + n], alone, atol=1e-5)
        start += n


@pytest.mark.parametrize("devices", [1, 8])
def test_dots_keeps_products_on_a_mesh_too_and_computes_only_what_is_cheap_again(devices):
    """By what the compiled program executes, in bfloat16, whose products are within a custom VJP, and with experts,
    which are within `shard_map`."""
    config = ModelConfig(**{**SIZES, "num_experts": 4, "embed_dim": 64}, num_layers=2, moe_interval=2, nope_interval=2)
    mesh = make_mesh(MeshConfig(fsdp=min(2, devices), expert=min(2, devices)), jax.devices()[:devices])
    tokens = jax.random.randint(jax.random.key(1), (8, 32), 0, 50)

    def run(remat):
        with jax.set_mesh(mesh):
            model = Llama4(config, remat=remat, precision=Precision(compute="bfloat16"))
            graphdef, state = nnx.split(model)
            rows = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(("data", "fsdp", "expert"))))

            def loss(state, rows):
                return jnp.mean(jnp.square(nnx.merge(graphdef, state).hidden(rows)[0].astype(jnp.float32)))

            lowered = jax.jit(jax.value_and_grad(loss)).lower(state, rows)
            # Not as conftest.py would have it: without contraction, bfloat16 is rounded elsewhere.
            compiled = lowered.compile(
                {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": False}
            )
            return hlo.costs(compiled.as_text()).total_flops, jax.tree.leaves(compiled(state, rows))

    (none, right), (dots, kept), (full, _) = (run(remat) for remat in ("none", "dots", "full"))
    assert none < dots < none + 0.5 * (full - none)  # attention alone comes again
    for a, b in zip(right, kept, strict=True):  # XLA:CPU keeps float32 within what it fuses, which is not the same
        np.testing.assert_allclose(a, b, atol=2**-6 * float(jnp.abs(a).max()))

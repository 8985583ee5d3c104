"""LoRA in the model and its step: what it begins with, what learns, and that no layout changes the numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lora_cases import EVERYTHING, MODEL, logits, new_model, random_factors

from llama4_jax import Llama4
from llama4_jax.config import RunConfig
from llama4_jax.data.batch import Batch
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import LoraConfig, Precision, VisionConfig
from llama4_jax.model.lora import Factor, adapted
from llama4_jax.model.quantized import is_of_decoder, quantized
from llama4_jax.ops.quantization import Quantized, Scheme, dequantize, quantize
from llama4_jax.ops.quantized_matmul import quantized_dot, quantized_grouped_row_gradient
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.train.next_token import next_token
from llama4_jax.train.optimizer import OptimizerConfig
from llama4_jax.train.step import make_trainer
from llama4_jax.weights.load import QuantizedMatrices

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 320, (2, 24)), jnp.int32)


def built(lora: LoraConfig | None = None) -> Llama4:
    return new_model() if lora is None else adapted(new_model(), lora)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_logits_are_the_bases_bit_for_bit(dtype):
    models = [built(), built(EVERYTHING)]
    for model in models:
        model.precision = Precision(params=dtype, compute=dtype)
    theirs, ours = (logits(model, TOKENS) for model in models)
    np.testing.assert_array_equal(ours, theirs)
    random_factors(models[1])
    assert np.abs(logits(models[1], TOKENS) - theirs).max() > 0.1


def factor_gradients(model: Llama4, tokens=TOKENS) -> dict[str, np.ndarray]:
    graphdef, factors, rest = nnx.split(model, Factor, ...)
    ones = jnp.ones(tokens.shape, jnp.float32)
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), None, None, ones, ones)

    @jax.jit
    def gradient(factors):
        return jax.grad(lambda f: next_token(nnx.merge(graphdef, f, rest), batch).total)(factors)

    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(gradient(factors))}


def test_gradients_reach_every_factor_and_of_experts_exactly_those_that_saw_tokens():
    model = built(EVERYTHING)
    random_factors(model)
    tokens = TOKENS[:1, :4]  # too few for all experts
    *_, router = model(tokens, return_router=True)
    seen = np.isin(np.arange(5), np.asarray(router.experts))
    gradients = factor_gradients(model, tokens)
    assert len(gradients) == 32
    for name, gradient in gradients.items():
        if "moe.gate_up_lora" in name or "moe.down_lora" in name:
            np.testing.assert_array_equal(np.abs(gradient).reshape(5, -1).max(1) > 0, seen, err_msg=name)
        else:
            assert np.abs(gradient).max() > 0, name


def test_targets_choose_layers_by_the_names_of_precision_rules_and_the_router_only_by_its_own():
    def layers(*targets: str) -> set[str]:
        state = nnx.state(built(LoraConfig(rank=2, targets=targets)), Factor)
        return {".".join(map(str, path[2:-1])) for path, _ in nnx.to_flat_state(state)}

    assert layers("layers.*.attention.q", "layers.1.moe.experts") == {
        "0.attention.q.lora", "1.attention.q.lora", "1.moe.gate_up_lora", "1.moe.down_lora",
    }  # fmt: skip
    assert not any("router" in name for name in layers("layers.*"))
    assert layers("*.moe.router") == {"1.moe.router.lora"}


def test_a_target_that_chooses_nothing_and_a_rank_that_is_too_large_are_named():
    with pytest.raises(ValueError, match=r"'layers.\*.atention.q' chooses no layer. Did you mean layers.\*.attention"):
        built(LoraConfig(rank=2, targets=("layers.*.atention.q",)))
    with pytest.raises(ValueError, match="layers.1.moe.router has 32 inputs and 5 outputs, and so the rank 5 at most"):
        built(dataclasses.replace(EVERYTHING, rank=8))
    with pytest.raises(ValueError, match=r"layers.1.moe.gate_up has 32 inputs and 32 outputs"):
        built(LoraConfig(rank=33, targets=("*.experts",)))
    one_of_two = LoraConfig(rank=2, targets=("layers.1.attention.q",))
    with pytest.raises(ValueError, match=r"layers.1.attention.q is one and layers.0.attention.q is none\): set scan_l"):
        nnx.eval_shape(lambda: adapted(Llama4(TWO), one_of_two))
    for wrong in ({"rank": -1}, {"dropout": 1.0}, {"alpha": 0.0}, {"targets": ()}):
        with pytest.raises(ValueError, match=f"lora.{next(iter(wrong))}"):
            LoraConfig(**({"rank": 2} | wrong))
    with pytest.raises(ValueError, match="lora.rank is 0, which is no adapters"):
        LoraConfig(alpha=3.0)


def test_rank_scaling():
    assert LoraConfig(rank=16, alpha=32.0).scale == 2 and LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8


@pytest.mark.parametrize("scheme", [Scheme("int4", 8), Scheme("int8"), Scheme("fp8")], ids=str)
def test_the_gradient_of_a_quantized_product_is_that_of_the_dequantized_matrix(scheme):
    draw = np.random.default_rng(0)
    x, w = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((12, 32), (3, 2, 32, 16)))
    sizes, expert = jnp.asarray([5, 0, 6], jnp.int32), jnp.array([0] * 5 + [2] * 6)
    q, one = quantize(w, scheme, start=2), quantize(w[0, 0], scheme)
    whole, exact = dequantize(q, start=2), {"precision": "highest"}
    pairs = [
        (lambda x: quantized_dot(x, one, activations="float"), lambda x: jnp.dot(x, dequantize(one), **exact)),
        (
            lambda x: quantized_grouped_row_gradient(jnp.cos(x[:, :16, None] * jnp.ones(2)).swapaxes(1, 2), q, sizes,
                                                     jnp.float32)[:11],
            lambda x: jnp.einsum("rpo,rpio->ri", jnp.cos(x[:11, None, :16] * jnp.ones((2, 1))), whole[expert], **exact),
        ),
    ]  # fmt: skip
    ours, plain = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in pairs[0])
    np.testing.assert_allclose(ours, plain, atol=3e-6 * np.abs(plain).max())
    ours, plain = (f(x) for f in pairs[1])
    np.testing.assert_allclose(ours, plain, atol=3e-6 * np.abs(plain).max())


def test_factors_beside_a_quantized_model_and_their_gradients_are_those_beside_the_dequantized_one():
    lora = LoraConfig(rank=4, alpha=8.0)
    few_bits = quantized(built(), Scheme("int8", 8), activations="float")
    whole = built()
    for (path, variable), (_, small) in zip(
        nnx.to_flat_state(nnx.state(whole)),
        [(p, v) for p, v in nnx.to_flat_state(nnx.state(few_bits)) if not str(p[-1]).endswith("_scale")],
        strict=True,
    ):
        if small[...].dtype == jnp.int8:
            values = dict(nnx.to_flat_state(nnx.state(few_bits)))
            scale = values[(*path[:-1], f"{path[-1]}_scale")][...]
            start = {"gate_up": 2, "down": 1}.get(path[-1], 0)
            num_contract = 2 if path[-2] == "o" else 1
            variable.set_value(dequantize(Quantized(small[...], scale), start=start, num_contract=num_contract))
    found = []
    for model in (adapted(few_bits, lora), adapted(whole, lora)):
        random_factors(model)
        found.append((logits(model, TOKENS), factor_gradients(model)))
    (ours, gradients), (expected, expected_gradients) = found
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    for name, gradient in expected_gradients.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=2e-4 * np.abs(gradient).max(), err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# The step: two equal layers, so that they can be scanned

TWO = dataclasses.replace(MODEL, moe_interval=1, nope_interval=0, num_experts=4, num_kv_heads=2, context_length=16)


def step_config(**fields) -> RunConfig:
    defaults = {
        "name": "small",
        "model": TWO,
        "lora": LoraConfig(rank=4, alpha=8.0),
        "data": DataConfig(seq_len=16, batch_size=8),
        "optimizer": OptimizerConfig(peak_lr=2e-2, warmup_steps=0),
        "steps": 20,
    }
    return RunConfig(**{**defaults, **fields})


@functools.cache
def losses(mesh: MeshConfig = MeshConfig(data=1), few_bits: bool = False, **fields) -> tuple[float, ...]:  # noqa: B008
    config = step_config(**fields)
    base = QuantizedMatrices(lambda name: Scheme("int8", 8) if is_of_decoder(name) else None, lambda _: jnp.bfloat16)
    made = make_mesh(mesh, jax.devices()[: mesh.named_size])
    trainer = make_trainer(config, made, next_token, base if few_bits else None)
    draw = np.random.default_rng(0)
    with jax.set_mesh(trainer.mesh):
        state, found = trainer.init(), []
        assert not any("lora" in str(path) for path, _ in nnx.to_flat_state(state.fixed))
        for _ in range(3):
            tokens, targets = draw.integers(0, 320, (2, 8, 16), dtype=np.int32)
            ids = np.ones_like(tokens)
            places = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
            batch = Batch(tokens, targets, places, ids, ids.astype(np.float32), ids)
            state, metrics = trainer.step(state, batch, None)
            found.append(float(metrics.loss))
    return tuple(found)


def test_accumulation_on_a_mesh_of_experts_tensors_and_fsdp_gives_the_same_losses():
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    np.testing.assert_allclose(losses(mesh, grad_accumulation=2), losses(), rtol=3e-6)


def test_beside_a_base_of_few_bits_a_mesh_gives_the_same_losses():
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    one = losses(few_bits=True)
    np.testing.assert_allclose(losses(mesh, few_bits=True), one, rtol=3e-6)
    assert abs(one[0] - losses()[0]) > 1e-6, "the base was rounded"


def test_dropout_is_new_in_every_step_and_the_same_where_layers_are_not_scanned_or_are_recomputed():
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.5)
    dropped = losses(lora=lora)
    np.testing.assert_allclose(losses(lora=lora, scan_layers=False, remat="full"), dropped, rtol=1e-6)
    assert dropped[0] == pytest.approx(losses()[0], rel=1e-6), "B is 0 at first"
    assert abs(dropped[2] - losses()[2]) > 1e-3


def test_the_optimizer_keeps_moments_of_factors_alone():
    abstract = make_trainer(step_config(), make_mesh(MeshConfig(data=1), jax.devices()[:1]), next_token).abstract
    factors = sum(x.size for x in jax.tree.leaves(abstract.params))
    moments = sum(x.size for x in jax.tree.leaves(abstract.optimizer) if x.ndim)
    assert moments == 2 * factors > 0 and factors < sum(x.size for x in jax.tree.leaves(abstract.fixed)) / 4


def test_pictures_reach_factors_of_the_vision_encoder_and_the_projector():
    vision = VisionConfig(embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24, image_size=8, patch_size=4,
                          adapter_dim=16, output_dim=16, patch_token_id=300)  # fmt: skip
    model = Llama4(dataclasses.replace(MODEL, vision=vision), scan_layers=False)
    pixels = jnp.asarray(np.random.default_rng(1).integers(0, 256, (1, 1, 8, 8, 3)), jnp.uint8)
    tokens = jnp.asarray([[5, 300, 7, 8]], jnp.int32)
    before = model(tokens, images=pixels)
    model = adapted(model, LoraConfig(rank=2, targets=("vision.*", "projector")))
    np.testing.assert_array_equal(np.asarray(model(tokens, images=pixels)), np.asarray(before))
    random_factors(model)
    graphdef, factors, rest = nnx.split(model, Factor, ...)

    def total(factors):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, factors, rest)(tokens, images=pixels)))

    gradients = nnx.to_flat_state(jax.jit(jax.grad(total))(factors))
    assert len(gradients) == 20
    for path, gradient in gradients:
        assert np.abs(np.asarray(gradient[...])).max() > 0, path

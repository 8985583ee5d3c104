"""Every linear layer multiplies as the precision says: by name, by the first rule that fits, and nowhere else."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from llama4_jax.model.config import MATMULS, ModelConfig, Precision, VisionConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.ops.dot_general import DOT_GENERALS

CONFIG = ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=5, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24, expert_mlp_dim=8,
    num_experts=2, nope_interval=2, moe_interval=2, attention_chunk=8,
    vision=VisionConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32, image_size=8, patch_size=4, adapter_dim=16,
                        output_dim=16, patch_token_id=3),
)  # fmt: skip


def matmuls(model: nnx.Module) -> dict[str, str]:
    """By the attributes' names."""
    found = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {name: module.matmul for name, module in found.items() if hasattr(module, "matmul")}


def built(*rules: str, matmul: str = "fp8", **how) -> dict[str, str]:
    return matmuls(nnx.eval_shape(lambda: Llama4(CONFIG, precision=Precision(matmul=matmul, rules=rules), **how)))


def test_the_config_and_the_ops_know_the_same_names():
    assert set(MATMULS) == set(DOT_GENERALS)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_all_layers_take_it_but_the_router_and_the_head(scan_layers):
    chosen = built(scan_layers=scan_layers)
    exact = {name for name in chosen if name.endswith(("router", "lm_head"))}
    assert len(exact) >= 2
    assert all(matmul == ("default" if name in exact else "fp8") for name, matmul in chosen.items())
    for part in (
        "attention.q",
        "attention.o",
        "mlp.down",
        "moe",
        "moe.shared.gate_up",
        "vision.patch_embed",
        "projector",
    ):
        assert any(name.endswith(part) for name in chosen), part


def test_the_first_rule_that_fits_decides():
    chosen = built("layers.*.attention.q=fp8_row", "*.attention.*=bf16", "vision.*=default", scan_layers=False)
    assert chosen["decoder.rest.3.attention.q"] == "fp8_row"
    assert chosen["decoder.rest.3.attention.k"] == "bf16"
    assert chosen["vision.rest.0.attention.q"] == "bf16" and chosen["vision.rest.0.mlp.fc1"] == "default"
    assert chosen["decoder.rest.3.moe"] == chosen["decoder.rest.3.moe.shared.down"] == "fp8"


def test_layers_are_counted_through_scanned_groups_and_what_is_left_over():
    scanned = built("layers.4.*=bf16")  # two repetitions of two, and a fifth
    assert {matmul for name, matmul in scanned.items() if name.startswith("decoder.rest.0.")} == {"bf16"}
    assert {m for name, m in scanned.items() if name.startswith("decoder.group.") and "router" not in name} == {"fp8"}


def test_the_router_and_the_head_obey_rules_that_name_them_alone():
    chosen = built("*.moe.*=fp8_row", "layers.*=bf16", "*=fp8_row")
    assert {m for name, m in chosen.items() if name.endswith(("router", "lm_head"))} == {"default"}
    chosen = built("*.moe.router=fp8", "lm_head=bf16")
    assert {m for name, m in chosen.items() if name.endswith("router")} == {"fp8"} and chosen["lm_head"] == "bf16"


def test_the_routed_experts_have_a_name_of_their_own():
    chosen = built("*.moe.experts=fp8_row", scan_layers=False)
    assert chosen["decoder.rest.1.moe"] == "fp8_row" and chosen["decoder.rest.1.moe.shared.down"] == "fp8"


def test_a_models_numbers_follow():
    tokens = jnp.arange(16).reshape(2, 8)
    config = dataclasses.replace(CONFIG, vision=None, num_layers=2)
    exact, same, rounded, bf16 = (
        Llama4(config, precision=precision)(tokens)
        for precision in (
            Precision(),
            Precision(matmul="fp8", rules=("*=default",)),
            Precision(matmul="fp8"),
            Precision(matmul="bf16"),
        )
    )
    assert jnp.array_equal(exact, same)
    error = [float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)) for x in (bf16, rounded)]
    assert 0 < error[0] < 5e-3 < error[1] < 0.1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rules": ("layers.0.*",)}, "'layers.0.*' must be PATTERN=MATMUL, such as layers.0"),
        ({"rules": ("layers.0.*=fp4",)}, "must be PATTERN=MATMUL, .* with a matmul of default, bf16"),
        ({"rules": ("=bf16",)}, "'=bf16' must be PATTERN=MATMUL"),
    ],
)
def test_a_mistake_is_named(wrong, words):
    with pytest.raises(ValueError, match=words):
        Precision(**wrong)


def test_rules_that_tell_scanned_layers_apart_say_what_to_do():
    with pytest.raises(ValueError, match=r"layers.0.attention.k: bf16, layers.2.attention.k: fp8\): set scan_layers"):
        built("layers.0.*=bf16")
    assert built("layers.0.*=bf16", scan_layers=False)["decoder.rest.0.attention.k"] == "bf16"


@pytest.mark.parametrize("rule", ["layrs.0.*=bf16", "layers.9.*=bf16", "router=fp8"])
def test_a_rule_that_decides_for_no_layer_is_an_error(rule):
    with pytest.raises(ValueError, match="decides for no layer. The layers are .*layers.*.moe.experts.*projector"):
        built(rule)

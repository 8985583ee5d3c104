"""Where a config says float32, every product of floats is asked to be one: unasked, a GPU's tensor cores would multiply
tf32, and a TPU bfloat16. A CPU's numbers do not show it, so the programs are read."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llama4_jax.config import RunConfig
from llama4_jax.data.batch import empty_batch
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import Precision
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.presets import preset
from llama4_jax.model.quantized import quantized
from llama4_jax.ops.attention import attention
from llama4_jax.ops.dot_general import dot_general
from llama4_jax.ops.quantization import Scheme
from llama4_jax.sharding import MeshConfig, make_mesh
from llama4_jax.train.next_token import next_token
from llama4_jax.train.step import make_trainer

PRODUCT = re.compile(r"stablehlo\.dot_general .*?: \(tensor<([^>]*)>, tensor<([^>]*)>\)")


def inexact(lowered: jax.stages.Lowered) -> tuple[int, list[str]]:
    """How many products of float32 a program has, and those of them that leave the precision to the platform."""
    found = [line for line in lowered.as_text().splitlines() if (m := PRODUCT.search(line)) and "f32" in m[1] + m[2]]
    return len(found), [line.strip()[:300] for line in found if "precision = [HIGHEST, HIGHEST]" not in line]


def training_step(precision: Precision) -> jax.stages.Lowered:
    config = RunConfig(name="float32", model=preset("tiny"), data=DataConfig(seq_len=256, batch_size=2), steps=1,
                       precision=precision, remat="full")  # fmt: skip
    trainer = make_trainer(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]), next_token)
    return trainer.step.lower(trainer.abstract, empty_batch(2, 256, 0), None)


def test_a_training_step_in_float32_has_no_product_that_a_gpu_would_round():
    count, wrong = inexact(training_step(Precision()))
    assert count > 20 and not wrong, wrong[0]


def test_a_training_step_in_bfloat16_multiplies_float32_in_the_router_alone():
    count, wrong = inexact(training_step(Precision(params="float32", compute="bfloat16")))
    assert count and not wrong, wrong[0]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_reading_and_decoding_in_float32_have_none_either(weights):
    model = Llama4(preset("tiny"), scan_layers=False)
    model = model if weights is None else quantized(model, Scheme(weights), activations="float")
    graphdef, state = nnx.split(model)
    for tokens in (1, 32):

        def step(state, tokens):
            model = nnx.merge(graphdef, state)
            hidden, cache = model.step(tokens, model.empty_cache(2, 64))
            return model.logits(hidden), cache

        count, wrong = inexact(jax.jit(step).lower(state, jnp.ones((2, tokens), jnp.int32)))
        assert count > 10 and not wrong, wrong[0]


def test_whoever_asks_for_another_precision_gets_it():
    x = jnp.ones((8, 8))
    contract = (((1,), (0,)), ((), ()))
    with jax.default_matmul_precision("tensorfloat32"):
        text = jax.jit(lambda x: dot_general(x, x, contract)).lower(x).as_text()
    assert "HIGHEST" not in text
    positions = jnp.arange(8)[None]
    q = jnp.ones((1, 2, 8, 16))
    at = {"q_positions": positions, "k_positions": positions, "scale": 1.0, "implementation": "flash"}
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(lambda q: attention(q, q, q, **at)).lower(q).as_text()
    assert "HIGHEST" not in text

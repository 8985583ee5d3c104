"""config.json holds a whole run, says what is wrong with it, and tells which changes matter."""

import dataclasses
import json

import pytest

from llama4_jax.config import RunConfig, differences, from_json, to_json
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import ModelConfig, RopeScaling
from llama4_jax.sharding import MeshConfig
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config(**fields) -> RunConfig:
    model = ModelConfig(
        vocab_size=320, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
        expert_mlp_dim=16, num_experts=4, context_length=64, rope_scaling=RopeScaling(), rope_layers=(True, False),
        attention_chunk=None, router_bias=True,
    )  # fmt: skip
    data = DataConfig(sources=("stdlib", "text:a.txt"), weights=(1.0, 3.0), seq_len=32, batch_size=8)
    return RunConfig(**{"name": "r", "model": model, "data": data, "steps": 9, **fields})


def edited(edit) -> str:
    tree = json.loads(to_json(config()))
    edit(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    "fields",
    [{}, {"eval_batches": None, "mesh": MeshConfig(data=2, expert=4), "grad_accumulation": 4},
     {"balance": BalanceConfig(bias_rate=1e-3), "optimizer": OptimizerConfig(schedule="wsd"), "remat": "full"}],
)  # fmt: skip
def test_a_config_survives_json_unchanged(fields):
    assert from_json(to_json(config(**fields))) == config(**fields)


def test_whole_numbers_are_taken_for_floats_and_stay_floats():
    got = from_json(edited(lambda tree: tree["optimizer"].update(weight_decay=0)))
    assert got.optimizer.weight_decay == 0.0 and isinstance(got.optimizer.weight_decay, float)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda tree: tree.pop("steps"), "missing fields steps"),
        (lambda tree: tree["model"].pop("top_k"), "missing fields model.top_k"),
        (lambda tree: tree["data"].update(sequence=3), "unknown fields data.sequence"),
        (lambda tree: tree["model"]["rope_scaling"].update(extra=3), "unknown fields model.rope_scaling.extra"),
        (lambda tree: tree.update(steps="many"), "steps must be of type int, got 'many'"),
        (lambda tree: tree["optimizer"].update(peak_lr="high"), "optimizer.peak_lr must be of type float, got 'high'"),
        (lambda tree: tree.update(model=[1]), "model must be an object"),
        (lambda tree: tree["data"].update(sources="stdlib"), "data.sources must be a list"),
        (lambda tree: tree["optimizer"].update(schedule="linear"), "optimizer.schedule must be one of"),
        (lambda tree: tree.update(steps=True), "steps must be of type int, got True"),
        (lambda tree: tree.update(seed=None), "seed must be of type int, got None"),
    ],
)
def test_a_field_that_is_missing_unknown_or_of_another_type_is_named(edit, says):
    with pytest.raises(ValueError, match=says):
        from_json(edited(edit))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_file_that_is_no_config_is_a_clear_error(text):
    with pytest.raises(ValueError, match=r"config\.json"):
        from_json(text)


def test_differences_lists_what_changes_the_numbers_and_nothing_else():
    old = config()
    new = dataclasses.replace(
        old,
        model=dataclasses.replace(old.model, top_k=2, rope_scaling=None),
        optimizer=dataclasses.replace(old.optimizer, peak_lr=1.0),
        seed=3,
        grad_accumulation=2,
        precision=dataclasses.replace(old.precision, params="bfloat16"),
    )
    got = differences(old, new)
    for line in ("model.top_k: 1 -> 2", "optimizer.peak_lr: 0.0003 -> 1.0", "seed: 0 -> 3", "grad_accumulation: 1 -> 2",
                 "precision.params: 'float32' -> 'bfloat16'", "model.rope_scaling.factor: 16.0 -> None"):  # fmt: skip
        assert line in got
    names = {line.split(":")[0] for line in got if not line.startswith("model.rope_scaling")}
    assert names == {"model.top_k", "optimizer.peak_lr", "seed", "grad_accumulation", "precision.params"}


def test_what_may_change_between_a_run_and_its_resumption_is_no_difference():
    new = config(
        name="other", run_dir="elsewhere", steps=99, mesh=MeshConfig(data=2, fsdp=4), eval_every=3, eval_batches=None,
        checkpoint_every=7, keep_checkpoints=5, log_every=1, profile=True, sample_prompt="x", sample_tokens=3,
        max_bad_steps=2, remat="full", data=dataclasses.replace(config().data, prefetch=0),
    )  # fmt: skip
    assert differences(config(), new) == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"data": DataConfig(seq_len=65, batch_size=8)}, r"data\.seq_len \(65\) .* model\.context_length \(64\)"),
        ({"grad_accumulation": 3}, r"data\.batch_size \(8\) must be a multiple of grad_accumulation \(3\)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"eval_batches": 0}, "eval_batches must be at least 1, or None for all, got 0"),
        ({"name": "a/b"}, "name must be a directory's name"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_by_name(fields, says):
    with pytest.raises(ValueError, match=says):
        config(**fields)


def test_a_bias_rate_needs_a_model_with_a_bias():
    model = dataclasses.replace(config().model, router_bias=False)
    with pytest.raises(ValueError, match=r"balance\.bias_rate is 0\.001, .* model\.router_bias"):
        config(model=model, balance=BalanceConfig(bias_rate=1e-3))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mesh": MeshConfig(data=3)}, "needs 3 devices, but there are 8"),
        ({"mesh": MeshConfig(), "grad_accumulation": 2}, r"4 rows, which .* 8 x 1 x 1 = 8 does not divide.*of 16"),
        ({"mesh": MeshConfig(data=1, context=8), "data": DataConfig(seq_len=36, batch_size=8)},
         r"data\.seq_len \(36\) must be a multiple of mesh\.context \(8\)"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_divide_the_batch_is_refused_with_what_would_do(fields, says):
    with pytest.raises(ValueError, match=says):
        config(**fields).check_mesh(8)

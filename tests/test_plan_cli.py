"""`llama4 plan` as a user meets it: figures of small models on real topologies, and errors before compiling."""

import dataclasses
import importlib.util
import json
import re

import pytest

from llama4_jax import mesh_search, plan
from llama4_jax.cli import main
from llama4_jax.collective_count import count
from llama4_jax.configs import config_names, load_config
from llama4_jax.infer import generate
from llama4_jax.mesh_search import Work, estimate, meshes, misfits, nearest, ranked
from llama4_jax.model.flops import count_parameters, decode_bytes, forward_flops, train_flops_per_token
from llama4_jax.model.presets import preset
from llama4_jax.sharding import MeshConfig
from llama4_jax.sharding.chips import topology
from llama4_jax.sharding.hlo import Array

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)
SMALL = ["--model.num-layers", "2", "--context", "256", "--batch", "4"]
ON_FOUR = ["--topology", "v5e:2x2", "--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.expert", "2"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@needs_libtpu
def test_a_train_step_is_compiled_and_told(capsys, tmp_path):
    file = tmp_path / "plan.json"
    code, out, _ = run(capsys, "tiny", *ON_FOUR, *SMALL, "--remat", "full", "--json", str(file))
    figures = json.loads(file.read_text())
    assert code == 0 and figures["fits"] and "estimated MFU" in out

    model = dataclasses.replace(preset("tiny"), num_layers=2)
    count = count_parameters(model).total + 2 * model.num_experts  # and the biases of the balancing
    whole = {name: 4 * size for name, size in figures["arguments"].items()}
    assert count * 4 <= whole["parameters"] <= 1.1 * count * 4  # what is not worth splitting is on every device
    assert 2 * count * 4 <= whole["optimizer"] <= 1.1 * 2 * count * 4
    assert figures["arguments"]["batch"] == 6 * 256 * 4
    assert figures["model_flops"] == pytest.approx(train_flops_per_token(model, 256) * 4 * 256 / 4)
    # Recomputing the forward pass makes 4/3; rows of the experts are bounded, and blocks of attention are whole.
    assert 4 / 3 <= figures["flops"] / figures["model_flops"] <= 2.5
    kinds = {(sent["kind"], tuple(sent["axes"])) for sent in figures["sent"]}
    assert ("all-gather", ("fsdp",)) in kinds  # of the experts' weights, which stay split over `expert`
    assert ("ragged-all-to-all", ("expert",)) in kinds  # of the tokens
    assert figures["seconds"] == max(figures[f"{name}_seconds"] for name in ("compute", "memory", "network"))


@needs_libtpu
def test_a_train_step_sends_what_a_hand_count_says_and_nothing_else(capsys, tmp_path):
    """Dense and routed layers by turns, over all chips of a pod, with widths that fill tiles as Maverick's do."""
    file = tmp_path / "plan.json"
    model = {"num-layers": 8, "embed-dim": 1024, "num-heads": 8, "num-kv-heads": 2, "head-dim": 128, "mlp-dim": 2048,
             "expert-mlp-dim": 2048, "num-experts": 16, "moe-interval": 2, "vocab-size": 16384}  # fmt: skip
    sizes = [word for name, size in model.items() for word in (f"--model.{name}", str(size))]
    mesh = ["--topology", "v5p:2x2x4", "--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.expert", "4"]
    how = ["--batch", "16", "--context", "1024", "--remat", "full", "--precision.compute", "bfloat16"]
    code, out, _ = run(capsys, "tiny", *mesh, *sizes, *how, "--json", str(file))
    assert code == 0 and "GB by hand" in out
    sent = json.loads(file.read_text())["sent"]
    every = sum(s["bytes"] for s in sent)
    wrong = {(s["kind"], *s["axes"]): (s["bytes"], s["by_hand"]) for s in sent
             if abs(s["bytes"] - s["by_hand"]) > 2e-3 * every}  # fmt: skip
    assert not wrong


def test_by_hand_every_kernel_is_gathered_for_each_pass_and_its_gradient_is_scattered_once():
    config, mesh = load_config("scout_pretrain"), MeshConfig(data=1, fsdp=8)
    model = dataclasses.replace(preset("dense_8b"), num_layers=3)
    config = dataclasses.replace(config, model=model, remat="full", grad_accumulation=2)
    sent = {}
    for kind, axes, times, size in count(config, 16, 4096, mesh, on_tpu=False):
        sent[kind, axes] = sent.get((kind, axes), 0) + times * size
    table = model.vocab_size * model.embed_dim
    layers = count_parameters(model).total - 2 * table - 7 * model.embed_dim
    ids = 2 * 8 * 4096 * 4
    assert sent["all-gather", ("fsdp",)] == 2 * (2 * layers * 2 + table * 2) + ids
    assert sent["reduce-scatter", ("fsdp",)] == 2 * (layers + table) * 4
    assert sent["all-reduce", ("fsdp",)] == 2 * 7 * model.embed_dim * 2
    assert sent["all-to-all", ("fsdp",)] == 2 * 2 * 4096 * model.embed_dim * 2


@needs_libtpu
@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_a_serving_step_is_compiled_in_bfloat16_with_its_cache(capsys, tmp_path, step):
    file = tmp_path / "plan.json"
    code, _, _ = run(capsys, "tiny", *ON_FOUR, *SMALL, "--step", step, "--json", str(file))
    figures, model = json.loads(file.read_text()), dataclasses.replace(preset("tiny"), num_layers=2)
    assert code == 0
    slots = sum(min(spec.chunk or 256, 256) for spec in model.layers)
    cache = 4 * slots * 2 * model.num_kv_heads * model.head_dim * 2
    assert figures["arguments"]["cache"] == cache / 4 + 4 * 4  # and each row's length
    assert figures["arguments"]["parameters"] < count_parameters(model).total * 2
    first = 255 if step == "decode" else 0
    assert figures["model_flops"] == pytest.approx(forward_flops(model, first=first, last=256, logits=1))
    # A product with a single row may become elementwise work, which is not counted.
    assert 0.9 <= figures["flops"] / figures["model_flops"] < 8
    if step == "decode":
        needed = decode_bytes(model, rows=4, context=256, weight_bytes=2, cache_bytes=2)
        assert figures["model_traffic"] == needed / 4 < figures["traffic"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scoot_pretrain", "--topology", "v5p:4x4x8"], "no config 'scoot_pretrain'. Did you mean scout_pretrain?"),
        (["bogus", "--topology", "v5p:4x4x8"], "Models: scout, "),
        (["scout_pretrain", "--topology", "v5x:4x4x8"], "unknown topology 'v5x:4x4x8': expected .*v5p:4x4x8"),
        (["scout", "--topology", "v5p:2x2x1", "--mesh.tensor", "8"], "4 devices: the mesh .* needs a multiple of 8"),
        (
            ["scout", "--topology", "v5p:4x4x4", "--mesh.tensor", "16", "--mesh.data", "4"],
            "num_heads is 40, which mesh.tensor = 16 does not divide.*num_kv_heads is 8.*Nearest meshes that work: "
            "--mesh.data 8 --mesh.tensor 8",
        ),
        (["maverick", "--topology", "v5p:4x4x8", "--mesh.fsdp", "128", "--mesh.data", "1", "--batch", "96"],
         "batch_size / grad_accumulation is 96, which mesh.data x mesh.fsdp x mesh.expert = 128"),
        (["scout", "--topology", "v5p:2x2x2", "--mesh.expert", "3"], "needs a multiple of 3"),
        (["scout", "--topology", "v5p:2x2x2", "--batch", "0"], "--batch must be at least 1"),
        (["dense_8b", "--topology", "v5p:2x2x2", "--context", "200000"], "meant for 131072 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_said_in_words_before_compiling(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(plan, "make_plan", lambda *_, **__: pytest.fail("compiled"))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out
    assert err.splitlines()[-1].startswith("llama4: ")
    assert re.search(words, err), err


def test_of_gpus_there_is_an_estimate_that_says_it_was_not_compiled(capsys):
    code, out, _ = run(capsys, "scout", "--topology", "h100:4x8", "--step", "decode", "--batch", "32")
    assert code == 0 and "NOT COMPILED" in out and "32 devices" in out


@pytest.mark.parametrize(("step", "tokens"), [("train", 64 * 8192), ("prefill", 64 * 512), ("decode", 64)])
def test_a_plan_says_tokens_a_second_of_all_devices_and_of_one(step, tokens):
    here = work("scout", step, rows=64)
    made = estimate(here, MeshConfig(data=1, fsdp=4, expert=8), topology("h100:4x8"))
    assert made.tokens == tokens
    assert made.tokens_per_second == pytest.approx(tokens / made.seconds)
    assert json.loads(made.to_json())["tokens_per_second"] == pytest.approx(made.tokens_per_second)
    of_all, of_one = (
        float(re.search(rf"{who} +([\d,.]+)", made.text())[1].replace(",", "")) for who in ("of all devices", "of one")
    )
    assert of_all == pytest.approx(made.tokens_per_second, rel=0.02)
    assert of_one == pytest.approx(made.tokens_per_second / 32, rel=0.02)


@pytest.mark.parametrize("where", ["v6e:4x4", "h100:4x8"])
def test_a_config_on_a_machine_that_its_mesh_does_not_divide_is_planned_on_the_nearest_mesh(capsys, where):
    code, out, err = run(capsys, "scout_pretrain", "--topology", where)
    said = "not the mesh of scout_pretrain (--mesh.data -1 --mesh.fsdp 8 --mesh.expert 16), which does not fit"
    assert code == 1 and "DOES NOT FIT" in out and said in out and said in err
    code, _, err = run(capsys, "scout_pretrain", "--topology", where, "--mesh.fsdp", "8")  # that was asked for
    assert code == 2 and "needs a multiple of 128" in err


def test_formulas_know_what_dots_keeps_and_computes_again():
    dots, full, none = (
        dataclasses.replace(here, config=dataclasses.replace(here.config, remat=remat))
        for here in [work("scout")] for remat in ("dots", "full", "none")
    )  # fmt: skip
    mesh, where = MeshConfig(data=1, fsdp=8, expert=16), topology("v5p:4x4x8")
    kept, again, whole = (estimate(w, mesh, where) for w in (dots, full, none))
    assert whole.flops < kept.flops < again.flops
    assert again.temporaries < kept.temporaries


def test_a_search_without_a_compiler_ranks_what_fits_by_formulas(capsys):
    code, out, _ = run(capsys, "scout", "--topology", "h100:8x8", "--batch", "64", "--search")
    rows = [line for line in out.splitlines() if line.startswith("--mesh")]
    assert code == 0 and 1 < len(rows) <= 12
    assert all(" yes " in row and row.endswith("formulas") for row in rows)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])


def work(name: str, step="train", rows: int = 128, context: int = 8192) -> Work:
    options = plan.PlanOptions(name=name, topology="v5p:4x4x8", step=step, batch=rows, context=context)
    return plan.work_of(options, [])


def test_the_nearest_meshes_work_and_are_nearest():
    wanted = MeshConfig(data=1, fsdp=8, tensor=16)
    scout = work("scout")
    found = nearest(scout, wanted, 128)
    assert found[0] in (MeshConfig(data=2, fsdp=8, tensor=8), MeshConfig(data=1, fsdp=16, tensor=8))
    assert all(not misfits(scout, mesh) for mesh in found)
    assert len(set(found)) == len(found) and wanted not in found
    assert len(list(meshes(128))) == 330  # ways to deal seven factors of two to five axes


def test_estimates_fit_the_closed_counts_and_rank_what_fits_first():
    here, where = work("scout"), topology("v5p:4x4x8")
    plan_of = estimate(here, MeshConfig(data=1, fsdp=8, expert=16), where)
    total = count_parameters(preset("scout")).total
    assert plan_of.arguments["parameters"] == total * 4 / 128
    assert plan_of.arguments["optimizer"] == total * 8 / 128
    assert plan_of.flops / plan_of.model_flops == pytest.approx(4 / 3)
    order = [p.fits for _, p in ranked(here, where)]
    assert order == sorted(order, reverse=True) and order[0]


def test_operations_of_splash_attention_are_those_of_its_blocks():
    mask = Array("s8", (1, 4, 2), 0)  # 4 blocks of 256 queries, 2 of 512 keys: 1, 1, 2, 2 are visible
    q, k = Array("bf16", (3, 8, 1024, 128), 0), Array("bf16", (3, 2, 1024, 128), 0)
    block = 2 * 256 * 512 * 128
    assert plan.splash_flops("splash_mha_fwd", [mask, mask, q, k, k], []) == 3 * 8 * 6 * 2 * block
    dq = Array("bf16", (3, 2, 8, 1024, 128), 0)
    assert plan.splash_flops("splash_mha_dkv", [mask, mask, q, k, k], [dq]) == 3 * 8 * 6 * 5 * block
    assert plan.splash_flops("splash_mha_dkv", [mask, mask, q, k, k], [k, k]) == 3 * 8 * 6 * 4 * block
    assert plan.splash_flops("splash_mha_dq", [mask, mask, q, k, k], [q]) == 3 * 8 * 6 * 3 * block
    assert plan.splash_flops("gmm", [mask, q, k], []) is None


def test_decoding_one_row_reads_the_active_weights_and_the_cache():
    model = preset("scout")
    counted, cache = count_parameters(model), 2 * 8 * 128 * 48 * 4096 * 2
    norms = model.embed_dim * (2 * 48 + 1)
    embedding = (model.vocab_size - 1) * model.embed_dim  # counted whole among the active, and read for one token
    active = (counted.active - norms - embedding) * 2
    assert decode_bytes(model, rows=1, context=4096, weight_bytes=2, cache_bytes=2) == pytest.approx(active + cache)
    many = decode_bytes(model, rows=4096, context=1, weight_bytes=2, cache_bytes=0)
    assert many == pytest.approx(
        (counted.total - norms - model.vocab_size * model.embed_dim + 4096 * 5120) * 2, rel=1e-6
    )


def test_a_piece_of_a_row_costs_what_the_row_costs_more_with_it():
    model = dataclasses.replace(preset("tiny"), attention_chunk=100)
    whole = forward_flops(model, first=0, last=384, logits=384)
    parts = [forward_flops(model, first=a, last=b, logits=b - a) for a, b in ((0, 100), (100, 250), (250, 384))]
    assert sum(parts) == pytest.approx(whole)
    assert train_flops_per_token(model, 384) == pytest.approx(3 * whole / 384)


def test_configs_are_found_by_name_and_every_model_has_one_way_to_be_named():
    assert {"tiny", "scout_pretrain"} <= set(config_names())
    assert load_config("tiny").name == "tiny"
    with pytest.raises(ValueError, match=r"no config 'tinny'\. Did you mean tiny\?"):
        load_config("tinny")
    assert mesh_search.PIECE == generate._PIECE  # the step that is planned is the one that runs


@needs_libtpu
def test_decoding_scout_reads_hardly_more_than_the_chosen_experts_and_the_cache(capsys, tmp_path):
    """Four layers of it at their full width, on the chips of the whole model."""
    file = tmp_path / "plan.json"
    mesh = ["--mesh.data", "1", "--mesh.expert", "2", "--mesh.tensor", "8"]
    how = ["--step", "decode", "--batch", "16", "--context", "8192", "--model.num-layers", "4", "--json", str(file)]
    code, _, _ = run(capsys, "scout", "--topology", "v5e:4x4", *mesh, *how)
    figures = json.loads(file.read_text())
    assert code == 0
    assert 1 <= figures["traffic"] / figures["model_traffic"] < 1.1
    # The cache is updated in place: there is no second one among what lives during the step.
    assert figures["results"] < 2**20 and figures["temporaries"] < 1.5 * figures["arguments"]["cache"]

"""`llama4 plan --slots`: a server's memory and speed by formulas, against hand counts and against a real engine."""

import inspect
import json
import re

import jax
import pytest

from llama4_jax import plan
from llama4_jax.cli import main
from llama4_jax.infer.engine import Engine
from llama4_jax.model.cache import empty_cache
from llama4_jax.model.presets import preset
from llama4_jax.plan_server import READ, plan_server
from llama4_jax.sharding import MeshConfig
from llama4_jax.sharding.chips import topology

GB_A_SECOND = 3.35e12  # of an H100
ON_ONE = ["--topology", "h100:1", "--step", "decode", "--weights", "int4"]


def planned(tmp_path, *arguments: str, code: int = 0) -> dict:
    file = tmp_path / "plan.json"
    assert main(["plan", *arguments, "--json", str(file)]) == code
    return json.loads(file.read_text())


def rates(figures: dict) -> dict[tuple[int, int], float]:
    return {(rate["held"], rate["busy"]): rate["tokens_per_second"] for rate in figures["rates"]}


def test_a_server_of_scout_in_int4_on_one_h100_has_the_bytes_of_a_hand_count(tmp_path, capsys):
    figures = planned(tmp_path, "scout", *ON_ONE, "--slots", "4", "--context", "32768")
    token = 2 * 8 * 128 * 2  # keys and values of eight heads of 128 in bfloat16, in a layer
    parts = figures["parts"]
    assert parts["cache, global layers"] == 4 * 12 * 32768 * token
    assert parts["cache, chunked layers"] == 4 * 36 * 8192 * token
    weights = sum(parts[name] for name in ("values, int4", "scales", "kept in bfloat16"))
    assert weights == pytest.approx(58.6e9, rel=1e-3)
    assert figures["slot"] == (12 * 32768 + 36 * 8192) * token
    assert figures["left"] == 80e9 - figures["bytes"] > 0
    # Counts of each token of the vocabulary, and the logits of a piece of a prompt that is scored.
    assert parts["rows: settings, counts of tokens"] == pytest.approx(4 * 202_048 * 2, rel=0.01)
    assert 128 * 202_048 * 4 < parts["temporaries"] < 2**30
    each = {one["tokens"]: (one["at_its_end"], one["at_a_chunk"]) for one in figures["snapshots"]}
    assert each[4096] == (48 * 4096 * token, None)  # no chunk is full
    assert each[32768] == (figures["slot"], 12 * 32768 * token)
    out = capsys.readouterr().out
    assert "NOT COMPILED" in out and "left for snapshots" in out and "2,688.0" in out
    fit = figures["slots_that_fit"]
    assert fit == int(re.search(r"slots that fit +(\d+)", out)[1]) >= 4
    planned(tmp_path, "scout", *ON_ONE, "--slots", str(fit), "--context", "32768")
    assert not planned(tmp_path, "scout", *ON_ONE, "--slots", str(fit + 1), "--context", "32768", code=1)["fits"]


def test_tokens_a_second_are_the_memory_s_bandwidth_over_what_busy_rows_choose_and_hold(tmp_path):
    """For Scout in int4 with 2048 tokens a row, counted by hand elsewhere: 327, 892, 1184, 1698 and 2630 tokens/s."""
    figures = planned(tmp_path, "scout", *ON_ONE, "--slots", "64", "--context", "2048", "--held", "2048", "1", code=1)
    found = rates(figures)
    assert sorted({busy for _, busy in found}) == [1, 2, 4, 8, 16, 32, 64]
    for busy, wanted in ((1, 327), (8, 892), (16, 1184), (32, 1698), (64, 2630)):
        assert found[2048, busy] == pytest.approx(wanted, rel=3e-3)
    for busy in (1, 8, 64):
        dim, expert, bits = 5120, 3 * 5120 * 8192, (4 + 16 / 128) / 8
        chosen = 16 * (1 - (15 / 16) ** busy)
        layer = (2 * 40 + 2 * 8) * 128 * dim + (1 + chosen) * expert
        read = 48 * (layer * bits + dim * 16 * 2) + (202_048 + busy) * dim * 2 + busy * 48 * 4096
        assert found[1, busy] == pytest.approx(busy * GB_A_SECOND / read, rel=1e-6)


def test_a_cache_of_int8_and_weights_of_other_kinds_change_their_part_alone(tmp_path):
    asked = ["scout", "--topology", "h100:8", "--step", "decode", "--slots", "8", "--context", "8192"]
    asked += ["--mesh.data", "1", "--mesh.expert", "8"]
    plain = planned(tmp_path, *asked)
    int8 = planned(tmp_path, *asked, "--cache", "int8")
    for name in ("cache, global layers", "cache, chunked layers"):
        assert int8["parts"][name] == plain["parts"][name] / 2 * (1 + 4 / 128)
    assert int8["parts"]["parameters"] == plain["parts"]["parameters"]
    assert rates(int8)[8192, 8] > rates(plain)[8192, 8] and int8["left"] > plain["left"]
    bytes_of = {
        weights: planned(tmp_path, *asked, "--weights", weights)["bytes"] for weights in ("int8", "fp8", "int4")
    }
    assert bytes_of["int4"] < bytes_of["int8"] == bytes_of["fp8"] < plain["bytes"]


@pytest.mark.parametrize("cache", [None, "int8"])
def test_the_bytes_are_those_of_a_cache_with_arrays_in_it(cache):
    """An engine's own bytes are in `tests/serve/test_real_engine.py`."""
    options = plan.PlanOptions(name="tiny", topology="h100:1", step="decode", slots=3, context=200, cache=cache)
    made = plan_server(plan.work_of(options, []), MeshConfig(data=1), topology("h100:1"))
    model = preset("tiny")
    held = {"cache, global layers": 0, "cache, chunked layers": 0}
    for spec, layer in zip(model.layers, empty_cache(model, 3, 200, cache or "bfloat16").layers, strict=True):
        kind = "cache, global layers" if spec.chunk is None else "cache, chunked layers"
        held[kind] += sum(leaf.nbytes for leaf in jax.tree.leaves(layer))
    assert all(held.values()) and {name: made.parts[name] for name in held} == held
    assert made.slot == sum(held.values()) / 3


def test_pieces_are_of_the_engine_s_size():
    assert inspect.signature(Engine).parameters["piece"].default == READ


def test_a_mesh_splits_weights_and_slots(tmp_path):
    asked = ["scout", "--topology", "v5e:4x4", "--step", "decode", "--slots", "16", "--context", "8192"]
    one = planned(tmp_path, *asked, "--mesh.data", "1", "--mesh.expert", "2", "--mesh.tensor", "8")
    token = 2 * 8 * 128 * 2
    assert (
        one["parts"]["cache, global layers"] == 16 / 2 * 12 * 8192 * token / 8
    )  # rows over `expert`, heads over `tensor`
    assert one["slot"] == 48 * 8192 * token
    split = planned(
        tmp_path, *asked, "--weights", "int4", "--mesh.data", "1", "--mesh.context", "2", "--mesh.tensor", "8"
    )
    assert split["parts"]["cache, global layers"] == 16 * 12 * 8192 * token / 8 / 2
    assert split["parts"]["cache, chunked layers"] == 16 * 36 * 8192 * token / 8  # a chunk is whole on every device


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slots", "8"], "--slots 8 is of a server: add --step decode"),
        (["--slots", "8", "--step", "decode", "--batch", "8"], "--batch 8 and --slots 8 both say how many rows"),
        (["--slots", "0", "--step", "decode"], "--slots must be at least 1, got 0"),
        (["--held", "8", "--step", "decode"], "--held says how long .* add --slots"),
        (
            ["--held", "9000", "--slots", "2", "--step", "decode", "--context", "8192"],
            "--held 9000: .* holds 1 to 8192",
        ),
    ],
)
def test_what_is_no_server_is_refused_in_words(capsys, arguments, words):
    assert main(["plan", "scout", "--topology", "h100:8", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("llama4: ") and re.search(words, said), said

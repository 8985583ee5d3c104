"""`benchmarks/gpu.py`, which is for a GPU that is at hand for minutes: all of it runs here, at tiny size."""

import json
import pathlib
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_parts import ceilings, decode, fill, oracles, peers, right, train  # noqa: E402
from gpu_parts.report import Case, Out, timed  # noqa: E402


def outcome(run, pattern="", given=None, seconds=600.0) -> dict[str, dict]:
    """The records of a part, by case."""
    found = []
    run(Out(found.append, time.monotonic() + seconds, given, pattern), True)
    for record in found:
        assert json.loads(json.dumps(record, default=float)) == record, "a record is JSON"
    return {record["case"]: record for record in found}


def none_is_wrong(records: dict[str, dict]) -> None:
    assert records
    assert gpu.wrong({"status": "done", "records": list(records.values())}) == [], records


# ---------------------------------------------------------------------------------------------------------------------
# The parts.


def test_ceilings():
    records = outcome(ceilings.run)
    none_is_wrong(records)
    assert all(r["figures"].get("GB/s", 1) > 0 and r["figures"].get("TFLOP/s", 1) > 0 for r in records.values())
    assert len(records) == 6


def test_ops_are_held_against_float64():
    one_of_each = (
        "float32 product|attention flash, bfloat16, documents and|attention reference, float32, chunks|cache int8"
        "|products by blocks, bfloat16|in fp8_row|experts default, bfloat16|int4 weights, 8 rows$|int8 experts"
        "|entropy, float32|top_k 50, top_p 0.9|draws"
    )
    records = outcome(right.run, one_of_each)
    none_is_wrong(records)
    assert len(records) == 12, sorted(records)
    assert all(record["figures"]["ok"] is True for record in records.values())


def test_the_tiny_model_gives_the_numbers_that_are_carried_along():
    records = outcome(lambda out, tiny: right.model_cases(out))
    none_is_wrong(records)
    assert {"its logits", "its gradients", "20 training steps", "its greedy tokens", "its sampled tokens"} < set(
        records
    )
    with np.load(right.RECORDED) as numbers:
        losses = numbers["losses"]
    assert losses[-1] < losses[0] - 0.5, "the model learns, so that a wrong step would show"
    assert right.RECORDED.stat().st_size < 100_000


def test_other_numbers_than_the_cpus_are_wrong(monkeypatch):
    with np.load(right.RECORDED) as file:
        numbers = {name: file[name] for name in file.files}
    first_gradient = next(name for name in numbers if name.startswith("grad."))
    for name, case in (("losses", "20 training steps"), ("greedy", "its greedy tokens"), ("logits", "its logits"),
                       (first_gradient, "its gradients")):  # fmt: skip
        other = numbers | {name: numbers[name] + 1 if name == "greedy" else numbers[name] * 1.01}
        monkeypatch.setattr(right, "model_numbers", lambda other=other: other)
        records = outcome(lambda out, _: right.model_cases(out))
        assert [what for what, record in records.items() if record["figures"].get("ok") is False] == [case]


def test_tf32_and_nan_are_not_float32():
    exact = np.random.default_rng(0).normal(size=(8, 8))
    assert right.judged(1e-5, error=oracles.error(exact.astype(np.float32), exact))["ok"]
    tf32 = (exact.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    assert not right.judged(1e-5, error=oracles.error(tf32, exact))["ok"]
    assert not right.judged(1e-5, error=float("nan"))["ok"]


def test_a_slice_of_scout_trains():
    given = {"ceilings": {"product bfloat16 8192³": {"TFLOP/s": 700.0}}}
    some = "mlp up (default|fp8$)|whole step 1 .* default|4 experts by blocks, forward$"
    records = outcome(train.run, some, given)
    none_is_wrong(records)
    step = records["whole step 1 × 64 default"]["figures"]
    assert step["tokens/s"] > 0 and step["planned GiB"] > 0 and step["arguments GiB"] > 0
    flops = step["model TFLOP/s"]
    assert step["of the measured product"] == pytest.approx(flops / 700)
    assert "4 experts by blocks, forward" in records
    speedups = outcome(speedup_of_fp8)["fp8 against bfloat16, linear layers alone"]["figures"]
    assert speedups == {"mlp up": 2.0}


def speedup_of_fp8(out, tiny):
    out.measured |= {"mlp up default": {"ms": 3.0}, "mlp up fp8": {"ms": 1.5}, "expert products fp8": {"ms": 1.0}}
    train.ratio(out, "linear layers alone", "mlp up {}", "expert products {}")


def test_shares_of_a_profile_are_of_the_streams_alone():
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Modules"}},
        {"ph": "X", "name": "sm90_xmma_gemm_e4m3", "pid": 1, "tid": 7, "dur": 60.0},
        {"ph": "X", "name": "nvjet_hsh_128x256", "pid": 1, "tid": 7, "dur": 30.0},
        {"ph": "X", "name": "loop_add_fusion", "pid": 1, "tid": 7, "dur": 10.0},
        {"ph": "X", "name": "jit_step", "pid": 1, "tid": 8, "dur": 100.0},
        {"ph": "X", "name": "gemm", "pid": 2, "tid": 7, "dur": 500.0},
    ]
    assert train.shares_of(events) == {"share product, fp8": 0.6, "share product": 0.3, "share elementwise": 0.1}
    assert train.shares_of([]) == {}


def test_the_profiler_writes_what_is_read():
    events = train.profile(lambda: jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    assert any(event.get("ph") == "X" for event in events)
    assert any(event.get("name") == "process_name" for event in events)


def test_a_slice_decodes_and_reads():
    given = {"ceilings": {"copy": {"GB/s": 100.0}}}
    records = outcome(decode.run, "int4", given)
    none_is_wrong(records)
    figures = records["scout int4, 2 rows, 96 held"]["figures"]
    assert figures["share of copy"] == pytest.approx(figures["GB/s"] / 100)
    whole = decode.work_of(decode.slice_of("scout", "bfloat16", True), "bfloat16", 2, 96, "decode").model_traffic
    assert 0 < figures["must read GB"] < 0.6 * whole / 1e9
    assert "reading 96 tokens, scout int4" in records


def test_what_the_whole_scout_would_give_stands_beside_the_planners_formula():
    model = decode.slice_of("scout", "int4", False)
    out = Out(lambda _: None, time.monotonic() + 1, {"ceilings": {"copy": {"GB/s": 3000.0}}})
    figures = decode.token_figures(out, model, "scout", "int4", 1, 8192, 2e-3)
    head = 2 * 202_048 * 5120 / 3e12
    assert figures["all layers: tokens/s"] == pytest.approx(1 / ((2e-3 - head) * 12 + head))
    assert figures["planned tokens/s, H100"] > 50


@pytest.mark.slow
def test_peers_run_on_the_same_weights(tmp_path):
    assert peers.save(str(tmp_path), True)["transformers"]
    for contender in (peers.Ours(str(tmp_path), True), peers.Transformers(str(tmp_path), True, "sdpa")):
        figures = peers.serve(contender, True)
        assert figures["read tokens/s"] > 0 and len(figures["first tokens"]) == 4
        if isinstance(contender, peers.Ours):
            figures = peers.train(contender, True)
            assert figures["train tokens/s"] > 0 and figures["loss"] == pytest.approx(np.log(512), abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.SHARES)
def test_the_whole_of_a_part_runs_at_tiny_size(part, tmp_path):
    report = tmp_path / "out.json"
    assert gpu.main(["--tiny", "--only", part, "--minutes", "30", "--json", str(report)]) == 0
    (found,) = json.loads(report.read_text())["parts"]
    assert found["status"] == "done" and len(found["records"]) > 3


# ---------------------------------------------------------------------------------------------------------------------
# The harness.


def script(text: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(text)]


RECORD = """
    import json, sys, time
    print(json.dumps({"case": "first", "figures": {"ms": 1.5}}), flush=True)
"""


def test_a_part_that_raises_keeps_what_it_had_measured():
    found = gpu.run_part("right", script(RECORD + "    raise ValueError('no')"), 20)
    assert found["status"] == "failed: exit code 1"
    assert [record["case"] for record in found["records"]] == ["first"]
    assert gpu.wrong(found) == ["failed: exit code 1"]


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    child = tmp_path / "child"
    hang = f"""
    import subprocess
    print(json.dumps({{"case": "cut", "figures": 1}})[:9], flush=True)
    started = subprocess.Popen(["sleep", "100"])
    open({str(child)!r}, "w").write(str(started.pid))
    time.sleep(100)
    """
    start = time.monotonic()
    found = gpu.run_part("train", script(RECORD + hang), 1.0)
    assert time.monotonic() - start < 15
    assert found["status"] == "stopped: it ran past its 1 s"
    assert [record["case"] for record in found["records"]] == ["first"]
    status = pathlib.Path(f"/proc/{child.read_text()}/status")
    deadline = time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


def test_parts_run_in_order_in_the_time_that_is_left_and_the_json_is_written_after_each(tmp_path, monkeypatch, capsys):
    report, limits, written = tmp_path / "out.json", [], []

    def run_part(part, command, limit, before):
        limits.append((part, limit))
        written.append(len(json.loads(report.read_text())["parts"]) if report.exists() else 0)
        records = [{"case": "one", "figures": {"ok": part != "train", "ms": 2.0}, "seconds": 0.1},
                   {"case": "two", "skipped": "no time left", "seconds": 0.0},
                   {"case": "three", "error": "ValueError: no", "seconds": 0.0}]  # fmt: skip
        return {"part": part, "status": "done", "seconds": 1.0, "records": records[: 2 if part == "right" else 3]}

    monkeypatch.setattr(gpu, "run_part", run_part)
    code = gpu.main(["--only", "train,right,decode", "--minutes", "6", "--json", str(report)])
    assert code == 1
    assert [part for part, _ in limits] == ["right", "train", "decode"], "the most valuable first, whatever the order"
    assert written == [0, 1, 2]
    assert limits[0][1] == pytest.approx(96, abs=1) and limits[2][1] == pytest.approx(360, abs=1), "none was used"
    printed = capsys.readouterr().out
    assert "WRONG" in printed and "FAILED ValueError: no" in printed and "train: one" in printed
    assert "3 cases had no time left" in printed
    assert not list(tmp_path.glob("*.new"))


def test_figures_of_earlier_parts_are_given_to_later_ones():
    before = [
        {"part": "ceilings", "records": [{"case": "copy", "figures": {"GB/s": 3000.0}}, {"case": "x", "error": "e"}]}
    ]
    show = "import json, os; print(json.dumps({'case': 'given', 'figures': json.loads(os.environ['GPU_PARTS_GIVEN'])}))"
    found = gpu.run_part("decode", script(show), 20, before)
    assert found["records"][0]["figures"] == {"ceilings": {"copy": {"GB/s": 3000.0}}}


def test_without_a_gpu_only_the_tiny_run_runs():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--only", "ceilings"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ".", "HOME": "/tmp"},
    )  # fmt: skip
    assert done.returncode == 1 and "--tiny runs anywhere" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--only", "rigth"], ["--only", ""], ["--minutes", "0"], ["--minutes", "nan"], ["--cases", "("]]
)
def test_mistakes_on_the_command_line_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_case_that_fails_does_not_stop_the_next_and_none_begins_after_the_time():
    found = []
    out = Out(found.append, time.monotonic() + 100)
    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def case(name, function, measure=lambda program: {"ms": 1.0}):
        return Case(name, lambda: jax.jit(function).trace(square), measure)

    out.cases([case("no trace", lambda x: x.no), case("no run", lambda x: x, lambda program: program(1, 2, 3)),
               case("good", lambda x: x)])  # fmt: skip
    out.deadline = 0
    out.cases([case("late", lambda x: x)])
    by_name = {record["case"]: record for record in found}
    assert "AttributeError" in by_name["no trace"]["error"] and by_name["no run"]["error"]
    assert by_name["good"]["figures"] == {"ms": 1.0} and "compile_seconds" in by_name["good"]
    assert by_name["late"]["skipped"] == "no time left"
    assert list(by_name) == ["no trace", "no run", "good", "late"]


def test_a_timing_is_of_one_run():
    timing = timed(lambda: time.sleep(0.01), seconds=0.1)
    assert 0.009 < timing.low <= timing.median <= timing.high and timing.runs >= 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "int4", "float8_e4m3fn"])
def test_random_numbers_have_the_spread_of_weights_and_no_pattern(dtype):
    numbers = np.asarray(fill.filled((64, 3, 100), jnp.dtype(dtype), 0.02, 5)).astype(np.float64)
    assert np.isfinite(numbers).all()
    width = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}.get(dtype, 0.02 * 3**0.5)
    assert numbers.std() == pytest.approx(width / 3**0.5, rel=0.03)
    assert abs(numbers.mean()) < 0.02 * width
    unit = numbers.ravel() / numbers.std()
    assert max(abs((unit[:-lag] * unit[lag:]).mean()) for lag in (1, 2, 100, 300, 1000)) < 0.03
    other = np.asarray(fill.filled((64, 3, 100), jnp.dtype(dtype), 0.02, 6)).astype(np.float64)
    assert abs((unit * other.ravel() / other.std()).mean()) < 0.03


def test_it_imports_without_what_the_gpu_machine_lacks():
    """A lent machine has neither grain nor tyro, tensorboardX or msgspec, and this package is not installed there."""
    code = """
    import importlib.abc, sys
    missing = {"grain", "tyro", "tensorboardX", "msgspec"}
    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Missing())
    sys.path[:0] = ["benchmarks", "."]
    import gpu
    from gpu_parts import ceilings, decode, peers, right, train
    print(sorted(missing & {name.partition(".")[0] for name in sys.modules}))
    """
    done = subprocess.run(script(code), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

"""What a run writes down: metrics.jsonl, TensorBoard and a profile say the same, and say it whole."""

import gzip
import json
import re
import struct

import jax
import numpy as np
import pytest
from micro_run import EVERY, STEPS, finished_run, metrics
from tensorboardX.proto.event_pb2 import Event

from llama4_jax.train.metrics import Log, peak_flops


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory)


def test_every_step_has_its_figures(run):
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line.keys() >= {
            "loss", "bits_per_byte", "grad_norm", "tokens", "skipped", "learning_rate", "max_violation",
            "max_violation_worst", "load_entropy", "dead_experts", "gate_mean",
        }  # fmt: skip
        assert 0 <= line["load_entropy"] <= 1 and 0 < line["gate_mean"] < 1 and line["skipped"] == 0
    timed = [line for line in lines if "tokens_per_second" in line]
    assert len(timed) >= STEPS - 4 and all(0 < line["mfu"] < 1 for line in timed)


def test_train_and_heldout_bits_per_byte_fall(run):
    train = [line["bits_per_byte"] for line in metrics(run) if "loss" in line]
    heldout = [line["heldout_bits_per_byte"] for line in metrics(run) if "heldout_bits_per_byte" in line]
    assert np.mean(train[-5:]) < 0.8 * np.mean(train[:5])
    assert len(heldout) == 2 and heldout[1] < heldout[0]


def test_bytes_are_what_the_loss_is_divided_by(run):
    """Of the byte tokenizer each token is a byte, but for the ends of documents."""
    for line in metrics(run):
        if "loss" in line:
            assert line["bits_per_byte"] == pytest.approx(line["loss"] / np.log(2), rel=0.1)
            assert line["bits_per_byte"] >= line["loss"] / np.log(2)


def events(directory):
    """Of TensorBoard's files: each record is its length, a check sum, the event and a check sum."""
    for file in directory.iterdir():
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4


def test_tensorboard_has_the_same_figures(run):
    board = {
        (event.step, value.tag): value.simple_value
        for event in events(run / "tensorboard")
        for value in event.summary.value
    }
    expected = {(line["step"], name): value for line in metrics(run) for name, value in line.items() if name != "step"}
    assert board.keys() == expected.keys()
    for key, value in expected.items():
        assert board[key] == pytest.approx(value, rel=1e-6), key


def test_profile_writes_a_trace_that_perfetto_opens(run):
    (trace,) = (run / "profile").rglob("perfetto_trace.json.gz")
    assert len(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]) > 100
    assert f"a profile is in {run / 'profile'}" in (run.parent / "stdout.txt").read_text()


def test_the_console_tells_what_is_trained_how_it_goes_and_how_to_go_on(run):
    said = (run.parent / "stdout.txt").read_text()
    assert re.search(
        r"micro: [\d.]+ M parameters, [\d.]+ M of them active and [\d.]+ M for pictures; 4 x 32 tokens a step; "
        r"mesh: one device",
        said,
    )
    figures = r"loss [\d.]+  [\d.]+ bits/byte  lr \S+  grad [\d.]+  [\d,]+ tokens/s  MFU \d+%  MaxVio"
    assert re.search(rf"step {STEPS}/{STEPS}  {figures}", said)
    assert re.search(rf"step {STEPS}: held-out [\d.]+ bits per byte", said)
    assert f"python infer.py generate {run} --prompt 'def '" in said


def test_checkpoints_are_kept_as_many_as_the_config_says(run):
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == list(range(2 * EVERY, STEPS + 1, EVERY))


def test_a_line_that_was_cut_and_the_lines_of_steps_taken_again_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    log = Log(tmp_path, first_step=1, steps=5)
    log.write(2, {"loss": 1.5})
    log.close()
    assert metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]


def test_a_figure_that_is_not_finite_leaves_the_file_readable_json(tmp_path):
    log = Log(tmp_path, first_step=0, steps=5)
    log.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "tokens": 4})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    refuse = pytest.fail
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": "nan", "grad_norm": "inf", "tokens": 4}


def test_a_cpus_peak_is_measured_once_for_all_its_virtual_devices():
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        assert 1e9 < peak_flops(8) < 1e13

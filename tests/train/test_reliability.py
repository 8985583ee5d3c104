"""A run can be killed, starved of disk or damaged at any moment; the same command goes on, with the same numbers."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from micro_run import (
    EVERY,
    ROOT,
    STEPS,
    arrays,
    assert_same_run,
    copy_of,
    disturb,
    end,
    environment,
    figures,
    finished_run,
    last_step,
    new_place,
    start,
    train,
)  # fmt: skip

from llama4_jax.train.lock import LOCK, locked
from llama4_jax.weights.checkpoint import Checkpoints

LATER = tuple(range(2 * EVERY, STEPS + 1, EVERY))[1:]  # checkpoints after the first that is kept
FIRST_KEPT = 2 * EVERY


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture
def place(tmp_path_factory, request):
    return new_place(tmp_path_factory, re.sub(r"\W+", "_", request.node.name))


@pytest.fixture
def set_back(undisturbed, place):
    """A copy of the undisturbed run as it was at its first checkpoint that is kept."""
    return copy_of(undisturbed, place, without_steps=LATER)


def writing(run):
    """Whether a checkpoint is half written just now."""
    return any(run.glob("checkpoints/*orbax-checkpoint-tmp*"))


def test_a_run_killed_again_and_again_equals_one_never_killed(undisturbed, place):
    run = place / "micro"
    killed_at = []
    moments = [
        lambda: writing(run),  # while the first checkpoint is written
        lambda: last_step(run) > EVERY,  # just after one, which may be complete or not
        lambda: last_step(run) > 2 * EVERY + 3 and writing(run),
    ]
    for moment in moments:
        process = start(place)
        disturb(process, moment, signal.SIGKILL)
        assert end(process).returncode == -signal.SIGKILL
        killed_at.append(last_step(run))
    assert killed_at[-1] < STEPS
    result = train(place)
    assert result.returncode == 0, result.stderr
    assert "resumed at step" in result.stdout
    assert_same_run(run, undisturbed)


def test_sigterm_saves_at_that_very_step_and_exits_0_and_the_rest_is_the_same(undisturbed, place):
    run = place / "micro"
    process = start(place)
    disturb(process, lambda: last_step(run) >= 3, signal.SIGTERM)
    result = end(process)
    assert result.returncode == 0, result.stderr
    stopped_at = int(re.search(r"stopped at step (\d+)", result.stdout)[1])
    assert 3 <= stopped_at < STEPS
    assert arrays(run)["step"] == stopped_at
    result = train(place)
    assert f"resumed at step {stopped_at} of {STEPS}" in result.stdout
    assert_same_run(run, undisturbed)


def test_a_run_goes_on_on_a_mesh_of_eight_with_the_same_figures_but_for_rounding(undisturbed, set_back, place):
    result = train(place, "--mesh.data", "2", "--mesh.expert", "2", "--mesh.tensor", "2")
    assert result.returncode == 0, result.stderr
    assert "mesh: data 2, expert 2, tensor 2" in result.stdout and "More of it:" in result.stdout
    assert f"resumed at step {FIRST_KEPT} of {STEPS}" in result.stdout
    for mine, theirs in zip(figures(set_back), figures(undisturbed), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def damage(checkpoint):
    """Cuts one file of its arrays short and overwrites the others."""
    files = [path for path in (checkpoint / "model").rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for i, path in enumerate(files):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if i == 0 else b"\xff" * len(content))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(undisturbed, place):
    run = copy_of(undisturbed, place)
    damage(run / "checkpoints" / str(STEPS))
    half = run / "checkpoints" / f"{STEPS + EVERY}.orbax-checkpoint-tmp-7"
    shutil.copytree(run / "checkpoints" / str(STEPS - EVERY), half)
    result = train(place)
    assert result.returncode == 0, result.stderr
    assert f"{run}/checkpoints/{STEPS} is damaged" in result.stdout
    assert f"resumed at step {STEPS - EVERY} of {STEPS}" in result.stdout  # neither the damaged nor the half-written
    assert_same_run(run, undisturbed)


def test_a_flipped_bit_in_any_array_of_the_newest_checkpoint_makes_it_damaged(undisturbed, place):
    sound = arrays(undisturbed, STEPS - EVERY)
    for seed in range(4):
        run = copy_of(undisturbed, place / str(seed), without_steps=LATER[:-2])
        draw = random.Random(seed)
        item = ("model", "training")[seed % 2]
        files = [path for path in (run / "checkpoints" / str(STEPS) / item).rglob("d/*") if path.stat().st_size > 5000]
        path = draw.choice(sorted(files))
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        said = []
        checkpoints = Checkpoints(run, say=said.append)
        found = checkpoints.newest(abstract=lambda: shapes(undisturbed))
        checkpoints.close()
        if found.step == STEPS:  # the bit was in what nothing reads any more
            kept, got = arrays(undisturbed), {**found.model, **found.training}
        else:
            # By its checksum, or by zstd's own where the bit was in the frame of what is compressed.
            assert found.step == STEPS - EVERY and f"{run / 'checkpoints' / str(STEPS)} is damaged" in said[0]
            kept, got = sound, {**found.model, **found.training}
        for name, x in got.items():
            np.testing.assert_array_equal(x, kept[name], err_msg=name)


def shapes(run):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints = Checkpoints(run, read_only=True)
    items = [checkpoints._handlers[i].metadata(run / "checkpoints" / str(STEPS) / i) for i in ("model", "training")]
    return tuple({n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for n, x in i.items()} for i in items)


def test_a_second_training_of_a_run_is_refused_while_the_first_lives_and_only_so_long(undisturbed, place):
    run = copy_of(undisturbed, place)
    before = content(run)
    with locked(epath.Path(run)):
        result = train(place)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert re.search(rf"{run} is being trained already, by process {os.getpid()} on \S+\. .* --name", result.stderr)
        assert {**content(run), run / LOCK: b""} == before
    # One that is killed holds it no longer, though a child that it forked lives on.
    code = f"""
import os, signal, time
from etils import epath
from llama4_jax.train.lock import locked

with locked(epath.Path({str(run)!r})):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code]
    killed = subprocess.run(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with locked(epath.Path(run)):
        pass


def test_when_every_checkpoint_is_damaged_it_says_so_and_trains_nothing(set_back, place):
    damage(set_back / "checkpoints" / str(FIRST_KEPT))
    before = content(set_back)
    result = train(place)
    assert result.returncode == 2
    assert f"none of the checkpoints [{FIRST_KEPT}]" in result.stderr and "all are damaged" in result.stderr
    assert content(set_back) == before


def small_disk():
    """No file may grow beyond 40 kB: the figures fit, a checkpoint does not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails, as on a full disk, and nothing is killed
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(undisturbed, set_back, place):
    result = train(place, preexec_fn=small_disk)
    assert result.returncode == 2
    assert f"a checkpoint could not be written to {set_back}/checkpoints" in result.stderr
    assert f"The earlier checkpoints are intact: {FIRST_KEPT}." in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr) < 1000
    kept = arrays(undisturbed, FIRST_KEPT)
    for name, x in arrays(set_back, FIRST_KEPT).items():
        np.testing.assert_array_equal(x, kept[name], err_msg=name)
    result = train(place)
    assert f"resumed at step {FIRST_KEPT} of {STEPS}" in result.stdout, result.stderr
    assert_same_run(set_back, undisturbed)


def content(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--name", "micro", "--optimizer.peak-lr", "0.5", "--data.seq-len", "16"],
         ["another config", "optimizer.peak_lr: 0.01 -> 0.5", "data.seq_len: 32 -> 16", "--name"]),
        (["--model.num-expert", "8"], ["--model.num-expert", "--model.num-experts"]),
        (["--mesh.data", "3"], ["data.batch_size", "mesh.data", "3", "multiple of 3"]),
        (["--data.sources", "text:EMPTY"], ["data.sources", "empty.txt", "empty"]),
        (["--steps", "0"], ["steps must be at least 1, got 0"]),
    ],
    ids=["another config", "unknown field", "indivisible batch", "empty data", "bad value"],
)  # fmt: skip
def test_a_mistake_is_one_clear_error_and_touches_nothing(undisturbed, place, options, says):
    empty = place / "empty.txt"
    empty.touch()
    run = copy_of(undisturbed, place)
    before = content(run)
    result = train(place, *(option.replace("EMPTY", str(empty)) for option in options))
    assert result.returncode == 2, result.stdout
    for words in says:
        assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert content(run) == before


def test_flags_that_make_it_another_run_give_it_another_name_and_the_same_command_finds_it(undisturbed, place):
    run = copy_of(undisturbed, place)
    before = content(run)
    options = ("--data.shuffle-seed", "1")  # which compiles nothing anew
    process = start(place, *options)
    variant = place / "micro,data.shuffle_seed=1"
    disturb(process, lambda: last_step(variant) >= 2, signal.SIGTERM)
    result = end(process)
    assert result.returncode == 0, result.stderr
    stopped_at = int(re.search(r"stopped at step (\d+)", result.stdout)[1])
    assert stopped_at < STEPS and content(run) == before
    result = train(place, *options)
    assert f"resumed at step {stopped_at} of {STEPS}" in result.stdout, result.stderr
    assert last_step(variant) == STEPS and content(run) == before
    assert figures(variant) != figures(run)


def test_a_mistyped_config_is_answered_with_the_nearest_one(capsys):
    import train as script

    assert script.main(["tinny"]) == 2
    assert "Did you mean tiny?" in capsys.readouterr().err


def test_losses_that_stay_infinite_stop_the_run_and_spare_the_last_checkpoint(place):
    options = ("--name", "micro", "--optimizer.peak-lr", "1e30", "--max-bad-steps", "3", "--checkpoint-every", "1")
    result = train(place, *options)
    assert result.returncode == 1
    assert re.search(r"not finite in 3 steps in a row", result.stderr) and "optimizer.peak_lr" in result.stderr
    assert "Traceback" not in result.stderr
    run = place / "micro"
    saved = arrays(run)
    assert saved["step"] < STEPS
    for name, x in saved.items():
        assert np.isfinite(x).all(), name
    assert max(line["skipped"] for line in figures(run)) == 3

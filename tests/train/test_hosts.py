"""Several processes are one run: the numbers of one process, whichever of them save, stop, fail or die.

Sums over processes are added in another order than those within one, so figures are compared to rounding; what is
saved is compared bit for bit.
"""

import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import several_processes
from micro_run import disturb, end, figures, last_step, metrics
from several_processes import EVERY, STEPS, end_all, new_place, run_all, start_all

from llama4_jax.train import hosts
from llama4_jax.weights.checkpoint import Checkpoints

MESH = ["--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.context", "2", "--mesh.data", "1"]
# JAX's heartbeat may be late by this, instead of the time that a product run allows for.
IMPATIENT = "import sys, train; from llama4_jax.train import hosts; hosts.HEARTBEAT_SECONDS = 6; "
IMPATIENT += "sys.exit(train.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def alone(folder):
    """The run in a single process with eight devices."""
    place = new_place(folder / "alone")
    (result,) = run_all(place, [MESH])
    assert result.returncode == 0, result.stderr
    assert "process" not in result.stdout and "Gloo" not in result.stderr
    return place / "micro"


def at_step(run: Path, place: Path, step: int) -> Path:
    """The run as it was when it had saved that step, in a new place."""
    copy = new_place(place) / "micro"
    shutil.copytree(run, copy)
    for later in range(step + EVERY, STEPS + 1, EVERY):
        shutil.rmtree(copy / "checkpoints" / str(later))
    lines = [json.dumps(line) + "\n" for line in metrics(run) if line["step"] <= step]
    (copy / "metrics.jsonl").write_text("".join(lines))
    return copy


def assert_same_figures(run: Path, alone: Path) -> None:
    ours, theirs = figures(run), figures(alone)
    assert len(ours) == len(theirs) == STEPS + 1
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-6), mine["step"]


def arrays_of(run: Path) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint, whichever devices wrote it."""
    checkpoints = Checkpoints(run, read_only=True)
    metadata = checkpoints._manager.item_metadata(checkpoints.steps()[-1])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = [
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in metadata[item].items()}
        for item in ("model", "training")
    ]
    saved = checkpoints.newest(abstract=lambda: tuple(abstract))
    checkpoints.close()
    return {name: np.asarray(x) for name, x in {**saved.model, **saved.training}.items()}


def errors(results) -> list[str]:
    """What each process says at last, without what JAX and Gloo say."""
    return [result.stderr[result.stderr.rindex("train.py:") :] for result in results]


def test_four_processes_go_on_from_a_checkpoint_of_one_stop_together_and_one_goes_on_from_theirs(alone, folder):
    run = at_step(alone, folder / "four", EVERY)
    processes = start_all(run.parent, [MESH] * 4)
    disturb(processes[2], lambda: last_step(run) >= 2 * EVERY, signal.SIGTERM)
    results = end_all(processes)
    for number, result in enumerate(results):
        assert result.returncode == 0, result.stderr
        # Tensor parallelism goes over the first two processes and the last two: they hold the same rows.
        rows = "rows 0 to 3" if number < 2 else "rows 4 to 7"
        assert re.search(rf"process {number} \(.+\) of 4: 2 of 8 devices \(cpu\), {rows} of the 8", result.stdout)
    assert f"resumed at step {EVERY} of {STEPS}" in results[0].stdout
    assert not any("step" in result.stdout for result in results[1:])  # one of them speaks for all
    stopped_at = int(re.search(r"stopped at step (\d+)", results[0].stdout)[1])
    assert 2 * EVERY <= stopped_at < STEPS and arrays_of(run)["step"] == stopped_at

    (result,) = run_all(run.parent, [MESH])
    assert f"resumed at step {stopped_at} of {STEPS}" in result.stdout, result.stderr
    assert_same_figures(run, alone)


def test_a_checkpoint_is_the_same_whichever_number_of_processes_wrote_it(alone, folder):
    script, source = str(Path(several_processes.__file__)), alone
    for count in (4, 2):
        target = folder / f"copied_by_{count}"
        target.mkdir()
        results = run_all(folder, [[str(source), str(target), "2"]] * count, [script])
        assert [result.returncode for result in results] == [0] * count, results
        source = target
    saved, copied = arrays_of(alone), arrays_of(source)
    assert saved.keys() == copied.keys()
    for name, x in saved.items():
        np.testing.assert_array_equal(copied[name], x, err_msg=name)

    # a flipped bit in what any of the processes wrote is noticed
    written = [path for path in (source / "checkpoints").rglob("ocdbt.process_*/d/*") if path.stat().st_size > 2000]
    assert {path.parent.parent.name for path in written} == {"ocdbt.process_0", "ocdbt.process_1"}
    noticed = set()
    for number, path in enumerate(written):
        hurt = shutil.copytree(source, folder / f"hurt_{number}")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        (hurt / path.relative_to(source)).write_bytes(content)
        try:
            read = arrays_of(hurt)
        except ValueError as error:
            assert "all are damaged" in str(error)
            noticed.add(path.parent.parent.name)
        else:  # a part of the process's own index, which that of all has replaced
            for name, x in saved.items():
                np.testing.assert_array_equal(read[name], x, err_msg=name)
    assert noticed == {"ocdbt.process_0", "ocdbt.process_1"}


def test_when_one_of_two_is_killed_the_other_ends_and_the_same_command_goes_on(alone, folder):
    place = new_place(folder / "killed")
    run, two = place / "micro", [["--mesh.data", "4"]] * 2
    processes = start_all(place, two, ["-c", IMPATIENT, str(place / "config.py")])
    saved = run / "checkpoints" / str(EVERY)  # in the background: it may be complete some steps later
    disturb(processes[1], lambda: saved.exists() and last_step(run) > EVERY, signal.SIGKILL)
    survivor, killed = end_all(processes)
    assert killed.returncode == -signal.SIGKILL and survivor.returncode == 1
    (line,) = errors([survivor])
    assert "another process of this run was killed" in line and "run the same command on every host" in line

    results = run_all(place, two)
    assert [result.returncode for result in results] == [0, 0], results
    assert re.search(rf"resumed at step [48] of {STEPS}", results[0].stdout) and "More of it:" in results[0].stdout
    assert_same_figures(run, alone)


def test_when_the_first_process_dies_the_others_say_so_and_end(folder):
    place = new_place(folder / "first_dies")
    processes = start_all(place, [["--mesh.data", "4"]] * 2)
    assert any("process 1" in line for line in processes[1].stdout)  # what it has of the run: now it compiles
    processes[0].kill()
    survivor = end(processes[1])
    assert survivor.returncode == 1
    assert "another process of this run was killed" in errors([survivor])[0]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_host_that_fails_later_says_why_and_the_others_say_it_too(folder, failing):
    place = new_place(folder / f"fails_{failing}")
    fail = f"""
import os, sys, train
from llama4_jax.train import loop

def describe(*_):
    raise OSError("the disk is gone")

if os.environ["JAX_PROCESS_ID"] == "{failing}":
    loop.describe = describe
sys.exit(train.main(sys.argv[1:]))
"""
    results = run_all(place, [["--mesh.data", "4"]] * 2, ["-c", fail, str(place / "config.py")])
    assert (results[failing].returncode, results[1 - failing].returncode) == (2, 1), results
    assert errors(results)[failing] == "train.py: the disk is gone\n"
    says = rf"train.py: process {failing} \(.+\) has stopped the run: the disk is gone\nNothing that was saved is lost"
    assert re.match(says, errors(results)[1 - failing])


@pytest.mark.parametrize(
    ("variables", "joins"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": None}, False),  # what a batch script has before srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
    ids=["nothing", "srun", "srun of one task", "sbatch", "a pod of no job"],
)
def test_a_process_joins_others_only_where_there_are_some(monkeypatch, variables, joins):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-4]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    if "SLURM_NTASKS" in variables:
        variables = slurm | variables
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert hosts._in_a_cluster() == joins
    assert hosts.count() == 1


@pytest.mark.parametrize(
    ("address", "count", "index"),
    [(None, "2", "0"), ("host:1", "2", None), ("host:1", "two", "0"), ("host:1", "2", "2")],
)
def test_variables_that_do_not_fit_together_are_named(monkeypatch, address, count, index):
    for name, value in zip(
        ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), (address, count, index), strict=True
    ):
        if value is not None:
            monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(hosts.OnEveryHost, match="JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID belong"):
        hosts.connect()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([["--steps", "8"], ["--steps", "8", "--optimizer.peak-lr", "0.5"]],
         ["the hosts differ in config and code", "process 1 (", "optimizer.peak_lr: 0.5 instead of 0.01"]),
        ([["--mesh.data", "3"]] * 2, ["the mesh (mesh.data=3) needs 3 devices, but there are 2"]),
    ],
    ids=["another config", "mesh larger than the machines"],
)  # fmt: skip
def test_what_does_not_fit_is_one_error_on_every_host_before_anything_is_compiled(folder, request, options, says):
    place = new_place(folder / re.sub(r"\W+", "_", request.node.name))
    results = run_all(place, [[*own, "--name", "micro"] for own in options])
    assert {result.returncode for result in results} == {2}, results
    found = errors(results)
    assert len(set(found)) == 1, found
    for words in says:
        assert words in found[0]
    assert not (place / "micro").exists()


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (False, r"setting up failed on process 1 \(.+\): data.sources: own.txt matches no file"),
        (True, r"the hosts differ in data. From process 0 \(.+\) differ:\n  process 1 "),
    ],
    ids=["missing", "other"],
)
def test_data_that_one_host_has_not_is_an_error_on_all(folder, request, there, says):
    place = new_place(folder / re.sub(r"\W+", "_", request.node.name))
    disks, text = [place / "disk 0", place / "disk 1"], (folder / "text.txt").read_text()
    for disk in disks:
        disk.mkdir()
    (disks[0] / "own.txt").write_text(text)
    if there:
        (disks[1] / "own.txt").write_text(2 * text)
    results = run_all(place, [["--mesh.data", "4", "--data.sources", "text:own.txt"]] * 2, where=disks)
    assert [result.returncode for result in results] == [2, 2], results
    first, other = errors(results)
    assert first == other and re.search(says, first)

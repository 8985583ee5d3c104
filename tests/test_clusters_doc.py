"""Every command that docs/clusters.md starts on a machine fits that machine."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import shlex

import pytest
import tyro

from llama4_jax.cli import main
from llama4_jax.config import RunConfig
from llama4_jax.configs import load_config
from llama4_jax.mesh_search import estimate, misfits
from llama4_jax.plan import work_of
from llama4_jax.plan_options import PlanOptions
from llama4_jax.sharding.chips import topology

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "clusters.md").read_text()
PLANS = re.findall(r"`(llama4 plan \S+ --topology [^`]+)`", TEXT)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)


def number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])


def devices_of(section: str, text: str) -> int:
    """Of the machine that a section of the document describes, by its own words."""
    match section:
        case "One slice of Cloud TPU VMs":
            return number(r"--accelerator-type=v5p-(\d+)", text) // 2  # of two cores each
        case "Several slices":
            return number(r"--accelerator-type=v5p-(\d+)", text) // 2 * number(r"--node-count=(\d+)", text)
        case "GKE":
            chips = [int(n) for n in re.search(r"tpu-topology: (\d+)x(\d+)", text).groups()]
            assert chips[0] * chips[1] == number(r"parallelism: (\d+)", text) * number(r"google.com/tpu: (\d+)", text)
            return chips[0] * chips[1]
        case "Slurm":
            return number(r"--nodes=(\d+)", text) * number(r"--gpus-per-node=(\d+)", text)
        case "Any other hosts":
            return 32 if "JAX_COORDINATOR_ADDRESS=10.0.0.1" in text else 4
    raise AssertionError(section)


def commands() -> list[tuple[int, list[str]]]:
    """(devices, words after "train") of each training that a section starts."""
    found = []
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if title in ("Which mesh", "Python and the package") or title.startswith("What it prints"):
            continue
        joined = body.replace("\\\n", " ")
        args = re.findall(r"args: \[(.*)\]", joined)
        lines = re.findall(r"(?:llama4 train|train\.py) ([^'\n#&]*)", joined)
        lines += [" ".join(json.loads(f"[{some}]")[1:]) for some in args]
        for i, line in enumerate(lines):
            virtual = title == "Any other hosts" and i > 0
            found.append((4 if virtual else devices_of(title, joined), shlex.split(line)))
    return found


def test_each_training_of_the_document_divides_the_machine_of_its_section():
    every = commands()
    assert len(every) >= 6
    for devices, (name, *flags) in every:
        config = tyro.cli(RunConfig, args=flags, default=load_config(name), config=(tyro.conf.AvoidSubcommands,))
        mesh = config.mesh.resolve(devices)
        options = PlanOptions(name=name, topology="h100:8")
        work = dataclasses.replace(work_of(options, []), config=config)
        assert not misfits(work, mesh), (name, flags, devices)


def test_the_plans_of_the_document_are_of_commands_that_it_starts_and_divide_their_machines():
    assert len(PLANS) >= 4
    for command in PLANS:
        name, _, where, *flags = shlex.split(command)[2:]
        here = topology(where)
        work = work_of(PlanOptions(name=name, topology=where), flags)
        mesh = work.config.mesh.resolve(here.num_devices)
        assert not misfits(work, mesh), command
        assert f"`llama4 train {' '.join([name, *flags])}`" in TEXT
        if not here.chip.torus:
            assert estimate(work, mesh, here).fits, command


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in PLANS if "h100" not in c])
def test_the_plans_for_tpus_fit_when_they_are_compiled(capsys, tmp_path, command):
    file = tmp_path / "plan.json"
    assert main([*shlex.split(command)[1:], "--json", str(file)]) == 0
    assert json.loads(file.read_text())["fits"]

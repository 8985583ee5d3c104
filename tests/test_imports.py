"""Imports point one way, so that each folder can be read without the ones built on it."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# folder: what it may import of this project, beside itself and what reads or writes small files or finds directories
ANYWHERE = {"llama4_jax/atomic.py", "llama4_jax/untrusted_json.py", "llama4_jax/hub.py"}
ALLOWED = {
    "llama4_jax/sharding": set(),
    "llama4_jax/inputs": set(),
    "llama4_jax/ops": {"llama4_jax/sharding"},
    "llama4_jax/model": {"llama4_jax/sharding", "llama4_jax/ops"},
    "llama4_jax/data": {"llama4_jax/inputs"},
    "llama4_jax/weights": {
        "llama4_jax/sharding", "llama4_jax/ops", "llama4_jax/model", "llama4_jax/inputs", "llama4_jax/config.py",
    },
    "llama4_jax/infer": {
        "llama4_jax/sharding", "llama4_jax/ops", "llama4_jax/model", "llama4_jax/inputs", "llama4_jax/processor.py",
    },
    "llama4_jax/serve": {
        "llama4_jax/model", "llama4_jax/inputs", "llama4_jax/infer", "llama4_jax/processor.py",
        "llama4_jax/serve_options.py",
    },
    "llama4_jax/train": {
        "llama4_jax/sharding", "llama4_jax/ops", "llama4_jax/model", "llama4_jax/inputs", "llama4_jax/data",
        "llama4_jax/weights", "llama4_jax/infer", "llama4_jax/config.py",
        "llama4_jax/processor.py",
    },
}  # fmt: skip


def project_imports(file: pathlib.Path) -> set[str]:
    """Folders (or top-level modules) of this project that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            assert parts[0] not in ("sharding", "configs"), f"{file}: a user's own {name} would be imported instead"
            if parts[0] == "llama4_jax" and len(parts) > 1:
                module = ROOT / "llama4_jax" / f"{parts[1]}.py"
                found.add(f"llama4_jax/{parts[1]}.py" if module.exists() else f"llama4_jax/{parts[1]}")
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        wrong = project_imports(file) - ALLOWED[folder] - ANYWHERE - {folder}
        assert not wrong, f"{file.relative_to(ROOT)} must not import {', '.join(sorted(wrong))}"


def test_every_folder_has_a_rule():
    folders = {f"llama4_jax/{p.name}" for p in (ROOT / "llama4_jax").iterdir() if (p / "__init__.py").exists()}
    assert folders - {"llama4_jax/configs"} == set(ALLOWED)


@pytest.mark.parametrize("folder", ["inputs", "data"])
def test_words_and_batches_are_made_without_jax(folder):
    """So that data workers start fast and hold no accelerator."""
    # Of data the batch and what reads it; grain, under the loader, imports jax itself.
    names = {"inputs": "*", "data": "[bderst]*"}[folder]
    files = (ROOT / "llama4_jax" / folder).glob(f"{names}.py")
    own = [f"llama4_jax.{folder}.{file.stem}" for file in files if file.stem not in ("__init__", "shuffle")]
    code = f"import sys, {', '.join(own)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

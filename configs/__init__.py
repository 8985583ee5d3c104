"""Training runs with a name: each file has `config() -> RunConfig`, and `load_config` finds it."""

import difflib
import importlib.util
from pathlib import Path

CONFIGS = Path(__file__).parent


def config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def load_config(name: str):
    """`config()` of configs/NAME.py, or of the file NAME. Raises ValueError if there is none."""
    path = Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file():
        known = config_names()
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"there is no config {name!r}.{hint} There are: {', '.join(known)}; or give a path to a .py file."
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ValueError(f"{path} must define `def config() -> RunConfig`.")
    return module.config()

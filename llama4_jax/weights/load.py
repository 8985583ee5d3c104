"""A directory of weights → a model ready to use: Hugging Face's, or one of our own runs.

Tensors stream: each goes to its devices before the next is read, so the host holds one at a time and there are never
two copies of the model. On a mesh each device takes its own part.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from llama4_jax.model.config import ModelConfig, Precision, difference
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.moe import BalanceBias
from llama4_jax.model.presets import PRESETS
from llama4_jax.weights import table
from llama4_jax.weights.hf_config import model_config
from llama4_jax.weights.safetensors import HFCheckpoint
from sharding import parameter_sharding


def from_pretrained(path: str | Path, mesh: Mesh | None = None, dtype: str = "bfloat16") -> Llama4:
    """The model in a directory, its layers one by one, as decoding wants them.

    - path: a Hugging Face directory (config.json and *.safetensors, one file or shards), or a run directory of
      `train.py`, of which the newest whole checkpoint is taken
    - mesh: places each parameter on it, by the rules of `sharding`; without, all are on the default device
    - dtype: of parameters and computation, "float32" or "bfloat16"; logits are float32

    The directory's config.json decides what the model is. If it has the sizes of a preset but differs from it, the
    differences are printed to stderr.

    Raises FileNotFoundError for a path, config or weights that are not there; ValueError for a directory that is
    neither of the two, for weights that do not fit the config, and for a mesh that does not divide them.
    """
    path = Path(path)
    precision = Precision(params=dtype, compute=dtype)
    kind = _kind(path)
    if kind == "run":
        return load_run(path, precision=precision, mesh=mesh)
    checkpoint = HFCheckpoint(path)
    config = model_config(checkpoint.config)
    for line in preset_differences(config):
        print(line, file=sys.stderr)
    return load(config, table.from_hf(config, checkpoint), precision=precision, mesh=mesh)


def _kind(path: Path) -> str:
    """ "hf" or "run", by what config.json holds. Raises as `from_pretrained` does."""
    if not path.is_dir():
        raise FileNotFoundError(f"no such directory: {path}")
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no config.json: it is neither a Hugging Face directory nor a run of train.py."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}.") from error
    for kind, key in (("hf", "model_type"), ("run", "model")):
        if isinstance(config, dict) and key in config:
            return kind
    raise ValueError(f"{file} is of neither a Hugging Face model (no model_type) nor a run of train.py (no model).")


def load(
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray | jax.Array]],
    *,
    precision: Precision,
    mesh: Mesh | None,
) -> Llama4:
    """The model of `config` with these tensors, named as in `weights.table`, as its parameters.

    Raises ValueError for a tensor that is missing, unknown, doubled or of another shape.
    """
    model = nnx.eval_shape(lambda: Llama4(config, precision=precision, scan_layers=False))
    waiting = named_variables(model)
    places = {name: _place(variable, mesh, name) for name, variable in waiting.items()}  # before reading anything
    for name, array in tensors:
        variable = waiting.pop(name, None)
        if variable is None:
            raise ValueError(f"the model has no place for {name}, or had it already.")
        expected = variable.get_value()
        if array.shape != expected.shape:
            raise ValueError(f"{name} has the shape {array.shape}, but the config makes it {expected.shape}.")
        variable.set_value(_put(array, expected.dtype, places[name]))
        del array  # before the next is read
    if waiting:
        raise ValueError(f"the model's {', '.join(waiting)} got no tensor.")
    return model


def _place(variable: nnx.Variable, mesh: Mesh | None, name: str) -> Sharding | None:
    return None if mesh is None else parameter_sharding(variable.get_value().shape, variable.axes, mesh, name)


def _put(array: np.ndarray | jax.Array, dtype: jnp.dtype, place: Sharding | None) -> jax.Array:
    if isinstance(array, jax.Array):
        return array.astype(dtype) if place is None else jax.device_put(array.astype(dtype), place)
    if place is None:
        return jnp.array(array.astype(dtype))
    return jax.make_array_from_callback(
        array.shape, place, lambda index: np.ascontiguousarray(array[index]).astype(dtype)
    )


def named_variables(model: Llama4) -> dict[str, nnx.Variable]:
    """The variables of a model whose layers are one by one, by the names of `weights.table`: attributes joined by
    dots, with `layers.3.` for the fourth layer."""
    return {
        ".".join(map(str, path)).replace("decoder.rest.", "layers."): variable
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def load_run(run: Path, *, precision: Precision, mesh: Mesh | None) -> Llama4:
    """The model of a run directory's newest readable checkpoint. Raises as `from_pretrained` does."""
    # Here, since neither is needed for Hugging Face's directories, and Orbax takes a second to import.
    from llama4_jax.config import from_json
    from llama4_jax.weights.checkpoint import Checkpoints

    config = from_json((run / "config.json").read_text(encoding="utf-8"))
    if not (run / "checkpoints").is_dir():
        raise FileNotFoundError(f"{run} holds no checkpoint: {run / 'checkpoints'} is not there yet.")
    saved = nnx.eval_shape(lambda: Llama4(config.model, precision=precision, scan_layers=config.scan_layers))
    wanted = {}
    for path, variable in nnx.to_flat_state(nnx.state(saved)):
        name = ".".join(map(str, ("bias" if isinstance(variable, BalanceBias) else "params", *path)))
        place = _place(variable, mesh, name) or SingleDeviceSharding(jax.devices()[0])
        wanted[name] = jax.ShapeDtypeStruct(variable.get_value().shape, variable.get_value().dtype, sharding=place)
    checkpoints = Checkpoints(run, read_only=True, say=lambda line: print(line, file=sys.stderr))
    checkpoint = checkpoints.newest(abstract=lambda: (wanted, None))
    checkpoints.close()
    if checkpoint is None:
        raise FileNotFoundError(f"{run} holds no complete checkpoint: there is none in {run / 'checkpoints'}.")
    return load(config.model, _layer_by_layer(saved, checkpoint.model), precision=precision, mesh=mesh)


def _layer_by_layer(model: Llama4, arrays: dict[str, jax.Array]) -> Iterator[tuple[str, jax.Array]]:
    """A run's arrays under the names of `weights.table`, stacks taken apart. Empties `arrays` on its way."""
    scanned, period = model.decoder.repeats * len(model.decoder.group), len(model.decoder.group)
    while arrays:
        name, array = arrays.popitem()
        match name.split(".")[1:]:  # after params or bias
            case ["decoder", "group", place, *rest]:
                for repeat in range(model.decoder.repeats):
                    yield ".".join(["layers", str(repeat * period + int(place)), *rest]), array[repeat]
            case ["decoder", "rest", index, *rest]:
                yield ".".join(["layers", str(scanned + int(index)), *rest]), array
            case rest:
                yield ".".join(rest), array
        del array


_SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "expert_mlp_dim",
          "num_experts")  # fmt: skip
_PATTERN = ("moe_interval", "moe_layers", "nope_interval", "rope_layers")  # by interval or layer by layer: two ways


def preset_differences(config: ModelConfig) -> list[str]:
    """How a config that was read differs from the presets of its sizes, a line a field, under a line a preset."""
    lines = []
    for name, preset in PRESETS.items():
        if any(getattr(config, size) != getattr(preset, size) for size in _SIZES):
            continue
        if [(s.rope, s.moe) for s in config.layers] == [(s.rope, s.moe) for s in preset.layers]:
            preset = dataclasses.replace(preset, **{field: getattr(config, field) for field in _PATTERN})
        fields = difference(config, preset)
        if fields:
            lines += [f"config.json differs from the preset {name!r}, and wins (config.json != preset):"]
            lines += [f"  {field}" for field in fields]
    return lines

"""A directory of weights → a model ready to use: Hugging Face's, or one of our own runs.

Tensors stream: each goes from the file to its devices before the next is read, so the host holds one at a time and
there are never two copies of the model. On a mesh each device takes its own part.
"""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama4_jax.model.config import ModelConfig, Precision, difference
from llama4_jax.model.llama4 import Llama4
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
    if not path.is_dir():
        raise FileNotFoundError(f"no such directory: {path}")
    checkpoint = HFCheckpoint(path)
    config = model_config(checkpoint.config)
    for line in preset_differences(config):
        print(line, file=sys.stderr)
    return load(config, table.from_hf(config, checkpoint), precision=precision, mesh=mesh)


def load(
    config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], *, precision: Precision, mesh: Mesh | None
) -> Llama4:
    """The model of `config` with these tensors, named as in `weights.table`, as its parameters.

    Raises ValueError for a tensor that is missing, unknown, doubled or of another shape.
    """
    model = nnx.eval_shape(lambda: Llama4(config, precision=precision, scan_layers=False))
    waiting = named_variables(model)
    if mesh is not None:  # before reading anything
        placed = {
            name: parameter_sharding(variable.get_value().shape, variable.axes, mesh, name)
            for name, variable in waiting.items()
        }
    for name, array in tensors:
        variable = waiting.pop(name, None)
        if variable is None:
            raise ValueError(f"the model has no place for {name}, or had it already.")
        expected = variable.get_value()
        if array.shape != expected.shape:
            raise ValueError(f"{name} has the shape {array.shape}, but the config makes it {expected.shape}.")
        if mesh is None:
            value = jnp.array(array.astype(expected.dtype))
        else:
            value = jax.make_array_from_callback(
                array.shape,
                placed[name],
                lambda index, array=array, dtype=expected.dtype: np.ascontiguousarray(array[index]).astype(dtype),
            )
        variable.set_value(value)
        del array  # before the next is read
    if waiting:
        raise ValueError(f"the model's {', '.join(waiting)} got no tensor.")
    return model


def named_variables(model: Llama4) -> dict[str, nnx.Variable]:
    """The variables of a model whose layers are one by one, by the names of `weights.table`: attributes joined by
    dots, with `layers.3.` for the fourth layer."""
    return {
        ".".join(map(str, path)).replace("decoder.rest.", "layers."): variable
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


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

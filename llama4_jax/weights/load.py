"""A directory of weights → a model ready to use: Hugging Face's, Meta's, or one of our own.

Tensors stream: each goes to its devices before the next is read, so the host holds one at a time and there are never
two copies of the model. On a mesh each device takes its own part, and a host reads only the parts of its devices.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, Sharding

from llama4_jax.atomic import AnyPath
from llama4_jax.hub import model_directory
from llama4_jax.model.config import LoraConfig, ModelConfig, Precision, difference
from llama4_jax.model.llama4 import Llama4, check_implementations, choose_implementations
from llama4_jax.model.lora import Factor, adapted
from llama4_jax.model.presets import PRESETS
from llama4_jax.model.quantized import quantized
from llama4_jax.ops.quantization import Scheme, is_quantized_dtype
from llama4_jax.ops.quantized_matmul import ACTIVATIONS
from llama4_jax.sharding import SERVING, parameter_sharding
from llama4_jax.weights.adapters import open_base
from llama4_jax.weights.quantized import Parameters
from llama4_jax.weights.source import (
    RunWeights,
    Weights,
    locate,
    open_weights,
    run_steps,
    saved_model,
    source_format,
)
from llama4_jax.weights.table import SCALE

T = TypeVar("T")


def from_pretrained(
    path: epath.PathLike,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    *,
    keep_quantized: bool = False,
    activations: str = "auto",
    attention: str = "auto",
    experts: str = "auto",
) -> Llama4:
    """The model in a directory, its layers one by one, as decoding wants them.

    - path: a Hugging Face directory (config.json and *.safetensors, one file or shards), a Meta directory (params.json
      and consolidated.*.pth), or a directory of ours: a run of `train.py`, or what `llama4 convert` or `llama4
      quantize` made. Of these the newest whole checkpoint is taken. The model of adapters is their base, quantized or
      not, with them beside its matrices, not merged. A name as ORG/NAME that is no directory is looked for on the
      Hugging Face Hub (`hub.model_directory`).
    - mesh: places each parameter on it, by the rules `sharding.SERVING`; without, all are on the default device
    - dtype: of parameters and computation, "float32" or "bfloat16"; logits are float32
    - keep_quantized: of a published checkpoint, quantized weights stay as they are; else they are dequantized. Those of
      a directory of ours always stay
    - activations: what quantized weights are multiplied with: "auto", "float" or "int8" (see `ops.quantized_matmul`)
    - attention, experts: how they are computed; "reference" for both to differentiate more than once (see `Llama4`)

    The directory's config.json decides what the model is. If it has the sizes of a preset but differs from it, the
    differences are printed to stderr.

    Raises FileNotFoundError for a path, config or weights that are not there; ValueError for a directory that is
    neither of the two, for weights that do not fit the config, and for a mesh that does not divide them.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}.")
    check_implementations(attention, experts)
    path = model_directory(path)
    precision = Precision(params=dtype, compute=dtype)
    if source_format(path) == "run":
        model = load_run(path, precision=precision, mesh=mesh, activations=activations)
        return choose_implementations(model, attention, experts)
    weights = open_weights(path, keep_quantized=keep_quantized)
    for line in preset_differences(weights.config):
        print(line, file=sys.stderr)
    model = load(weights, precision=precision, mesh=mesh, activations=activations)
    return choose_implementations(model, attention, experts)


def load(weights: Weights, *, precision: Precision, mesh: Mesh | None, activations: str = "auto") -> Llama4:
    """The model of these weights. Raises ValueError for a tensor that is missing, unknown or of another shape, and
    for a mesh that does not divide one, before anything is read."""
    empty = _empty_model(weights, precision, mesh, activations)
    return _fill(empty, empty.variables)


def initial_weights(path: epath.PathLike, config: ModelConfig, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a run begins with: the arrays of its new model by name, with those that the directory has in their places.

    A model with a vision encoder, or with balance biases, may begin from one without: these stay as they are. Raises
    ValueError for weights that do not fit, and what `open_weights` raises.
    """
    return arrays_of(open_weights(path), config, leaves)


def arrays_of(
    weights: Weights,
    config: ModelConfig,
    leaves: dict[str, jax.Array | jax.ShapeDtypeStruct],
    *,
    all_of_them: bool = False,
) -> dict[str, jax.Array]:
    """`initial_weights` of weights that are open.

    - leaves: or shapes with dtypes and shardings; those of quantized matrices have a name that ends in `_scale` beside
    - all_of_them: the weights must have every one
    """
    parameters = Parameters(weights)
    places = locate({name: leaf.shape for name, leaf in leaves.items()}, config)
    parts: dict[str, dict[int | None, str]] = {}
    for ours, (name, step) in places.items():
        parts.setdefault(name, {})[step] = ours
    known = set(weights.names)
    scaled = [name for name in weights.names if name.endswith(SCALE) and name not in places]
    if scaled:
        raise ValueError(
            f"init_from: {weights.path} is quantized ({scaled[0].removesuffix(SCALE)} …), and quantized weights do not "
            f"learn: begin with those that it was made of, or train adapters beside them (--lora.rank 16)."
        )
    absent = () if weights.config.vision is not None else ("vision.", "projector.")
    new = {ours for ours in places if ours.startswith(absent)}
    if not weights.config.router_bias:  # balance biases begin at 0, which is to have none
        new |= {ours for ours in places if ours.endswith(".moe.bias")}
    new = set() if all_of_them else new
    problems = [f"{ours} is not there" for ours in sorted(places.keys() - known - new)]
    problems += [f"the model has no place for {ours}" for ours in sorted(known - places.keys())]
    for ours in sorted(known & places.keys()):
        name, step = places[ours]
        expected = leaves[name].shape[step is not None :]
        if parameters.shape(ours) != expected:
            problems.append(f"{ours} has the shape {parameters.shape(ours)}, but the model makes it {expected}")
    if problems:
        raise ValueError(
            f"init_from: {weights.path} does not hold this model's tensors, {len(problems)} point(s):\n  "
            + "\n  ".join(problems[:20])
        )

    def filled(name: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        own = parts[name]
        if any(ours in new for ours in own.values()):
            return leaf

        def part(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, leaf.shape, strict=True))
            if None in own:
                read = parameters.read(own[None], bounds)
            else:
                read = np.stack([parameters.read(own[i], bounds[1:]) for i in range(leaf.shape[0])[bounds[0]]])
            return np.ascontiguousarray(read).astype(leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return {name: filled(name, leaf) for name, leaf in leaves.items()}


class QuantizedMatrices(NamedTuple):
    """How the matrices of some weights are quantized."""

    scheme: Callable[[str], Scheme | None]  # of a matrix of this name; None: it is not
    scale_dtype: Callable[[str], np.dtype]  # of the scales of this name


def quantized_matrices(weights: Weights) -> QuantizedMatrices | None:
    """None if none is."""
    parameters = Parameters(weights)
    any_is = any(parameters.is_quantized(name) for name in weights.names)
    return QuantizedMatrices(parameters.scheme, parameters.dtype) if any_is else None


class _EmptyModel(NamedTuple):
    model: Llama4  # its parameters have shapes and no values
    variables: dict[str, nnx.Variable]
    places: dict[str, Sharding | None]
    parameters: Parameters


def abstract_model(weights: Weights, precision: Precision, *, activations: str = "auto") -> Llama4:
    """The model of these weights without values, quantized where they have scales.

    Raises ValueError for a tensor that is missing, unknown or of another shape.
    """
    parameters = Parameters(weights)

    def make() -> Llama4:
        model = Llama4(weights.config, precision=precision, scan_layers=False)
        return quantized(model, parameters.scheme, activations=activations)

    model = nnx.eval_shape(make)
    variables, names = named_variables(model), parameters.names
    problems = [f"the model's {name} got no tensor" for name in variables if name not in names]
    problems += [f"the model has no place for {name}" for name in sorted(names - variables.keys())]
    for name in sorted(names & variables.keys()):
        expected, actual = variables[name].get_value(), parameters.shape(name)
        if actual != expected.shape:
            problems.append(f"{name} has the shape {actual}, but the config makes it {expected.shape}")
        if name.endswith(SCALE):  # as precise as they are stored
            variables[name].set_value(jax.ShapeDtypeStruct(expected.shape, parameters.dtype(name)))
        elif is_quantized_dtype(parameters.dtype(name)) and not parameters.is_quantized(name):
            problems.append(f"{name} is {parameters.dtype(name)}, but there are no scales for it: {name}{SCALE}")
    if problems:
        raise ValueError(
            f"{weights.path} does not hold this model's tensors, {len(problems)} point(s):\n  "
            + "\n  ".join(problems[:20])
        )
    return model


def _empty_model(weights: Weights, precision: Precision, mesh: Mesh | None, activations: str) -> _EmptyModel:
    model = abstract_model(weights, precision, activations=activations)
    variables = named_variables(model)
    places = {name: _place(v, mesh, name) for name, v in variables.items()}
    return _EmptyModel(model, variables, places, Parameters(weights))


def _fill(empty: _EmptyModel, names: Iterable[str]) -> Llama4:
    """The model, with the variables of these names read."""
    for name in names:
        variable = empty.variables[name]
        variable.set_value(_put(empty.parameters, name, variable.get_value().dtype, empty.places[name]))
    return empty.model


def _place(variable: nnx.Variable, mesh: Mesh | None, name: str) -> Sharding | None:
    return None if mesh is None else parameter_sharding(variable.get_value().shape, variable.axes, mesh, name, SERVING)


def _put(parameters: Parameters, name: str, dtype: jnp.dtype, place: Sharding | None) -> jax.Array:
    """One tensor on its devices: of each only its part is read, and parts that several hold are read once."""
    if place is None:
        return jnp.array(parameters.read(name).astype(dtype))
    shape, read = parameters.shape(name), {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        if bounds not in read:
            part = parameters.read(name, tuple(slice(*ends) for ends in bounds))
            read[bounds] = np.ascontiguousarray(part).astype(dtype)
        return read[bounds]

    return jax.make_array_from_callback(shape, place, part)


def named_variables(model: Llama4) -> dict[str, nnx.Variable]:
    """The variables of a model whose layers are one by one, by the names of `weights.table`: attributes joined by
    dots, with `layers.3.` for the fourth layer."""
    return named_paths(nnx.state(model))


def named_paths(state: nnx.State) -> dict[str, nnx.Variable]:
    """`named_variables` of a state of such a model."""
    return {
        ".".join(map(str, path)).replace("decoder.rest.", "layers.").replace("vision.rest.", "vision.layers."): variable
        for path, variable in nnx.to_flat_state(state)
    }


def load_run(run: AnyPath, *, precision: Precision, mesh: Mesh | None, activations: str = "auto") -> Llama4:
    """The model of a run directory's newest readable checkpoint, also while another process trains the run and replaces
    its checkpoints. Each that is damaged is said on stderr. Raises as `from_pretrained` does."""
    if (lora := saved_model(run).lora) is not None:
        return _load_adapted(run, lora, precision, mesh, activations)

    def begin(weights: RunWeights) -> Callable[[], Llama4]:
        empty = _empty_model(weights, precision, mesh, activations)
        return lambda: _fill(empty, empty.variables)

    return _of_newest(run, begin)


def _load_adapted(run: AnyPath, lora: LoraConfig, precision: Precision, mesh: Mesh | None, activations: str) -> Llama4:
    """The base with the factors beside its matrices, which stay as they are: quantized, perhaps."""
    model = load(open_base(run), precision=precision, mesh=mesh, activations=activations)

    def with_factors() -> Llama4:
        return adapted(nnx.merge(*nnx.split(model)), lora)

    factors = {name: v for name, v in named_variables(nnx.eval_shape(with_factors)).items() if isinstance(v, Factor)}
    places = {name: _place(variable, mesh, name) for name, variable in factors.items()}

    def begin(weights: RunWeights) -> Callable[[], dict[str, jax.Array]]:
        shapes = {name: weights.shape(name) for name in weights.names}
        wrong = sorted(factors.keys() ^ shapes.keys())
        wrong += [name for name in factors.keys() & shapes.keys() if shapes[name] != factors[name].get_value().shape]
        if wrong:
            raise ValueError(f"{run} does not hold the adapters of its config.json: {', '.join(wrong[:4])}.")
        parameters = Parameters(weights)
        return lambda: {name: _put(parameters, name, np.dtype(np.float32), place) for name, place in places.items()}

    values = _of_newest(run, begin)
    # Their variables are made empty: what is drawn for them is in no use.
    _, base = nnx.split(model)
    graphdef, added, _ = nnx.split(nnx.eval_shape(with_factors), Factor, ...)
    for name, variable in named_paths(added).items():
        variable.set_value(values[name])
    return nnx.merge(graphdef, added, base)


def _of_newest(run: AnyPath, begin: Callable[[RunWeights], Callable[[], T]]) -> T:
    """What is made of the newest checkpoint that can be read: `begin` checks what it holds, where what is wrong is no
    damage, and what that returns reads it."""
    # Here, since Orbax takes a second to import.
    from llama4_jax.weights.checkpoint import LOOKS, all_damaged, replaced_too_often, was_replaced

    for _ in range(LOOKS):
        saved, steps, reasons = saved_model(run), run_steps(run), []
        for step in reversed(steps):
            try:
                weights = RunWeights(run, saved, step)
            except Exception as error:  # a damaged file may show as anything
                reasons.append(error)
            else:
                read = begin(weights)
                try:
                    return read()
                except (MemoryError, jax.errors.JaxRuntimeError):
                    raise  # nor is this
                except Exception as error:
                    reasons.append(error)
            if was_replaced(run / "checkpoints", step, steps):
                break
            _say_damaged(run, step, reasons[-1])
        else:
            raise ValueError(all_damaged(run / "checkpoints", steps, _reason(reasons[0])))
    raise OSError(replaced_too_often(run / "checkpoints"))


def _say_damaged(run: AnyPath, step: int, error: Exception) -> None:
    print(
        f"checkpoint {run / 'checkpoints' / str(step)} is damaged ({_reason(error)}); trying the one before.",
        file=sys.stderr,
    )


def _reason(error: Exception) -> str:
    from llama4_jax.weights.checked_arrays import reason_of

    return reason_of(error)


_SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "expert_mlp_dim",
          "num_experts")  # fmt: skip
_PATTERN = ("moe_interval", "moe_layers", "nope_interval", "rope_layers")  # by interval or layer by layer: two ways


def preset_differences(config: ModelConfig) -> list[str]:
    """How a config that was read differs from the presets of its sizes, a line a field, under a line a preset."""
    lines = []
    for name, preset in PRESETS.items():
        if (config.vision is None) != (preset.vision is None):
            continue
        if any(getattr(config, size) != getattr(preset, size) for size in _SIZES):
            continue
        if [(s.rope, s.moe) for s in config.layers] == [(s.rope, s.moe) for s in preset.layers]:
            preset = dataclasses.replace(preset, **{field: getattr(config, field) for field in _PATTERN})
        fields = difference(config, preset)
        if fields:
            lines += [f"the config differs from the preset {name!r}, and wins (config != preset):"]
            lines += [f"  {field}" for field in fields]
    return lines

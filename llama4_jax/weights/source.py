"""A directory of weights of any format, as our tensors: what it holds, where its config comes from, and any part of any
tensor, read when it is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from etils import epath

from llama4_jax.atomic import AnyPath
from llama4_jax.config import SavedModel, model_from_json
from llama4_jax.hub import model_directory
from llama4_jax.model.config import ModelConfig
from llama4_jax.untrusted_json import read_json, read_text, shortened
from llama4_jax.weights import hf_config, meta_config, table
from llama4_jax.weights.dequantize import HFTensors, MetaTensors, dequantized
from llama4_jax.weights.digests import Digests
from llama4_jax.weights.meta_files import PARAMS, MetaCheckpoint
from llama4_jax.weights.safetensors import CONFIG_BYTES, HFCheckpoint
from llama4_jax.weights.table import Box, Index, Layout, Row, Shape, Tensors

SourceFormat = Literal["hf", "meta", "run"]
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@runtime_checkable
class Weights(Protocol):
    """Our tensors, in a directory.

    - config, provenance: what model it is, and where each field of that comes from
    - names: of its tensors, as in `weights.table`, in the table's order
    - step_of_run: of the checkpoint, in a directory of ours; None in others
    """

    path: AnyPath
    format: SourceFormat
    config: ModelConfig
    provenance: Mapping[str, str]
    names: tuple[str, ...]
    step_of_run: int | None

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str, part: Index | None = None) -> np.ndarray:
        """A tensor, or a part of it, in the dtype of the files."""
        ...

    def parts(self, name: str, limit: int) -> Shape:
        """A shape of parts, of about `limit` bytes, in which the tensor is read fast."""
        ...


@dataclass(frozen=True)
class FileWeights:
    """Weights in Hugging Face's or Meta's files. Opening checks all but the values (`table.plan`).

    - keep_quantized: quantized tensors are as they are stored, bytes of two numbers too, and their scales, float32, are
      tensors of their own. Otherwise they are ordinary ones, values · scales in bfloat16
    """

    path: AnyPath
    format: SourceFormat
    config: ModelConfig
    provenance: Mapping[str, str]
    ranks: tuple[Tensors, ...] = field(repr=False)
    plan: table.Plan = field(repr=False)
    keep_quantized: bool = False
    digests: Digests | None = field(default=None, repr=False)  # of its files, if they came with any

    @property
    def step_of_run(self) -> None:
        return None

    @property
    def notices(self) -> tuple[str, ...]:
        """What of the files is not used, in lines for whoever opens them."""
        scales = self.plan.activation_scales
        if not scales:
            return ()
        return (
            f"{len(scales)} scales of activations, such as {shortened(scales[0])}, are not used: activations are not "
            f"quantized here, or with scales of their own.",
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.plan.by_name if self.keep_quantized or name not in self.plan.scales)

    def shape(self, name: str) -> Shape:
        return self._row(name).shape

    def dtype(self, name: str) -> np.dtype:
        if name in self.plan.scales:
            return np.dtype(np.float32)
        return _BFLOAT16 if self._to_multiply(name) else self._boxes(name)[0].view.dtype

    def read(self, name: str, part: Index | None = None) -> np.ndarray:
        row = self._row(name)
        if self._to_multiply(name):
            return dequantized(row, replace(self, keep_quantized=True), part).astype(_BFLOAT16)
        check = None if self.digests is None else self.digests.check
        array = table.read_boxes(self._boxes(name), row.whole if part is None else part, check)
        return array.astype(np.float32) if name in self.plan.scales else array

    def parts(self, name: str, limit: int) -> Shape:
        _, layout = self.plan.by_name[name]
        return divide(self._row(name), layout, self.dtype(name).itemsize, limit)

    def _to_multiply(self, name: str) -> bool:
        return not self.keep_quantized and name + table.SCALE in self.plan.scales

    def _row(self, name: str) -> Row:
        row, _ = self.plan.by_name[name]
        return row if self.keep_quantized else row.unpacked()

    def _boxes(self, name: str) -> list[Box]:
        row, layout = self.plan.by_name[name]
        holders = self.ranks if layout.split else self.ranks[:1]  # what is not split is the same on every rank
        tensors = [[rank.read(self.plan.file_names[n]) for n in layout.names] for rank in holders]
        return row.boxes(layout, tensors)


def divide(row: Row, layout: Layout, itemsize: int, limit: int) -> Shape:
    """Parts of about `limit` bytes, divided along the axes that come first in the file: each is read in long runs."""
    shape = dict(row.sizes)
    for group in table.groups(layout.axes):
        for axis in group:
            size = itemsize * int(np.prod(list(shape.values())))
            if size > limit:
                shape[axis] = max(1, shape[axis] * limit // size)
    return tuple(shape[axis] for axis in row.axes.split())


class RunWeights:
    """Weights in a run of `train.py`, or in what `llama4 convert` made: those of one checkpoint."""

    format: SourceFormat = "run"

    def __init__(self, path: AnyPath, saved: SavedModel, step: int):
        # Here, since Orbax takes a second to import, and files of other formats do not need it.
        from llama4_jax.weights.checked_arrays import has_checksum
        from llama4_jax.weights.orbax_arrays import StoredArray, stored_arrays

        self.path, self.config, self.step, self.lora = path, saved.model, step, saved.lora
        self._known = run_steps(path)
        self.provenance = saved.provenance or dict.fromkeys(vars(saved.model), "config.json of the run")
        stores = stored_arrays(path / "checkpoints" / str(step))
        self.has_checksums = all(map(has_checksum, stores.values()))
        # Adapters may be in some layers alone, which do not show how many are stacked.
        repeats = None if saved.lora is None else stacked_repeats(self.config, saved.scan_layers)
        places = locate({name: tuple(store.shape) for name, store in stores.items()}, self.config, repeats)
        order = {row.ours: i for i, row in enumerate(table.rows(self.config))}
        self._arrays = {
            name: StoredArray(stores[places[name][0]], places[name][1])
            for name in sorted(places, key=lambda name: order.get(name.removesuffix(table.SCALE), len(order)))
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    @property
    def step_of_run(self) -> int:
        return self.step

    def shape(self, name: str) -> Shape:
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._arrays[name].dtype

    def read(self, name: str, part: Index | None = None) -> np.ndarray:
        """Every stored piece that is met is held against its checksum. Raises ValueError for one that is damaged, and
        OSError if the run has replaced the checkpoint since it was opened: what was read before is of another step."""
        whole = tuple(slice(0, size) for size in self.shape(name))
        try:
            return self._arrays[name].read(whole if part is None else part)
        except ValueError as error:
            from llama4_jax.weights.checkpoint import was_replaced

            if was_replaced(self.path / "checkpoints", self.step, self._known):
                raise OSError(
                    f"checkpoint {self.path / 'checkpoints' / str(self.step)} was replaced while it was read: the run "
                    f"is being trained. Run the same command again, or give the run a larger keep_checkpoints."
                ) from error
            raise ValueError(damaged(self.path, self.step, error)) from error

    def parts(self, name: str, limit: int) -> Shape:
        array = self._arrays[name]
        part = list(array.chunk)
        for axis in reversed(range(len(part))):  # several small chunks at a time
            size = array.dtype.itemsize * int(np.prod(part))
            part[axis] = min(array.shape[axis], part[axis] * max(1, limit // max(1, size)))
        return tuple(part)


def saved_model(run: AnyPath) -> SavedModel:
    """What the config.json of a directory of ours says. Raises ValueError naming the field that is wrong."""
    file = run / "config.json"
    return model_from_json(read_text(file, max_bytes=CONFIG_BYTES), where=str(file))


def run_steps(run: AnyPath) -> list[int]:
    """Of a run's complete checkpoints, oldest first. Raises FileNotFoundError if there are none."""
    from llama4_jax.weights.checkpoint import checkpoint_steps

    if not (run / "checkpoints").is_dir():
        raise FileNotFoundError(f"{run} holds no checkpoint: {run / 'checkpoints'} is not there yet.")
    steps = checkpoint_steps(run / "checkpoints")
    if not steps:
        raise FileNotFoundError(f"{run} holds no complete checkpoint: there is none in {run / 'checkpoints'}.")
    return steps


def newest_weights(run: AnyPath) -> "RunWeights":
    """Those of a run's newest checkpoint, also while another process trains it and replaces its checkpoints.

    Raises ValueError if the newest cannot be opened, naming what is wrong with it.
    """
    from llama4_jax.weights.checkpoint import LOOKS, replaced_too_often, was_replaced

    for _ in range(LOOKS):
        saved, steps = saved_model(run), run_steps(run)
        try:
            return RunWeights(run, saved, steps[-1])
        except Exception as error:  # a damaged file may show as anything
            if was_replaced(run / "checkpoints", steps[-1], steps):
                continue
            raise ValueError(damaged(run, steps[-1], error)) from error
    raise OSError(replaced_too_often(run / "checkpoints"))


def weights_at(run: AnyPath, saved: SavedModel, step: int) -> "RunWeights":
    """Those of a run's checkpoint of this step. Raises FileNotFoundError if it is gone, ValueError if it is damaged."""
    steps = run_steps(run)
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise FileNotFoundError(f"{run} holds no checkpoint of step {step} any more: it has those of {there}.")
    try:
        return RunWeights(run, saved, step)
    except Exception as error:  # a damaged file may show as anything
        raise ValueError(damaged(run, step, error)) from error


def damaged(run: AnyPath, step: int, error: Exception) -> str:
    from llama4_jax.weights.checked_arrays import reason_of

    return (
        f"checkpoint {run / 'checkpoints' / str(step)} is damaged: {reason_of(error)}. Take an earlier one (move this "
        f"one away), copy a sound one here, or make it anew. llama4 inspect --verify names all that is damaged."
    )


def stacked_repeats(config: ModelConfig, scan_layers: bool) -> dict[str, int]:
    """How often the repeating group of each stack of layers is repeated, as `model.stack.Stack` has it."""
    lengths = {"decoder": (config.num_layers, config.period)}
    lengths |= {} if config.vision is None else {"vision": (config.vision.num_layers, 1)}
    repeats = {stack: layers // period if scan_layers else 0 for stack, (layers, period) in lengths.items()}
    return {stack: number if number > 1 else 0 for stack, number in repeats.items()}


def locate(
    stored: Mapping[str, Shape], config: ModelConfig, repeats: Mapping[str, int] | None = None
) -> dict[str, tuple[str, int | None]]:
    """Where each of our tensors is among the arrays of a checkpoint, given their shapes: in which, and at which step of
    its first axis if that stacks the repetitions of a layer.

    - repeats: of each stack's group, if the arrays do not show it, since they are not of all layers
    """
    found: dict[str, tuple[str, int | None]] = {}
    # Of each stack of layers: what our names of its layers begin with, and the length of the group that repeats.
    stacks = {"decoder": (["layers"], config.period), "vision": (["vision", "layers"], 1)}
    repeats = repeats or {
        stack: next((shape[0] for name, shape in stored.items() if f".{stack}.group." in name), 0) for stack in stacks
    }
    for name in stored:
        match name.split(".")[1:]:  # after params or bias
            case [stack, "group", place, *rest]:
                ours, period = stacks[stack]
                for step in range(repeats[stack]):
                    found[".".join([*ours, str(step * period + int(place)), *rest])] = (name, step)
            case [stack, "rest", index, *rest]:
                ours, period = stacks[stack]
                found[".".join([*ours, str(repeats[stack] * period + int(index)), *rest])] = (name, None)
            case rest:
                found[".".join(rest)] = (name, None)
    return found


def open_weights(path: epath.PathLike, *, keep_quantized: bool = False, step: int | None = None) -> Weights:
    """The weights in a directory. Those of a directory that holds LoRA's factors are its base's with these added
    (`weights.adapters.MergedWeights`).

    - keep_quantized: quantized ones of a published checkpoint are shown as they are stored (see `FileWeights`), which
      those of a directory of ours always are
    - step: of a directory of ours, which checkpoint; None: the newest

    Raises FileNotFoundError for what is not there; ValueError for a directory of no known format, damaged files, and
    weights that do not fit their config, naming every tensor that is at fault.
    """
    path = model_directory(path)
    kind = source_format(path)
    if kind == "run":
        saved = saved_model(path)
        held = newest_weights(path) if step is None else weights_at(path, saved, step)
        if saved.lora is None:
            return held
        from llama4_jax.weights.adapters import MergedWeights, open_base

        return MergedWeights(path, held, saved.lora, open_base(path))
    if kind == "hf":
        checkpoint = HFCheckpoint(path)
        config = hf_config.model_config(checkpoint.config, str(path / "config.json"))
        provenance = hf_config.provenance(checkpoint.config)
        ranks: tuple[Tensors, ...] = (HFTensors(checkpoint.tensors),)
    else:
        files = MetaCheckpoint(path)
        config = meta_config.model_config(files.params, str(path / PARAMS))
        provenance = meta_config.provenance(files.params)
        ranks = tuple(MetaTensors(files, rank) for rank in range(len(files.ranks)))
    plan = table.plan_ranks(config, kind, ranks)
    return FileWeights(path, kind, config, provenance, ranks, plan, keep_quantized, Digests.of(path))


def open_config(path: epath.PathLike) -> ModelConfig:
    """What model is in a directory, from its config alone. Raises as `open_weights` does."""
    path = model_directory(path)
    match source_format(path):
        case "run":
            return saved_model(path).model
        case "hf":
            return hf_config.model_config(_read_config(path / "config.json"), str(path / "config.json"))
        case "meta":
            return meta_config.model_config(_read_config(path / PARAMS), str(path / PARAMS))


def _read_config(file: AnyPath) -> dict:
    return read_json(file, of=dict, max_bytes=CONFIG_BYTES)


def source_format(path: AnyPath) -> SourceFormat:
    """Which format a directory has, by its config. Raises as `open_weights` does."""
    if not path.is_dir():
        raise FileNotFoundError(f"no such directory: {path}")
    if (path / PARAMS).is_file():
        return "meta"
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"{path} holds adapters of PEFT, without the model that they belong on. Make a directory of ours of "
                f"them: llama4 convert {path} DESTINATION --base MODEL."
            )
        raise FileNotFoundError(
            f"{path} has neither config.json nor {PARAMS}: it is no Hugging Face or Meta directory, and no run."
        )
    config = _read_config(path / "config.json")
    for kind, key in (("hf", "model_type"), ("run", "model")):
        if key in config:
            return kind
    raise ValueError(
        f"{path / 'config.json'} is of neither a Hugging Face model (no model_type) nor a run of train.py (no model)."
    )

"""Meta's directories: params.json, and one consolidated.NN.pth for each model-parallel rank.

A .pth is a zip file whose members are the tensors' bytes, stored as they are, beside a pickle that names them. torch
reads and writes the pickle (with `weights_only`, so that nothing in it is ever executed) on tensors that take no
memory; the bytes are then maps of the file, as for safetensors. torch is needed for nothing else in `weights`.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath

from llama4_jax.atomic import AnyPath, any_path
from llama4_jax.untrusted_json import read_json, shortened
from llama4_jax.weights.mapped import FileTensor, Shape, reserve
from llama4_jax.weights.safetensors import CONFIG_BYTES

PARAMS = "params.json"
_EXTENSIONS = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
               "float8_e5m2": ml_dtypes.float8_e5m2}  # fmt: skip
_NEEDS_TORCH = "Meta's .pth files need torch: pip install 'llama4-jax[convert]'."


class MetaCheckpoint:
    """A directory as Meta publishes it.

    - params: params.json as it is
    - ranks: the tensors of each model-parallel rank, by Meta's names
    - scales: of its quantized experts, a dictionary for each rank; and which kind they are, "fp8" or "int4"

    Raises FileNotFoundError for what is not there, ValueError for files that are damaged or hold something else than
    tensors. Each names the file.
    """

    def __init__(self, path: epath.PathLike):
        self.path = any_path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no such directory: {self.path}")
        self.params: dict = read_json(
            self.path / PARAMS, of=dict, why="a Meta checkpoint has one", max_bytes=CONFIG_BYTES
        )
        files = sorted(self.path.glob("consolidated.*.pth"))
        if not files:
            raise FileNotFoundError(f"no weights in {self.path}: consolidated.00.pth is not there.")
        for rank, file in enumerate(files):
            if file.name != f"consolidated.{rank:02d}.pth":
                raise FileNotFoundError(f"missing shard: consolidated.{rank:02d}.pth is not in {self.path}.")
        self.ranks = [read_pth(file) for file in files]
        self.quantization, self.scales = self._scales()

    def _scales(self) -> tuple[str | None, list[dict[str, FileTensor]]]:
        for kind in ("fp8", "int4"):
            files = [self.path / f"{kind}_scales_{rank}.pt" for rank in range(len(self.ranks))]
            there = [file for file in files if file.is_file()]
            if there and there != files:
                lost = next(file for file in files if file not in there)
                raise FileNotFoundError(f"missing: {lost}, though other ranks have their scales.")
            if there:
                return kind, [read_pth(file) for file in files]
        return None, []


def read_pth(path: AnyPath) -> dict[str, FileTensor]:
    """Where each tensor of a .pth file is in it. Raises ValueError if the file is damaged, or holds something else."""
    torch = _torch()
    try:
        # Serialized states may be among the weights.
        with path.open("rb") as file, _fake_tensors(), torch.serialization.safe_globals([io.BytesIO]):
            content = torch.load(file, weights_only=True)
            size = file.seek(0, io.SEEK_END)
    except Exception as error:  # a damaged file may show as anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{path} cannot be read: it is truncated, corrupt, or holds more than tensors ({reason})."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors.")
    tensors = {}
    for name, value in content.items():
        if isinstance(value, io.BytesIO):
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {shortened(str(name)[:200])} is a {type(value).__name__}, expected a tensor.")
        dtype = _numpy_dtype(value.dtype)
        offset = value.untyped_storage()._checkpoint_offset + value.storage_offset() * dtype.itemsize
        if offset + value.numel() * dtype.itemsize > size:
            raise ValueError(f"{path} is truncated: {shortened(name)} should end beyond the end of the file.")
        strides = None if value.is_contiguous() else tuple(step * dtype.itemsize for step in value.stride())
        tensors[name] = FileTensor(path, offset, dtype, tuple(value.shape), strides)
    return tensors


def create_pth(path: Path, tensors: Mapping[str, tuple[np.dtype, Shape]]) -> dict[str, FileTensor]:
    """A .pth file of these tensors, to be filled through their maps; one that is there already is kept, if it has the
    same tensors. Raises OSError if the disk has no room for it."""
    torch = _torch()
    if not path.exists():
        with _fake_tensors():
            state = {name: torch.empty(shape, dtype=_torch_dtype(dtype)) for name, (dtype, shape) in tensors.items()}
        partial = path.with_name(path.name + ".partial")
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, partial)
        partial.rename(path)
    reserve(path, path.stat().st_size)
    return read_pth(path)


@contextlib.contextmanager
def _fake_tensors() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


def _torch():
    try:
        import torch
    except ImportError as error:
        raise ValueError(_NEEDS_TORCH) from error
    return torch


def _numpy_dtype(dtype) -> np.dtype:
    name = str(dtype).removeprefix("torch.")
    return np.dtype(_EXTENSIONS.get(name, name))


def _torch_dtype(dtype: np.dtype):
    return getattr(_torch(), re.sub(r"\W", "", dtype.name))

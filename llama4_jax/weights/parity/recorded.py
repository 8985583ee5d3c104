"""The reference as a file: what passed through another program's model, recorded there, in any framework.

A NumPy .npz file of these arrays, B rows of T tokens, each of any float format that NumPy has:

    tokens              int [B, T]
    embed               [B, T, D], what goes into the first layer
    layers.0.hidden     [B, T, D], what comes out of it, the residual stream; and so of every layer
    logits              [B, T, V]

and, for a cause that is named, of any layer what `STAGE_OF` lists: layers.0.attention, layers.0.feed_forward …
"""

import re
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from llama4_jax.model.config import ModelConfig
from llama4_jax.weights.parity.sides import CHOSEN, Stages, Tensors
from llama4_jax.weights.source import Weights

# Of a layer, by the end of their names; heads side by side, or apart: [B, T, heads, head_dim].
STAGE_OF = {
    "attention_norm": "attention norm",
    "q": "q projection",
    "k": "k projection",
    "v": "v projection",
    "q_rope": "q after RoPE",
    "k_rope": "k after RoPE",
    "attention": "attention output",  # before it is added to the residual stream
    "feed_forward_norm": "feed-forward norm",
    "router_logits": "router logits",
    "feed_forward": "feed-forward output",  # before it is added
    "hidden": "layer output",
}
_MOST_NAMED = 6


class Recorded:
    """See `sides.Side`. Raises ValueError for a file that is no .npz, lacks an array, or whose arrays do not fit the
    model; FileNotFoundError if it is not there."""

    def __init__(self, path: Path, weights: Weights):
        self.path, self.weights, self.config = path, weights, weights.config
        self.label = f"recorded in {path}"
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        self.shapes = _headers(path)
        needed = ["tokens", "embed", *(f"layers.{i}.hidden" for i in range(self.config.num_layers)), "logits"]
        missing = [name for name in needed if name not in self.shapes]
        if missing:
            more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
            raise ValueError(
                f"{path} lacks the arrays {', '.join(missing[:_MOST_NAMED])}{more}. A recording has tokens, embed, "
                f"layers.0.hidden and so on, and logits: see docs/parity.md."
            )
        self.tokens = self._tokens()
        for name in self.shapes:
            self._check(name)

    def embed(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T D"]:
        return self.read("embed")

    def layer(self, i: int) -> "RecordedLayer":
        return RecordedLayer(self, i)

    def head(self) -> "RecordedHead":
        return RecordedHead(self)

    def read(self, name: str) -> Float[np.ndarray, "B T W"]:
        with np.load(self.path, allow_pickle=False) as file:
            return file[name].astype(np.float32).reshape(*self.tokens.shape, -1)

    def tensors(self, prefix: str) -> Tensors:
        """What the directory holds: the recording is held against it."""
        names = [name for name in self.weights.names if name.startswith(prefix)]
        return {name: self.weights.read(name).astype(np.float32) for name in names}

    def _tokens(self) -> Int[np.ndarray, "B T"]:
        shape, dtype = self.shapes["tokens"]
        if dtype.kind not in "iu" or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise ValueError(f"{self.path}: tokens must be integers [B, T] with T of 2 or more, got {dtype} {shape}.")
        with np.load(self.path, allow_pickle=False) as file:
            tokens = file["tokens"].astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"{self.path}: tokens has ids from {tokens.min()} to {tokens.max()}, but the model's vocabulary has "
                f"{self.config.vocab_size}."
            )
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"{self.path}: tokens has rows of {tokens.shape[1]}, but the model's context is "
                f"{self.config.context_length} tokens."
            )
        return tokens

    def _check(self, name: str) -> None:
        """That an array has a known name, is of floats, and has the size that it should have."""
        if name == "tokens":
            return
        (shape, dtype), width = self.shapes[name], _width(name, self.config)
        if width is None:
            raise ValueError(
                f"{self.path}: there is no array of the name {name[:60]!r}. Of a layer there can be: "
                f"{', '.join(STAGE_OF)}."
            )
        rows = self.tokens.shape
        if (
            dtype.kind != "f"
            or tuple(shape[:1]) not in ((rows[0],), (rows[0] * rows[1],))
            or (np.prod(shape, dtype=object) != rows[0] * rows[1] * width)
        ):
            raise ValueError(
                f"{self.path}: {name} must be floats {[*rows, width]}, got {dtype} {list(shape)}."
            )  # fmt: skip


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array, of which none is read."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as member:
                    version = np.lib.format.read_magic(member)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(member)
                if not dtype.hasobject and entry.file_size < np.prod(shape, dtype=object) * dtype.itemsize:
                    raise ValueError("an array is shorter than it says")
                found[entry.filename.removesuffix(".npy")] = (shape, dtype)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no .npz file of arrays: {str(error)[:200]}. See docs/parity.md.") from error
    return found


def _width(name: str, config: ModelConfig) -> int | None:
    """Of an array of this name; None if there is none."""
    if name in ("embed", "logits"):
        return config.embed_dim if name == "embed" else config.vocab_size
    found = re.fullmatch(r"layers\.(\d{1,6})\.(\w+)", name)
    if not found or int(found[1]) >= config.num_layers or found[2] not in STAGE_OF:
        return None
    match found[2]:
        case "q" | "q_rope":
            return config.num_heads * config.head_dim
        case "k" | "v" | "k_rope":
            return config.num_kv_heads * config.head_dim
        case "router_logits":
            return config.num_experts
    return config.embed_dim


class RecordedLayer:
    """See `sides.Layer`. What it gives does not depend on what is given to it."""

    def __init__(self, side: Recorded, i: int):
        self.side, self.prefix = side, f"layers.{i}."

    def run(self, x: Float[np.ndarray, "B T D"]) -> Stages:
        names = {self.prefix + name: stage for name, stage in STAGE_OF.items()}
        stages = {stage: self.side.read(name) for name, stage in names.items() if name in self.side.shapes}
        if "router logits" in stages:
            top_k = self.side.config.top_k
            stages[CHOSEN] = np.sort(np.argsort(-stages["router logits"], axis=-1, kind="stable")[..., :top_k], axis=-1)
        return stages

    def tensors(self) -> Tensors:
        return self.side.tensors(self.prefix)


class RecordedHead:
    """See `sides.Head`. It is asked for the logits of one span of positions after another."""

    def __init__(self, side: Recorded):
        self.side, self.next = side, 0
        self.all = side.read("logits")

    def logits(self, x: Float[np.ndarray, "B T D"]) -> Float[np.ndarray, "B T V"]:
        first, self.next = self.next, self.next + x.shape[1]
        return self.all[:, first : self.next]

    def tensors(self) -> Tensors:
        return self.side.tensors("final_norm") | self.side.tensors("lm_head")

    def gradients(self, x, targets):
        raise NotImplementedError("a recording has no gradients")

"""Weights from one format to another, part by part: the model is never in memory, nor is a large tensor.

    convert   a Hugging Face or Meta directory → one of ours (Orbax)
    export    one of ours → a Hugging Face or Meta directory

Several threads each read a part, put its axes in order and write it, so that the three overlap. Everything is written
beside the destination and renamed when it is complete: a destination that exists is whole. A list of finished tensors
is kept there, so the same command goes on where it was interrupted.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from llama4_jax.atomic import write_atomically
from llama4_jax.config import converted_to_json
from llama4_jax.inputs import hf_tokenizer
from llama4_jax.inputs.tokenizer import BPE_FILE, BYTES_FILE, load_tokenizer
from llama4_jax.model.config import ModelConfig, VisionConfig
from llama4_jax.weights import hf_config, meta_config, table
from llama4_jax.weights.load import preset_differences
from llama4_jax.weights.mapped import FileTensor
from llama4_jax.weights.meta_files import PARAMS, create_pth
from llama4_jax.weights.safetensors import INDEX, SINGLE, create_safetensors, read_json
from llama4_jax.weights.source import FileWeights, Weights, open_weights, source_format
from llama4_jax.weights.table import Box, Index, Row, Shape, bits, write_boxes

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# Of a part. Small enough that a few in flight are little, large enough that a file a part is no burden.
_PART_BYTES = 16 * 2**20
_THREADS = 4
_SEAL_BYTES = 128 * 2**20  # of finished tensors, before they are forced to the disk together

# What belongs to a model beside its weights and config, in either format.
COMPANIONS = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "byte_tokenizer.json",
    "generation_config.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md",
)  # fmt: skip
_SOURCE_CONFIG = "source_config.json"  # of what was converted, as it was

Report = Callable[[int, int], None]  # bytes done, bytes in all


@dataclasses.dataclass(frozen=True)
class Done:
    """What a conversion did."""

    tensors: int
    bytes: int  # written, in all
    resumed: int  # tensors that were there from an earlier, interrupted call


# ---------------------------------------------------------------------------------------------------------------------
# Into our own format


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    verify: bool = False,
    report: Report = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Done:
    """Makes a directory of ours, with an Orbax checkpoint, of a Hugging Face or Meta directory.

    - dtype: of all tensors; None keeps each as it is (quantized ones become bfloat16)
    - verify: read everything back when it is written, and compare it bit for bit
    - say: is told how the config differs from the preset of its sizes, a line a field

    Raises ValueError and FileNotFoundError as `open_weights` does; FileExistsError if the destination exists;
    ValueError for a value that is not finite; OSError if there is no room. The source is never written, and what is
    finished is kept for the same command to go on with.
    """
    # Here, since Orbax takes a second to import.
    from llama4_jax.weights.orbax_arrays import create_array, make_checkpoint

    source, destination = Path(source), Path(destination)
    weights = open_weights(source)
    if not isinstance(weights, FileWeights):
        raise ValueError(f"{source} is a directory of ours already. To write another format: llama4 export.")
    if weights.plan.vision:
        raise ValueError(
            f"{source} holds {len(weights.plan.vision)} tensors of a vision encoder ({weights.plan.vision[0]} …), but "
            f"its config describes none: add its vision_config, or use the config.json that belongs to it."
        )
    for line in preset_differences(weights.config):
        say(line)
    jobs = [_Job(name, weights.shape(name), _target(weights, name, dtype)) for name in weights.names]
    with _Workplace(destination, {"from": _identity(source), "dtype": dtype}, jobs) as work:

        def prepare(job: _Job) -> _Write:
            chunk = weights.parts(job.name, _PART_BYTES * weights.dtype(job.name).itemsize // job.dtype.itemsize)
            array_path = work.path / "arrays" / _stored_name(job.name)
            array = create_array(array_path, job.shape, job.dtype, chunk)

            def write(part: Index) -> None:
                values = _finite(weights.read(job.name, part), job.name).astype(job.dtype, copy=False)
                array.write(part, values)
                if verify:
                    _same(job.name, values, array.read(part))

            return _Write(chunk, write, lambda: filter(Path.is_file, array_path.rglob("*")))

        work.run(prepare, report)
        made = work.path / "made"
        _bring_back(made, work.path / "arrays")
        names = [_stored_name(job.name) for job in jobs]
        make_checkpoint(made, {name: work.path / "arrays" / name for name in names})
        write_atomically(made / "config.json", converted_to_json(weights.config, dict(weights.provenance)))
        original = "config.json" if weights.format == "hf" else PARAMS
        write_atomically(made / _SOURCE_CONFIG, (source / original).read_bytes())
        _copy_companions(source, made)
        work.finish(made)
    return work.done


def _target(weights: Weights, name: str, dtype: str | None) -> np.dtype:
    return weights.dtype(name) if dtype is None else DTYPES[dtype]


def _stored_name(name: str) -> str:
    """Of one of our tensors in a checkpoint: as of a model whose layers are one by one."""
    for ours, stored in (("layers.", "decoder.rest."), ("vision.layers.", "vision.rest.")):
        if name.startswith(ours):
            return f"params.{stored}{name.removeprefix(ours)}"
    return f"params.{name}"


def _bring_back(made: Path, arrays: Path) -> None:
    """Undoes what an interrupted call had begun to put together."""
    for metadata in list((made / "checkpoints").glob("**/.zarray")):
        metadata.parent.rename(arrays / metadata.parent.name)
    shutil.rmtree(made, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Out of it


def export(
    run: str | Path,
    destination: str | Path,
    *,
    format: Literal["hf", "meta"],
    shards: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    verify: bool = False,
    report: Report = lambda done, total: None,
) -> Done:
    """Writes the newest checkpoint of a directory of ours as a Hugging Face or Meta directory.

    - shards: files; Meta's are one for each model-parallel rank. None: for Hugging Face as many as hold 5 GB each, for
      Meta one
    - dtype, verify, report: as for `convert`

    Raises as `convert` does, and ValueError for a model that the format cannot express.
    """
    run, destination = Path(run), Path(destination)
    if source_format(run) != "run":
        raise ValueError(f"{run} is no directory of ours. Convert it first: llama4 convert {run} DESTINATION.")
    if shards is not None and shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}.")
    weights = open_weights(run)
    config = weights.config
    if format == "hf":
        config_json = _hf_config_json(run, config, _target(weights, "embed.embedding", dtype))
    else:
        config_json = meta_config.to_params(config)
    rows = {row.ours: row for row in table.rows(config)}
    _check_rows(weights, rows)
    jobs = [_Job(name, row.shape, _target(weights, name, dtype)) for name, row in rows.items()]
    tensors = _file_tensors(jobs, rows, format, 1 if format == "hf" else shards or 1)
    identity = {"from": _identity(run), "format": format, "shards": shards, "dtype": dtype}
    with _Workplace(destination, identity, jobs) as work:
        made = work.path / "made"
        made.mkdir(exist_ok=True)
        if format == "hf":
            ranks = [_create_hf(made, config, tensors, shards)]
        else:
            ranks = [create_pth(made / f"consolidated.{rank:02d}.pth", tensors) for rank in range(shards or 1)]

        def boxes(row: Row, mode: Literal["r", "r+"]) -> list[Box]:
            layout = row.layouts(format)[0]
            holders = ranks if layout.split else ranks[:1]
            return row.boxes(layout, [[rank[name].map(mode) for name in layout.names] for rank in holders])

        def prepare(job: _Job) -> _Write:
            row = rows[job.name]

            def write(part: Index) -> None:
                values = _finite(weights.read(job.name, part), job.name).astype(job.dtype, copy=False)
                write_boxes(boxes(row, "r+"), part, values)
                if verify:
                    _same(job.name, values, table.read_boxes(boxes(row, "r"), part))

            files = {rank[name].path for rank in ranks for name in row.layouts(format)[0].names}
            return _Write(weights.parts(job.name, _PART_BYTES), write, lambda: files)

        work.run(prepare, report)
        if format == "meta":
            _repeat_on_every_rank(ranks, rows)
        name = "config.json" if format == "hf" else PARAMS
        write_atomically(made / name, json.dumps(config_json, indent=2) + "\n")
        _copy_companions(run, made)
        if format == "hf":
            _write_generation_config(made, config_json)
            _write_tokenizer(made, config)
            if config.vision is not None:
                _write_image_processor(run, made, config.vision)
        work.finish(made)
    return work.done


def _check_rows(weights: Weights, rows: Mapping[str, Row]) -> None:
    problems = [f"missing: {name}" for name in rows if name not in weights.names]
    for name in weights.names:
        if name not in rows:
            problems.append(f"has no counterpart in published Llama 4 checkpoints: {name}")
        elif weights.shape(name) != rows[name].shape:
            problems.append(f"wrong shape: {name} is {list(weights.shape(name))}, expected {list(rows[name].shape)}")
    if problems:
        raise ValueError(f"cannot write these weights, {len(problems)} point(s):\n  " + "\n  ".join(problems[:20]))


def _file_tensors(
    jobs: Sequence["_Job"], rows: Mapping[str, Row], format: table.Format, ranks: int
) -> dict[str, tuple[np.dtype, Shape]]:
    """The tensors of the files, as each of `ranks` model-parallel ranks holds them. Raises ValueError if the ranks do
    not divide one, or if one is made of several of ours that have different dtypes."""
    tensors: dict[str, tuple[np.dtype, Shape]] = {}
    for job in jobs:
        layout = rows[job.name].layouts(format)[0]
        for name in layout.names:
            made = (job.dtype, rows[job.name].file_shape(layout, ranks))
            if tensors.setdefault(name, made) != made:
                raise ValueError(
                    f"{job.name} is {job.dtype}, but other parts of {name} are {tensors[name][0]}: give one --dtype."
                )
    return tensors


def _create_hf(
    made: Path, config: ModelConfig, tensors: Mapping[str, tuple[np.dtype, Shape]], shards: int | None
) -> dict[str, FileTensor]:
    """Empty safetensors files under `made`, with their index: the tensors by the table's names."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    total = sum(sizes.values())
    shards = min(shards or -(-total // 5_000_000_000), len(tensors))
    groups: list[list[str]] = [[] for _ in range(shards)]
    before = 0
    for name, size in sizes.items():
        groups[min(shards - 1, before * shards // max(1, total))].append(name)
        before += size
    groups = [group for group in groups if group]

    def theirs(name: str) -> str:
        """A text model inside one with pictures has a prefix."""
        text = config.vision is not None and not table.VISION["hf"].match(name)
        return table.LANGUAGE_MODEL + name if text else name

    files, weight_map = {}, {}
    for i, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        made_tensors = create_safetensors(made / file, {theirs(name): tensors[name] for name in group})
        files |= {name: made_tensors[theirs(name)] for name in group}
        weight_map |= {theirs(name): file for name in group}
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(made / INDEX, json.dumps(index, indent=2) + "\n")
    return files


def _repeat_on_every_rank(ranks: Sequence[Mapping[str, FileTensor]], rows: Mapping[str, Row]) -> None:
    """What is not divided among the ranks was written for the first, and is small."""
    for row in rows.values():
        layout = row.meta[0]
        if layout.split is None:
            for name, rank in itertools.product(layout.names, ranks[1:]):
                bits(rank[name].map("r+"))[...] = bits(ranks[0][name].map())


def _hf_config_json(run: Path, config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """The config.json that the weights came with, if it says what our config says, and else one of our own."""
    made = {**hf_config.to_hf_config(config), "dtype": dtype.name}
    if (run / _SOURCE_CONFIG).is_file():
        original = read_json(run / _SOURCE_CONFIG, "")
        if "model_type" in original and hf_config.model_config(original) == config:
            kept = {key: value for key, value in original.items() if key not in ("quantization_config", "torch_dtype")}
            return {**kept, "dtype": dtype.name}
    if not any((run / file).is_file() for file in (BPE_FILE, BYTES_FILE)):
        return made
    tokenizer = load_tokenizer(run)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    if config.vision is None:
        return made | ids
    pictures = {"boi_token_index": "image_start", "eoi_token_index": "image_end", "image_token_index": "patch"}
    made |= {key: tokenizer.special_tokens[f"<|{name}|>"] for key, name in pictures.items()}
    return {**made, "text_config": made["text_config"] | ids}


def _write_generation_config(made: Path, config_json: Mapping[str, Any]) -> None:
    """As transformers' conversion script writes it, if the model came without one."""
    if (made / "generation_config.json").exists():
        return
    text = config_json.get("text_config", config_json)
    ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if text.get(key) is not None}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write_atomically(made / "generation_config.json", json.dumps({**ids, **sampling}, indent=2) + "\n")


def _write_image_processor(run: Path, made: Path, vision: VisionConfig) -> None:
    """How pictures are cut, in Hugging Face's words, if the model came without them."""
    if (made / "preprocessor_config.json").exists() or (made / "processor_config.json").exists():
        return
    data = read_json(run / "config.json", "").get("data")  # of a run that was trained
    size, half = {"height": vision.image_size, "width": vision.image_size}, [0.5] * 3
    image_processor = {
        "image_processor_type": "Llama4ImageProcessor",
        "size": size,
        "max_patches": data["max_tiles"] if data else 16,
        "resize_to_max_canvas": False,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }
    processor = {
        "processor_class": "Llama4Processor",
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "image_processor": image_processor,
    }
    write_atomically(made / "preprocessor_config.json", json.dumps(image_processor, indent=2) + "\n")
    write_atomically(made / "processor_config.json", json.dumps(processor, indent=2) + "\n")


def _write_tokenizer(made: Path, config: ModelConfig) -> None:
    """Hugging Face's form of the tokenizer, if the model came with another form only."""
    if (made / "tokenizer.json").exists() or not any((made / file).exists() for file in (BPE_FILE, BYTES_FILE)):
        return
    tokenizer = load_tokenizer(made)
    settings = hf_tokenizer.tokenizer_config(tokenizer, config.context_length)
    write_atomically(made / "tokenizer.json", json.dumps(hf_tokenizer.tokenizer_json(tokenizer), ensure_ascii=False))
    write_atomically(made / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The work itself


@dataclasses.dataclass(frozen=True)
class _Job:
    """One of our tensors, to be written."""

    name: str
    shape: Shape
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Write:
    """How one tensor is written: in parts of this shape, by this function; and the files that then hold it."""

    part: Shape
    write: Callable[[Index], None]
    files: Callable[[], Iterable[Path]]


class _Workplace:
    """The directory beside a destination where it is made, and the list of what is finished in it."""

    def __init__(self, destination: Path, identity: Mapping[str, Any], jobs: Sequence[_Job]):
        self.destination, self.jobs = destination, jobs
        self.path = destination.with_name(destination.name + ".unfinished")
        self._journal = self.path / "finished.jsonl"
        self._identity = json.dumps(identity, sort_keys=True)
        self.done = Done(len(jobs), sum(job.bytes for job in jobs), 0)

    def __enter__(self) -> "_Workplace":
        if self.destination.exists():
            raise FileExistsError(f"{self.destination} exists already: choose another destination, or remove it.")
        finished: list[str] = []
        if self._journal.exists():
            first, *finished = self._journal.read_text().splitlines()
            if first != self._identity:
                raise ValueError(
                    f"{self.path} is of another conversion that was interrupted: go on with that one, or remove it."
                )
        self._finished = set(finished) & {job.name for job in self.jobs}
        taken = sum(file.stat().st_blocks * 512 for file in self.path.rglob("*") if file.is_file())
        left = self.done.bytes - taken
        parent = next(p for p in self.path.parents if p.exists())
        free = shutil.disk_usage(parent).free
        if left > free:
            raise OSError(
                f"no room for {self.destination}: {left / 2**30:,.2f} GiB are to be written, and {free / 2**30:,.2f} "
                f"GiB are free there. Make room, or choose another destination."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        # anew, as its last line may be cut short
        names = [job.name for job in self.jobs if job.name in self._finished]
        write_atomically(self._journal, "".join(line + "\n" for line in [self._identity, *names]))
        self.done = dataclasses.replace(self.done, resumed=len(self._finished))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, Exception):
            error.add_note(f"What is finished is kept in {self.path}: the same command goes on with it.")

    def run(self, prepare: Callable[[_Job], _Write], report: Report) -> None:
        """Writes every tensor that is not finished, several parts at a time."""
        done = sum(job.bytes for job in self.jobs if job.name in self._finished)
        report(done, self.done.bytes)
        left: dict[str, int] = {}  # parts of each tensor that is begun
        running: dict[Future[None], tuple[_Job, _Write, int]] = {}
        whole: list[tuple[_Job, _Write]] = []  # finished, but perhaps not on the disk yet
        sealing: list[Future[None]] = []
        # The disk writes what is finished while the rest is computed; what the journal names is on the disk.
        with self._journal.open("a") as journal, ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(_THREADS) as pool:

            def seal(batch: Sequence[tuple[_Job, _Write]]) -> None:
                for file in {file for _, write in batch for file in write.files()}:
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
                journal.write("".join(job.name + "\n" for job, _ in batch))
                journal.flush()

            def collect(until: int) -> None:
                nonlocal done
                while len(running) > until:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job, write, size = running.pop(future)
                        future.result()
                        done += size
                        left[job.name] -= 1
                        if not left[job.name]:
                            whole.append((job, write))
                        report(done, self.done.bytes)
                if sum(job.bytes for job, _ in whole) > _SEAL_BYTES:
                    sealing.append(disk.submit(seal, whole.copy()))
                    whole.clear()

            try:
                for job in self.jobs:
                    if job.name in self._finished:
                        continue
                    write = prepare(job)
                    parts = list(_parts(job.shape, write.part))
                    left[job.name] = len(parts)
                    for part in parts:
                        size = job.dtype.itemsize * math.prod(s.stop - s.start for s in part)
                        running[pool.submit(write.write, part)] = (job, write, size)
                        collect(_THREADS)  # so that a part waits for each thread, and no more are held
                collect(0)
            finally:
                pool.shutdown(cancel_futures=True)
                sealing.append(disk.submit(seal, whole.copy()))
            for future in sealing:
                future.result()

    def finish(self, made: Path) -> None:
        """Puts what was made at the destination."""
        made.rename(self.destination)
        shutil.rmtree(self.path)


def _parts(shape: Shape, part: Shape) -> Iterator[Index]:
    steps = [range(0, size, step) for size, step in zip(shape, part, strict=True)]
    for starts in itertools.product(*steps):
        yield tuple(slice(a, min(a + n, size)) for a, n, size in zip(starts, part, shape, strict=True))


def _identity(directory: Path) -> dict[str, str]:
    """Of what is converted: where it is, and that it did not change since."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    stamps = [f"{path.relative_to(directory)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return {"path": str(directory.resolve()), "files": hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]}


_EXPONENT = {"float32": np.uint32(0x7F800000), "bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}
_BLOCK = 2**17  # numbers that stay in a core's cache while they are looked at


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    """The values, row-major in memory. Raises ValueError if one is not finite: its exponent is then all ones."""
    values = table.row_major(values)
    flat, mask = bits(values).reshape(-1), _EXPONENT.get(values.dtype.name)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        finite = np.isfinite(block.view(values.dtype)).all() if mask is None else (block & mask).max() != mask
        if not finite:
            raise ValueError(
                f"{name} holds a value that is not finite (NaN or infinity): "
                f"the file is damaged, or the model diverged."
            )
    return values


def _same(name: str, written: np.ndarray, read: np.ndarray) -> None:
    if not np.array_equal(bits(written), bits(read)):
        raise OSError(f"{name} reads back otherwise than it was written: the disk is at fault.")


def _copy_companions(source: Path, made: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            write_atomically(made / name, (source / name).read_bytes())

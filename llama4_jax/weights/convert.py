"""Weights from one format to another, part by part: the model is never in memory, nor is a large tensor.

    convert   a Hugging Face or Meta directory → one of ours (Orbax)
    export    one of ours → a Hugging Face or Meta directory
    merge     one of ours with LoRA's adapters → one with whole weights (whatever else reads weights merges them, too)

Several threads each read a part, put its axes in order and write it, so that the three overlap. Everything is written
beside the destination and renamed when it is complete: a destination that exists is whole. A list of finished tensors
is kept there, so the same command goes on where it was interrupted.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from llama4_jax.atomic import write_atomically
from llama4_jax.config import converted_to_json
from llama4_jax.hub import model_directory
from llama4_jax.inputs import hf_tokenizer
from llama4_jax.inputs.tokenizer import BPE_FILE, BYTES_FILE, load_tokenizer
from llama4_jax.model.config import ModelConfig, VisionConfig
from llama4_jax.untrusted_json import read_json
from llama4_jax.weights import hf_config, meta_config, table
from llama4_jax.weights.adapters import MergedWeights
from llama4_jax.weights.digests import write_digests
from llama4_jax.weights.load import preset_differences
from llama4_jax.weights.mapped import FileTensor
from llama4_jax.weights.meta_files import PARAMS, create_pth, read_pth
from llama4_jax.weights.peft import export_peft, import_peft, is_peft
from llama4_jax.weights.quantized import Parameters
from llama4_jax.weights.safetensors import INDEX, SINGLE, SafetensorsFile, create_safetensors
from llama4_jax.weights.source import FileWeights, Weights, open_weights, source_format
from llama4_jax.weights.table import SCALE, Box, Index, Row, Shape, bits, write_boxes
from llama4_jax.weights.workplace import (
    PART_BYTES,
    SOURCE_CONFIG,
    Done,
    Job,
    Report,
    Workplace,
    Write,
    copy_companions,
    finite,
    identity_of,
    make_run,
    same,
)

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


# ---------------------------------------------------------------------------------------------------------------------
# Into our own format


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    keep_quantized: bool = False,
    base: str | Path | None = None,
    verify: bool = False,
    report: Report = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Done:
    """Makes a directory of ours, with an Orbax checkpoint, of a Hugging Face or Meta directory; or of a PEFT directory
    one that holds its adapters (`peft.import_peft`).

    - dtype: of all tensors; None keeps each as it is (quantized ones become bfloat16)
    - keep_quantized: values of 8 or 4 bits are kept as they are, bit for bit, and their scales beside them in float32;
      `dtype` is then of the other tensors
    - base: of PEFT's adapters, the directory that they belong on; None: the one that they name
    - verify: read everything back when it is written, and compare it bit for bit
    - say: is told how the config differs from the preset of its sizes, a line a field

    Raises ValueError and FileNotFoundError as `open_weights` does; FileExistsError if the destination exists;
    ValueError for a value that is not finite, and for `keep_quantized` if nothing is quantized, or in a way that the
    model cannot hold; OSError if there is no room. The source is never written, and what is finished is kept for the
    same command to go on with.
    """
    source, destination = Path(model_directory(source)), Path(destination)
    if is_peft(source):
        return import_peft(source, destination, base)
    if base is not None:
        raise ValueError(f"base is what adapters belong on, and {source} holds none: leave it out.")
    weights = open_weights(source, keep_quantized=keep_quantized)
    if not isinstance(weights, FileWeights):
        raise ValueError(f"{source} is a directory of ours already. To write another format: llama4 export.")
    if weights.plan.vision:
        raise ValueError(
            f"{source} holds {len(weights.plan.vision)} tensors of a vision encoder ({weights.plan.vision[0]} …), but "
            f"its config describes none: add its vision_config, or use the config.json that belongs to it."
        )
    quantization = _quantization(weights) if keep_quantized else None
    for line in (*weights.notices, *preset_differences(weights.config)):
        say(line)
    as_they_are = {n for scale in weights.plan.scales for n in (scale, scale.removesuffix(SCALE)) if keep_quantized}
    targets = {name: _target(weights, name, None if name in as_they_are else dtype) for name in weights.names}
    jobs = [Job(name, weights.shape(name), target) for name, target in targets.items()]
    identity = {"from": identity_of(source), "dtype": dtype, "keep_quantized": keep_quantized, "arrays": "zarr3"}
    with Workplace(destination, identity, jobs) as work:
        work.run(lambda job: copying(weights, work, job, verify), report)
        config_json = converted_to_json(weights.config, dict(weights.provenance), quantization)
        made = make_run(work, [job.name for job in jobs], config_json, source)
        original = "config.json" if weights.format == "hf" else PARAMS
        write_atomically(made / SOURCE_CONFIG, (source / original).read_bytes())
        work.finish(made)
    return work.done


def copying(weights: Weights, work: Workplace, job: Job, verify: bool) -> Write:
    """How a tensor is written as one of ours, in the job's dtype."""
    # Here, since Orbax takes a second to import.
    from llama4_jax.weights.orbax_arrays import create_array

    chunk = weights.parts(job.name, PART_BYTES * weights.dtype(job.name).itemsize // job.dtype.itemsize)
    array_path = work.array(job.name)
    array = create_array(array_path, job.shape, job.dtype, chunk)

    def write(part: Index) -> None:
        values = finite(weights.read(job.name, part), job.name).astype(job.dtype, copy=False)
        array.write(part, values)
        if verify:
            same(job.name, values, array.read(part))

    return Write(chunk, write, lambda: filter(Path.is_file, array_path.rglob("*")))


def merge(
    run: str | Path,
    destination: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    verify: bool = False,
    report: Report = lambda done, total: None,
) -> Done:
    """Makes a directory of ours of a directory with adapters: its base, with them added to its matrices.

    - dtype: of all tensors; None keeps each as the base has it. Quantized ones become bfloat16 (`llama4 quantize` makes
      few bits of them again)
    - verify, report: as for `convert`

    Raises as `convert` does, ValueError for a directory without adapters, and as `adapters.open_base` does.
    """
    run, destination = Path(run), Path(destination)
    weights = open_weights(run)
    if not isinstance(weights, MergedWeights):
        raise ValueError(f"{run} holds no adapters: there is nothing to merge.")
    jobs = [Job(name, weights.shape(name), _target(weights, name, dtype)) for name in weights.names]
    base = Path(weights.base.path)
    identity = {"merge": identity_of(run), "base": str(base), "dtype": dtype, "arrays": "zarr3"}
    with Workplace(destination, identity, jobs) as work:
        work.run(lambda job: copying(weights, work, job, verify), report)
        config_json = json.loads(converted_to_json(weights.config, dict(weights.provenance)))
        data = read_json(run / "config.json", of=dict).get("data")  # how the run cut pictures
        config_json |= {} if data is None else {"data": data}
        work.finish(make_run(work, [job.name for job in jobs], json.dumps(config_json, indent=1), run))
    return work.done


def _quantization(weights: FileWeights) -> dict[str, str | int | None]:
    """What config.json says of weights that are kept quantized: their scheme, and how many inputs share a scale; None
    where all of an output's do, or not always as many. Raises ValueError for weights that the model cannot hold."""
    if not weights.plan.scales:
        raise ValueError(
            f"{weights.path} is not quantized, so there is nothing to keep: leave --keep-quantized out. To quantize "
            f"what was converted: llama4 quantize."
        )
    parameters, examples = Parameters(weights), {}
    try:
        for name in sorted(scale.removesuffix(SCALE) for scale in weights.plan.scales):
            found = parameters.scheme(name)
            examples.setdefault(found, name)
            if found.group == 1:
                raise ValueError(
                    f"{name} has scales along its inputs: one for each of them, where one for each output, or for a "
                    f"group of inputs, is held."
                )
            if name.startswith("lm_head.") or ".router." in name:
                raise ValueError(f"{name} is quantized, which the model has in high precision only.")
        if len({found.weights for found in examples}) > 1:
            ways = ", ".join(f"{name} as {found.weights}" for found, name in examples.items())
            raise ValueError(f"{weights.path} is quantized in several ways, {ways}, and one is held.")
    except ValueError as error:
        raise ValueError(
            f"{error} Leave --keep-quantized out, which makes bfloat16 of it; llama4 quantize then makes what is held."
        ) from error
    groups = {found.group for found in examples}
    return {"weights": next(iter(examples)).weights, "group": groups.pop() if len(groups) == 1 else None}


def _target(weights: Weights, name: str, dtype: str | None) -> np.dtype:
    return weights.dtype(name) if dtype is None else DTYPES[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Out of it


def export(
    run: str | Path,
    destination: str | Path,
    *,
    format: Literal["hf", "meta", "peft"],
    shards: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    verify: bool = False,
    report: Report = lambda done, total: None,
) -> Done:
    """Writes the newest checkpoint of a directory of ours as a Hugging Face or Meta directory. Adapters are merged, or
    with "peft" written alone, as that library has them (`peft.export_peft`).

    - shards: files; Meta's are one for each model-parallel rank. None: for Hugging Face as many as hold 5 GB each, for
      Meta one
    - dtype, verify, report: as for `convert`

    Raises as `convert` does, and ValueError for a model that the format cannot express.
    """
    run, destination = Path(run), Path(destination)
    if source_format(run) != "run":
        raise ValueError(f"{run} is no directory of ours. Convert it first: llama4 convert {run} DESTINATION.")
    if format == "peft":
        return export_peft(run, destination)
    if shards is not None and shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}.")
    weights = open_weights(run)
    names = set(weights.names)
    quantized = [name for name in weights.names if name + SCALE in names]
    if quantized:
        raise ValueError(
            f"{run} holds {len(quantized)} quantized tensors ({quantized[0]} …), which are not exported: neither "
            f"format has all of our schemes. Export the directory that it was quantized from."
        )
    config = weights.config
    if format == "hf":
        config_json = _hf_config_json(run, config, _target(weights, "embed.embedding", dtype))
    else:
        config_json = meta_config.to_params(config)
    rows = {row.ours: row for row in table.rows(config)}
    _check_rows(weights, rows)
    jobs = [Job(name, row.shape, _target(weights, name, dtype)) for name, row in rows.items()]
    tensors = _file_tensors(jobs, rows, format, 1 if format == "hf" else shards or 1)
    identity = {"from": identity_of(run), "format": format, "shards": shards, "dtype": dtype}
    tensors_of = read_pth if format == "meta" else lambda file: SafetensorsFile(file).tensors
    with Workplace(destination, identity, jobs) as work:
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

        def prepare(job: Job) -> Write:
            row = rows[job.name]

            def write(part: Index) -> None:
                values = finite(weights.read(job.name, part), job.name).astype(job.dtype, copy=False)
                write_boxes(boxes(row, "r+"), part, values)
                if verify:
                    same(job.name, values, table.read_boxes(boxes(row, "r"), part))

            files = {rank[name].path for rank in ranks for name in row.layouts(format)[0].names}
            return Write(weights.parts(job.name, PART_BYTES), write, lambda: files)

        work.run(prepare, report)
        if format == "meta":
            _repeat_on_every_rank(ranks, rows)
        written = {tensor.path for rank in ranks for tensor in rank.values()}
        write_digests(made, {file: tensors_of(file) for file in sorted(written)})
        name = "config.json" if format == "hf" else PARAMS
        write_atomically(made / name, json.dumps(config_json, indent=2) + "\n")
        copy_companions(run, made)
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
    jobs: Sequence["Job"], rows: Mapping[str, Row], format: table.Format, ranks: int
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
    if (run / SOURCE_CONFIG).is_file():
        original = read_json(run / SOURCE_CONFIG, of=dict)
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
    data = read_json(run / "config.json", of=dict).get("data")  # of a run that was trained
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

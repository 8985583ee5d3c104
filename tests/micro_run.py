"""A run of `train.py` so small that it can be started again and again, in a process of its own as a user's would be.

All tests share one compilation cache, and one finished run that was never disturbed: what every disturbed run must
equal.

And a model with pictures that learned nothing: `picture_model` in memory, `picture_directory` as Hugging Face has it.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from llama4_jax.inputs.image import ImageConfig
from llama4_jax.inputs.tokenizer import ByteTokenizer
from llama4_jax.model.config import ModelConfig, VisionConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.processor import Processor
from llama4_jax.weights.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 40, 10
NOT_TIMES = ("loss", "bits_per_byte", "grad_norm", "tokens", "skipped", "max_violation", "load_entropy", "gate_mean",
             "learning_rate", "heldout_bits_per_byte")  # fmt: skip
WORDS = "the model reads a long line of plain words and says which word comes next in it"

CONFIG = f"""
from pathlib import Path

from llama4_jax.config import RunConfig
from llama4_jax.data.config import DataConfig
from llama4_jax.model.config import ModelConfig, VisionConfig
from llama4_jax.train.balance import BalanceConfig
from llama4_jax.train.optimizer import OptimizerConfig


def config():
    here = Path(__file__).parent
    return RunConfig(
        name="micro",
        run_dir=str(here),
        model=ModelConfig(
            vocab_size=320, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
            expert_mlp_dim=16, num_experts=4, nope_interval=2, moe_interval=2, attention_chunk=16,
            temperature_floor=16, router_bias=True, context_length=64,
            vision=VisionConfig(
                embed_dim=16, num_layers=2, num_heads=4, mlp_dim=32, image_size=8, patch_size=4, adapter_dim=16,
                output_dim=16, patch_token_id=274,
            ),
        ),
        data=DataConfig(
            sources=(f"text:{{here.parent / 'text.txt'}}", f"pictures:{{here.parent / 'pictures' / 'rows.jsonl'}}"),
            seq_len=32, batch_size=4, heldout_fraction=0.3, tiles_per_row=6, max_tiles=2,
        ),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=4),
        balance=BalanceConfig(bias_rate=1e-3, switch=1e-2, z=1e-3),
        steps={STEPS},
        eval_every={STEPS // 2},
        eval_batches=2,
        checkpoint_every={EVERY},
        keep_checkpoints=3,
        log_every=1,
        sample_tokens=8,
    )
"""


# A tile of 28 × 28 pixels becomes 4 tokens.
PICTURES = ModelConfig(
    vocab_size=320, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
    expert_mlp_dim=16, num_experts=2, nope_interval=2, attention_chunk=16, temperature_floor=16, context_length=2048,
    vision=VisionConfig(
        embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32, image_size=28, patch_size=7, adapter_dim=16, output_dim=16,
        patch_token_id=274,
    ),
)  # fmt: skip


def picture_model(seed: int = 1) -> Llama4:
    """Filled by numpy: to compile the drawing of every shape takes ten times as long."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama4(PICTURES, scan_layers=False)))
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(state):
        value = rng.normal(0, 0.2, variable.shape) + ("norm" in "".join(map(str, path)))
        if path[0] == "lm_head":
            value[:, PICTURES.vision.patch_token_id] = 0  # it does not write what would stand for a picture
        variable.set_value(jnp.asarray(value, variable.dtype))
    return nnx.merge(graphdef, state)


def picture_processor(max_tiles: int = 4) -> Processor:
    return Processor(ByteTokenizer(), ImageConfig(tile_size=28, tokens_per_tile=4, max_tiles=max_tiles))


def picture_directory(directory: Path) -> Path:
    """Such a model as `transformers` writes it, with a tokenizer, for pictures of up to 4 tiles."""
    import torch
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig

    text = Llama4TextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=16, intermediate_size_mlp=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=2, no_rope_layers=[1, 0],
        attention_chunk_size=16, floor_scale=16, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    vision = Llama4VisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vision_output_dim=16,
        image_size=28, patch_size=7, projector_input_dim=16, projector_output_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, image_token_index=274))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" not in name:
                tensor.normal_(std=0.2)
    model.save_pretrained(directory)
    ByteTokenizer().save(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({"max_patches": 4, "do_resize": True}))
    return directory


def shared_directory(tmp_path_factory) -> Path:
    """One directory for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def new_place(tmp_path_factory, name: str) -> Path:
    """An empty directory with a config.py whose run is `micro` within it."""
    shared = shared_directory(tmp_path_factory) / "micro_runs"
    shared.mkdir(exist_ok=True)
    text = shared / "text.txt"
    if not text.exists():
        draw = random.Random(0)
        content = "\n".join(" ".join(draw.choices(WORDS.split(), k=12)) for _ in range(4000))
        mine = shared / f"text.{os.getpid()}"
        mine.write_text(content)
        mine.rename(text)
    write_pictures(shared / "pictures")
    place = shared / name
    place.mkdir()
    (place / "config.py").write_text(CONFIG)
    return place


def write_pictures(folder: Path) -> None:
    """Rows of text with small pictures of one tile or two: a light one is called so."""
    if folder.exists():
        return
    mine = folder.with_name(f"pictures.{os.getpid()}")
    mine.mkdir()
    draw, rows = np.random.default_rng(0), []
    for i in range(60):
        light, wide = bool(draw.integers(2)), bool(draw.integers(2))
        pixels = draw.integers(128 * light, 128 + 128 * light, (8, 16 if wide else 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(mine / f"{i}.png")
        rows.append({"text": f"{i}<|image|>{'light' if light else 'dark'}", "image": f"{i}.png"})
    (mine / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        mine.rename(folder)
    except OSError:  # another worker was faster
        shutil.rmtree(mine)


def finished_run(tmp_path_factory) -> Path:
    """The directory of the run that was never disturbed; whoever asks first makes it, and the others wait."""
    shared = shared_directory(tmp_path_factory)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = shared / "micro_runs" / "undisturbed" / "micro"
        if not run.exists():
            place = new_place(tmp_path_factory, "undisturbed")
            result = train(place, "--profile")
            (place / "stdout.txt").write_text(result.stdout)
            assert result.returncode == 0, result.stderr
        return run


def copy_of(run: Path, place: Path, *, without_steps: tuple[int, ...] = ()) -> Path:
    """The run, copied to a new place, and perhaps set back to an earlier checkpoint."""
    copy = place / "micro"
    shutil.copytree(run, copy)
    for step in without_steps:
        shutil.rmtree(copy / "checkpoints" / str(step))
    return copy


def environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def start(place: Path, *options: str, script: str = "train.py", **popen) -> subprocess.Popen:
    arguments = [str(place / "config.py")] if script == "train.py" else []
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments, *options],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen,
    )  # fmt: skip


def end(process: subprocess.Popen) -> subprocess.CompletedProcess:
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def train(place: Path, *options: str, **popen) -> subprocess.CompletedProcess:
    return end(start(place, *options, **popen))


def infer(place: Path, *options: str) -> subprocess.CompletedProcess:
    return end(start(place, *options, script="infer.py"))


def disturb(process: subprocess.Popen, moment: Callable[[], bool], number: signal.Signals) -> None:
    """Sends a signal as soon as `moment` has come."""
    deadline = time.monotonic() + 240
    while not moment():
        assert process.poll() is None, f"it ended before the moment came: {end(process)}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.001)
    process.send_signal(number)


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without one that is being written just now."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def last_step(run: Path) -> int:
    return max((line["step"] for line in metrics(run)), default=0)


def figures(run: Path) -> list[dict]:
    """What a run measured, without how fast it was."""
    return [{name: line[name] for name in ("step", *NOT_TIMES) if name in line} for line in metrics(run)]


def arrays(run: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Everything in the checkpoint of that step, or of the last one."""
    checkpoints = Checkpoints(run, read_only=True)
    step = checkpoints.steps()[-1] if step is None else step
    import orbax.checkpoint as ocp

    wanted = {item: ocp.args.StandardRestore() for item in ("model", "training")}
    items = checkpoints._restore(step, wanted)
    checkpoints.close()
    return {name: np.asarray(x) for item in wanted for name, x in items[item].items()}


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Every figure and every array, bit for bit."""
    assert figures(run) == figures(undisturbed)
    ours, theirs = arrays(run), arrays(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)

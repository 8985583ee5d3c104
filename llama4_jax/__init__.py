"""Llama 4 in JAX.

    model = llama4_jax.from_pretrained(path, mesh=None, dtype="bfloat16")       # a Hugging Face, Meta or run directory
    logits = model(tokens)                                                      # int32 [B, T] → float32 [B, T, V]
    replies = llama4_jax.generate(model, prompts, max_new_tokens=64)            # lists of tokens → lists of tokens

    inputs = llama4_jax.Processor.from_pretrained(path)(messages, images=[…])   # messages → tokens and tiles
    logits = model(inputs.tokens, images=inputs.images)

    model = llama4_jax.Llama4(llama4_jax.ModelConfig(...), seed=0)              # or a new one
    logits, hidden, router = model(tokens, return_hidden=True, return_router=True)
    model.layers[3].attention.q.kernel                                          # scanned or not
    llama4_jax.save(model, path, tokenizer=path_or_tokenizer, format="hf")      # or "orbax", "meta"

    engine = llama4_jax.Engine(model, processor, slots=8, context=8192)         # many requests at once
    tokens = engine.submit(messages, max_new_tokens=64).result()                # or .tokens(), as they come

    nnx.Linear(..., dot_general=llama4_jax.ops.fp8_dot_general())               # products in 8-bit floats

`llama4_jax.model.presets` has the published configs.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama4_jax.infer.engine import Engine as Engine
    from llama4_jax.infer.generate import generate as generate
    from llama4_jax.model.config import ModelConfig as ModelConfig
    from llama4_jax.model.llama4 import Llama4 as Llama4
    from llama4_jax.processor import Processor as Processor
    from llama4_jax.weights.load import from_pretrained as from_pretrained
    from llama4_jax.weights.save import save as save

_HOME = {
    "Engine": "llama4_jax.infer.engine",
    "from_pretrained": "llama4_jax.weights.load",
    "generate": "llama4_jax.infer.generate",
    "Llama4": "llama4_jax.model.llama4",
    "ModelConfig": "llama4_jax.model.config",
    "Processor": "llama4_jax.processor",
    "save": "llama4_jax.weights.save",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    # On first use: `llama4_jax.inputs` and `llama4_jax.data` run where jax must not be imported.
    if name == "ops":
        return importlib.import_module("llama4_jax.ops")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]

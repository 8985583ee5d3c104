"""The flags of `llama4 serve`. Apart from `serve/`, so that the command line shows them without importing jax."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Answer requests as OpenAI's API has them, and show a page to talk with. docs/serving.md: what is supported."""

    model: tyro.conf.Positional[Path]  # directory of a run, or of Hugging Face's or Meta's
    host: str = "127.0.0.1"  # this machine alone; 0.0.0.0: whoever can reach it, so give --api-key-file too
    port: int = 8000  # 0: a free one, which is printed
    slots: int = 8  # requests that are answered at the same time
    context: int | None = None  # tokens of prompt and reply together, up to the model's; None: 8192
    max_waiting: int = 256  # requests that may wait for a slot; beyond it the answer is 429
    cache: Literal["float", "int8"] = "float"  # keys and values in --dtype, or in int8, of half bfloat16's size
    prefix_gib: float = 1.0  # of host memory for beginnings of prompts that left their slot; 0: they are read again
    device_prefix_gib: float = 0.0  # of the devices' memory, for the same, before the host's
    api_key_file: Path | None = None  # file of keys, one a line: each request must have one of them
    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # a name by which a proxy on this machine leads here
    allow_images_under: Path | None = None  # requests may name pictures in this folder; else they bring them along
    template: Literal["meta", "checkpoint"] = "meta"  # of messages: Meta's format, or the directory's Jinja template
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16, but float32 on a CPU, where it is faster
    keep_quantized: bool = False  # a published checkpoint's weights of few bits stay so; those of ours always do
    activations: Literal["auto", "float", "int8"] = "auto"  # what weights of few bits are multiplied with
    tensor: int = 1  # devices over which heads, feed-forward width and vocabulary are split
    expert: int = 1  # devices over which the experts are split
    fsdp: int = 1  # devices over which all weights are split
    drain_seconds: float = 60.0  # that running requests have to end in, once the server is told to

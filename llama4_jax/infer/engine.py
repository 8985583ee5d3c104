"""Many requests at once, each as if it were alone, from any thread.

    engine = Engine(model, processor, slots=8, context=8192)
    handle = engine.submit(messages, max_new_tokens=64, temperature=0.7, seed=3)
    for token in handle.tokens(): …

`engine_core.EngineCore` does the work; here a thread takes its turns, and after the start nothing is compiled.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama4_jax.infer.checks import Tiles
from llama4_jax.infer.engine_core import Constraint as Constraint
from llama4_jax.infer.engine_core import EngineCore, Handle, Stats, is_id
from llama4_jax.infer.engine_core import EngineDied as EngineDied
from llama4_jax.infer.engine_core import Full as Full
from llama4_jax.infer.engine_core import Sampled as Sampled
from llama4_jax.infer.prefix_file import model_digest, read_prefix, write_prefix
from llama4_jax.infer.sampling import check_whole
from llama4_jax.model.config import ModelConfig
from llama4_jax.model.llama4 import Llama4
from llama4_jax.processor import Processor


class Engine:
    """- slots: requests that run at the same time, each with a place in the cache for `context` tokens
    - cache: of keys and values: "float", in the dtype of computation, or "int8"
    - max_waiting: requests that wait for a slot, at most
    - piece: tokens of a prompt that are read at once; read_budget: between two calls that decode
    - device_prefix_bytes, host_prefix_bytes: for what slots held before others took them, so that prompts that begin
      alike need not be read again: snapshots on the devices and, when these are full, in the host's memory
    - report: is told how many programs of how many are compiled

    Compiles all that it needs before it returns. On a mesh when the model's parameters are on one. In several processes
    all of them make the engine and close it; the first takes the requests, and the others' `close` waits until it ends.
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        model: Llama4,
        processor: Processor | None = None,
        *,
        slots: int = 8,
        context: int = 8192,
        cache: str = "float",
        max_waiting: int = 256,
        piece: int = 128,
        read_budget: int = 512,
        device_prefix_bytes: int = 0,
        host_prefix_bytes: int = 1 << 30,
        report: Callable[[int, int], None] = lambda done, total: None,
    ):
        check_whole("context", context, 2)
        self.processor = processor
        self._core = EngineCore(
            model, slots=slots, context=context, cache=cache, max_waiting=max_waiting, piece=piece,
            read_budget=read_budget, device_prefix_bytes=device_prefix_bytes, host_prefix_bytes=host_prefix_bytes,
            told_by_the_first=True,
        )  # fmt: skip
        with self._core.placed():
            self._core.compile(report)
        self._thread = threading.Thread(target=self._run, name="llama4-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._core._died is None and self._thread.is_alive()

    @property
    def stats(self) -> Stats:
        return self._core.stats

    @property
    def config(self) -> ModelConfig:
        return self._core.config

    def submit(
        self,
        prompt: Sequence[int] | Sequence[Mapping[str, Any]],
        *,
        tiles: Tiles | None = None,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        top_logprobs: int = 0,
        prompt_scores: bool = False,
        constraint: Constraint | None = None,
        tools: Sequence[Any] = (),
    ) -> Handle:
        """A request. It is answered from the engine's thread, beside the others.

        - prompt: token ids, or a conversation, if the engine has a processor
        - tiles: of the pictures of a prompt of token ids, for its `<|patch|>` tokens in order
        - max_new_tokens: 0, with prompt_scores, writes nothing
        - stop_ids: that end the reply, 8 at most; the tokenizer's, if the engine has a processor, or none
        - frequency_penalty, presence_penalty: taken off the logit of a token for each time that the reply has it, and
          if it has it at all
        - logit_bias: added to the logits of tokens, 300 at most
        - top_logprobs: of how many of the likeliest tokens, 20 at most
        - prompt_scores: of each token of the prompt, too; nothing of it is then taken from the cache
        - constraint: what may come next
        - tools: of a conversation

        Raises ValueError for arguments out of range and a prompt that does not fit; Full; EngineDied.
        """
        if len(prompt) and not is_id(prompt[0]):
            if self.processor is None:
                raise ValueError("the prompt is a conversation, and the engine has no processor: give token ids.")
            made = self.processor.prompt(prompt, tools=tools)
            prompt, tiles = made.tokens, made.tiles
        if stop_ids is None:
            stop_ids = () if self.processor is None else tuple(self.processor.tokenizer.stop_ids)
        return self._core.submit(
            prompt, tiles=tiles, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            seed=seed, stop_ids=stop_ids, frequency_penalty=frequency_penalty, presence_penalty=presence_penalty,
            logit_bias=logit_bias, top_logprobs=top_logprobs, prompt_scores=prompt_scores, constraint=constraint,
        )  # fmt: skip

    def save_prefix(
        self,
        prompt: Sequence[int] | Sequence[Mapping[str, Any]],
        path: str | Path,
        *,
        tiles: Tiles | None = None,
        tools: Sequence[Any] = (),
    ) -> int:
        """Reads a prompt, such as a long system message or document, and writes what the cache then holds to a file.

        Returns how many of its tokens that are: whole pieces alone. Raises ValueError for a prompt without a whole
        piece and as `submit`; OSError for a path that cannot be written.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
        handle = self.submit(prompt, tiles=tiles, tools=tools, max_new_tokens=1)
        handle.result()
        snapshot = self._core.call(lambda: self._core.prefix(handle._keys)).result()
        if snapshot is None:
            raise ValueError(
                f"the prompt has {handle.prompt_tokens} tokens, and prefixes are kept in whole pieces of "
                f"{self._core._limits.piece}: give a longer one."
            )
        write_prefix(path, snapshot, self._model_digest)
        return len(snapshot.keys)

    def load_prefix(self, path: str | Path) -> int:
        """Prompts that begin as the one of the file need not be read up to its end. Returns how many tokens it has.

        Raises FileNotFoundError; ValueError for a file of another model, cache or context, a damaged one, one that is
        larger than the memory for prefixes.
        """
        core = self._core
        like = {size: jax.eval_shape(lambda size=size: core._taken(0, 0, size)) for size in (0, core._block)}
        with core.placed():
            keys, blocks, chunk = read_prefix(
                Path(path), self._model_digest, block=like[core._block], chunk=like[0], block_size=core._block,
                chunk_size=core._chunk,
            )  # fmt: skip
        size = sum(block.nbytes for block in [*blocks, *([] if chunk is None else [chunk])])
        if size > core._prefix_bytes[1]:
            raise ValueError(
                f"{path} needs {size:,} bytes, and host_prefix_bytes is {core._prefix_bytes[1]:,}: start the engine "
                f"with more."
            )
        core.call(lambda: core.add_prefix(keys, blocks, chunk)).result()
        return len(keys)

    @functools.cached_property
    def _model_digest(self) -> str:
        core = self._core
        with core.placed():
            return model_digest(core.config, core._state, str(core._cache_dtype or core._compute))

    def forget(self) -> None:
        """What is in the slots is not used for later requests: after the weights were changed, or to measure."""
        self._core.forget()

    def close(self) -> None:
        """Answers what was submitted, and ends."""
        self._core.close()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self) -> None:
        try:
            with self._core.placed():
                while self._core.turn(wait=True):
                    pass
        except BaseException as error:
            self._core.fail(error)

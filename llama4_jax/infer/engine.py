"""Many requests at once, each as if it were alone, from any thread.

    engine = Engine(model, processor, slots=8, context=8192)
    handle = engine.submit(messages, max_new_tokens=64, temperature=0.7, seed=3)
    for token in handle.tokens(): …

`engine_core.EngineCore` does the work; here a thread takes its turns, and after the start nothing is compiled.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama4_jax.infer.checks import Tiles
from llama4_jax.infer.engine_core import Constraint as Constraint
from llama4_jax.infer.engine_core import EngineCore, Handle, Stats, is_id
from llama4_jax.infer.engine_core import EngineDied as EngineDied
from llama4_jax.infer.engine_core import Full as Full
from llama4_jax.infer.engine_core import Sampled as Sampled
from llama4_jax.infer.sampling import check_whole
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

    Compiles all that it needs before it returns. On a mesh when the model's parameters are on one. Raises ValueError
    for arguments out of range.
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
    def config(self):
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

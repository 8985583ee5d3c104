"""From a request to what the engine is to do for it. All of this takes time on a CPU, and runs in threads.

Nothing that a request names is opened, but pictures in one folder if the user said so.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from llama4_jax.inputs.chat import ChatFormat
from llama4_jax.inputs.messages import Message, Picture, Tool, json_values, read_messages, read_tools
from llama4_jax.inputs.picture_files import file_in
from llama4_jax.processor import Processor, Prompt
from llama4_jax.serve.answers import token_name
from llama4_jax.serve.grammar import Grammar, Grammars
from llama4_jax.serve.protocol import (
    MOST_PICTURES,
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    JsonSchemaFormat,
    NamedChoice,
    TextFormat,
    TokenizeRequest,
    bad_request,
    check_parts,
    pictures_in,
    read_request,
    results_in_order,
    text_length,
)
from llama4_jax.serve.settings import Settings
from llama4_jax.untrusted_json import shown


@dataclasses.dataclass
class Job:
    """What the engine is to do for a request: prompts, each answered by so many choices."""

    prompts: list[Prompt]
    seeds: list[list[int]]  # of each prompt's choices
    new_tokens: list[int]  # of each prompt
    sampling: dict[str, Any]
    stops: list[str]
    tools: tuple[Tool, ...] | None = None  # whose calls are read
    grammar: Grammar | None = None
    discard: bool = False  # the new tokens: only the prompt's scores are asked for


class Jobs:
    """Reads requests to one model. Every method raises ApiError for what cannot be done."""

    def __init__(self, processor: Processor, settings: Settings):
        self.processor, self.settings = processor, settings
        self.tokenizer = processor.tokenizer
        self.grammars = Grammars(processor.tokenizer, settings.vocab_size)
        # Characters: four times what the longest tokens make up, as a tokenizer may write a text shorter first.
        longest = self.tokenizer.token_bytes(np.arange(self.tokenizer.vocab_size)).max()
        self._most_text = 4 * int(longest) * settings.context

    def tokenized(self, body: bytes) -> dict[str, Any]:
        asked = read_request(body, TokenizeRequest)
        self.check_model(asked.model)
        self._check_length(
            asked.prompt, asked.messages, asked.tools, of="prompt" if asked.messages is None else "messages"
        )
        if asked.prompt is not None:
            tokens = self.tokenizer.encode(asked.prompt, bos=asked.add_special_tokens)
        else:
            check_parts(asked.messages)
            with as_bad_request():
                tools = read_tools(asked.tools)
                said = self._with_pictures(read_messages(results_in_order(asked.messages)))
                tokens = self.processor.prompt(said, tools=tools, generation_prompt=asked.add_generation_prompt).tokens
        names = [token_name(self.tokenizer, token) for token in tokens] if asked.return_token_strs else None
        return {"count": len(tokens), "max_model_len": self.settings.context, "tokens": tokens, "token_strs": names}

    def detokenized(self, body: bytes) -> dict[str, Any]:
        asked = read_request(body, DetokenizeRequest)
        self.check_model(asked.model)
        with as_bad_request("tokens"):
            return {"prompt": self.tokenizer.decode(asked.tokens)}

    def read_chat(self, body: bytes) -> tuple[ChatRequest, tuple[Message, ...]]:
        asked = read_request(body, ChatRequest)
        self.check_model(asked.model)
        check_parts(asked.messages)
        self._check_length(asked.messages, asked.tools, of="messages")
        with as_bad_request():
            return asked, read_messages(results_in_order(asked.messages))

    def chat(self, asked: ChatRequest, said: tuple[Message, ...]) -> Job:
        with as_bad_request():
            declared = read_tools(asked.tools)
            tools = () if asked.tool_choice == "none" else declared
            called = tools
            if isinstance(asked.tool_choice, NamedChoice):
                name = asked.tool_choice.function.name
                called = tuple(tool for tool in tools if tool.name == name)
                if not called:
                    raise ApiError(
                        400, f"tool_choice names {shown(name)}, and no tool is called that.", param="tool_choice"
                    )
            prompt = self.processor.prompt(self._with_pictures(said), tools=tools)
        return Job(
            [prompt],
            [asked.seeds()],
            [self._room(prompt, asked.new_tokens, field="max_completion_tokens", of="messages")],
            self._sampling(asked, asked.top_logprobs if asked.logprobs else 0),
            asked.stops,
            tools or None,
            self._grammar(asked, tools, called),
        )

    def _grammar(self, asked: ChatRequest, tools: tuple[Tool, ...], called: tuple[Tool, ...]) -> Grammar | None:
        """What the reply must look like: calls, if they are required; JSON, or else a call where tools are there."""
        form = asked.response_format
        schema = None
        if not isinstance(form, TextFormat):
            schema = form.json_schema.schema if isinstance(form, JsonSchemaFormat) else {"type": "object"}
        required = asked.tool_choice not in (None, "auto", "none")
        strict = any(isinstance(one, dict) and (one.get("function") or one).get("strict") for one in asked.tools)
        if schema is None and not required and not (tools and strict):
            if tools and not asked.parallel_tool_calls:
                raise ApiError(
                    400,
                    "parallel_tool_calls may be false where calls are held to a grammar: with tool_choice required or "
                    "a named function, with strict tools, or with a response_format.",
                    param="parallel_tool_calls",
                )
            return None
        try:
            if schema is not None:
                schema = json_values(schema, "schema")
            return self.grammars.compile(
                schema=None if required else schema,
                tools=called,
                parallel=asked.parallel_tool_calls and not isinstance(asked.tool_choice, NamedChoice),
                notation="pythonic" if isinstance(self.processor.chat, ChatFormat) else "json",
                text=schema is None and not required,
            )
        except ValueError as error:
            of_schema = str(error).startswith("schema")
            message = f"response_format.json_schema.{error}" if of_schema else str(error)
            raise bad_request(message, "response_format" if of_schema else "tools") from None

    def _with_pictures(self, found: Sequence[Message]) -> tuple[Message, ...]:
        """The messages, with no picture but those that came with them, or lie where the user allowed it."""
        pictures = pictures_in(found)
        if len(pictures) > MOST_PICTURES:
            raise ValueError(f"messages have {len(pictures)} pictures, and may have {MOST_PICTURES}.")
        opened = {}
        for i, j, picture in pictures:
            place = f"messages[{i}].content[{j}]"
            if picture.source is None:
                raise ValueError(f"{place} has no picture: give it as image_url with a data: URL.")
            if isinstance(picture.source, str):
                if self.settings.images_under is None:
                    raise ValueError(
                        f"{place} is the path of a file, and this server opens none: give the picture as a data: URL."
                    )
                opened[i, j] = Picture(self._found(picture.source, place))
        return tuple(
            dataclasses.replace(
                message, content=tuple(opened.get((i, j), part) for j, part in enumerate(message.content))
            )
            for i, message in enumerate(found)
        )

    def _found(self, path: str, place: str) -> epath.Path:
        """A file in the folder of pictures; where that is, is nobody's business."""
        folder = self.settings.images_under
        try:
            return file_in(folder, folder / path, name=place)
        except ValueError:
            raise ValueError(f"{place}: {shown(path)} leads out of the folder that pictures are read from.") from None
        except FileNotFoundError:
            raise ValueError(f"{place}: there is no picture {shown(path)}.") from None

    def completions(self, body: bytes) -> tuple[CompletionRequest, Job]:
        asked = read_request(body, CompletionRequest)
        self.check_model(asked.model)
        prompts = []
        texts = asked.prompts()
        for said in texts:
            self._check_length(said if isinstance(said, str) else "", of="prompt")
        for i, said in enumerate(texts):
            ids = self.tokenizer.encode(said, bos=True) if isinstance(said, str) else said
            wrong = next((token for token in ids if not 0 <= token < self.settings.vocab_size), None)
            if wrong is not None:
                raise ApiError(
                    400,
                    f"prompt {i} has the token {shown(wrong)}: ids are 0 to {self.settings.vocab_size - 1}.",
                    param="prompt",
                )
            prompts.append(Prompt(ids, None))
        sampling = self._sampling(asked, asked.logprobs or 0)
        if asked.echo and asked.logprobs is not None:
            sampling["prompt_scores"] = True
        new = max(asked.max_tokens, 1)
        room = [self._room(prompt, new, field="max_tokens", of="prompt") for prompt in prompts]
        return asked, Job(
            prompts, [asked.seeds() for _ in prompts], room, sampling, asked.stops, discard=asked.max_tokens == 0
        )

    def _sampling(self, asked: ChatRequest | CompletionRequest, top_logprobs: int) -> dict[str, Any]:
        return {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k if asked.top_k > 0 else None,
            "frequency_penalty": asked.frequency_penalty,
            "presence_penalty": asked.presence_penalty,
            "logit_bias": asked.biases(self.settings.vocab_size),
            "top_logprobs": top_logprobs,
            "stop_ids": self.tokenizer.stop_ids,
        }

    def _room(self, prompt: Prompt, asked: int | None, *, field: str, of: str) -> int:
        """How many tokens may follow a prompt. `field` says how many should, and `of` holds the prompt."""
        left = self.settings.context - len(prompt.tokens)
        wanted = 1 if asked is None else asked
        if wanted > left:
            raise ApiError(
                413,
                f"the prompt has {len(prompt.tokens)} tokens, and with {wanted} new ones ({field}) these are "
                f"{len(prompt.tokens) + wanted}: more than the context of {self.settings.context}.",
                param=field if left >= 1 else of,
                code="context_length_exceeded",
            )
        return left if asked is None else asked

    def _check_length(self, *said: Any, of: str) -> None:
        """Text that no context of this length can hold is not even cut into tokens."""
        length = sum(map(text_length, said))
        if length > self._most_text:
            raise ApiError(
                413,
                f"{of} has {length:,} characters: more than a context of {self.settings.context:,} tokens can hold.",
                param=of,
                code="context_length_exceeded",
            )

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model:
            raise ApiError(
                404,
                f"there is no model {shown(name)}: this server has {self.settings.model}.",
                param="model",
                code="model_not_found",
            )


@contextlib.contextmanager
def as_bad_request(param: str | None = None) -> Iterator[None]:
    """What the project's own readers refuse is a 400, and names the field."""
    try:
        yield
    except (ValueError, OSError, RecursionError) as error:
        raise bad_request(error, param) from None

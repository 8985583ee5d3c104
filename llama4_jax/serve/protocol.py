"""What a request may say, as OpenAI's API has it: read, checked, and what is not done refused by name.

A body is JSON of a stranger. Each field has a type and a range here; one that is unknown, or asks for something that
this server does not do, is a 400 that names it, and nothing is ignored in silence. Fields whose value asks for nothing
(`"store": false`, `"service_tier": "auto"`, `"suffix": null`) are taken, since clients send them, and so are labels
that change no reply anywhere (`user`, `metadata`, `safety_identifier`, `prompt_cache_key`). Null is as good as not
there.

Beyond OpenAI's fields there is one, `top_k`; and `model` may be left out, as there is one model.
"""

import json
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llama4_jax.inputs.messages import Message, Picture
from llama4_jax.untrusted_json import parse_json, shortened, shown, typed

MOST_CHOICES = 32  # replies to one request: n, times the number of prompts
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_BIASES = 300
MOST_TOP_LOGPROBS = 20
MOST_PICTURES = 16
MOST_TOOLS = 128
MOST_MESSAGES = 10_000
MOST_PARTS = 10_000  # of all messages
MOST_VALUES, MOST_LISTS = 1_000_000, 200_000  # of a request's JSON: reading as many takes a second of a core


class ApiError(Exception):
    """An answer that is an error, in the form that OpenAI's clients read.

    - status: of HTTP
    - param: the field that is wrong
    - code: for programs, as "context_length_exceeded"
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def as_json(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_FIELD = re.compile(r"(?:the request: )?((?:[a-z_]+)(?:\[(?:\d+|\.\.\.)\]|\.[A-Za-z_]+)*)(?=[: ])")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


def bad_request(error: Exception | str, param: str | None = None) -> ApiError:
    """A 400; the field is what the message begins with, or calls unknown."""
    message = str(error)
    if param is None:
        unknown = _UNKNOWN.search(message)
        found = _FIELD.match(message)
        if unknown:
            param = shortened(unknown[1])
        elif found and re.split(r"[.\[]", found[1])[0] in _FIELDS:
            param = found[1]
    return ApiError(400, shortened(message, 500), param=param)


class _Part(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    pass


class StreamOptions(_Part, frozen=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # true pads events against eavesdroppers, which is not done


class JsonSchema(_Part, frozen=True, kw_only=True):
    name: Annotated[str, Meta(max_length=64)]
    schema: dict[str, Any] = {}
    description: str = ""
    strict: bool | None = None  # the schema is kept to in any case


class TextFormat(_Part, tag="text", tag_field="type", frozen=True):
    pass


class JsonObjectFormat(_Part, tag="json_object", tag_field="type", frozen=True):
    pass


class JsonSchemaFormat(_Part, tag="json_schema", tag_field="type", frozen=True):
    json_schema: JsonSchema


class _Name(_Part, frozen=True, kw_only=True):
    name: str


class NamedChoice(_Part, tag="function", tag_field="type", frozen=True):
    function: _Name


Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(min_length=1, max_length=LONGEST_STOP)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=MOST_CHOICES)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Messages = Annotated[list[Any], Meta(min_length=1, max_length=MOST_MESSAGES)]
NewTokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class _Sampled(_Part, frozen=True, kw_only=True):
    """What chat and completions have in common."""

    model: str | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1  # -1 and 0: among all
    seed: Seed | None = None
    n: Count = 1
    stop: Stop | Annotated[list[Stop], Meta(max_length=MOST_STOPS)] = []
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def biases(self, vocab_size: int) -> dict[int, float]:
        """Token ids → what is added to their logits. Raises ApiError for what is no token."""
        if len(self.logit_bias) > MOST_BIASES:
            raise ApiError(
                400, f"logit_bias has {len(self.logit_bias)} tokens, and may have {MOST_BIASES}.", param="logit_bias"
            )
        for token in self.logit_bias:
            if not re.fullmatch("[0-9]{1,9}", token) or int(token) >= vocab_size:
                raise ApiError(
                    400,
                    f"logit_bias: {shown(token)} is no token: ids are 0 to {vocab_size - 1}.",
                    param="logit_bias",
                )
        return {int(token): float(bias) for token, bias in self.logit_bias.items()}

    def seeds(self) -> list[int]:
        """Of each choice: counted up from the request's, or from one that is drawn."""
        first = secrets.randbelow(1 << 31) if self.seed is None else self.seed
        return [(first + i) % (1 << 31) for i in range(self.n)]


class ChatRequest(_Sampled, frozen=True, kw_only=True):
    messages: Messages
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP_LOGPROBS)] = 0
    tools: Annotated[list[Any], Meta(max_length=MOST_TOOLS)] = []
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat = TextFormat()

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Ids = Annotated[list[int], Meta(min_length=1)]


class CompletionRequest(_Sampled, frozen=True, kw_only=True):
    prompt: Any = "<|endoftext|>"  # a text, a list of texts, token ids, or a list of such
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 16
    logprobs: Annotated[int, Meta(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """Each a text, or its token ids. Raises ApiError for anything else."""
        said = self.prompt
        if isinstance(said, str):
            return [said]
        if isinstance(said, list) and said and isinstance(said[0], str | list) and len(said) * self.n > MOST_CHOICES:
            raise ApiError(
                400,
                f"{len(said)} prompts with n = {self.n} are {len(said) * self.n} choices: {MOST_CHOICES} at most.",
                param="n" if self.n > 1 else "prompt",
            )
        if isinstance(said, list) and said and all(isinstance(one, str) for one in said):
            return said
        nested = said if isinstance(said, list) and said and isinstance(said[0], list) else [said]
        for i, ids in enumerate(nested):
            if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
                place = f"prompt[{i}]" if nested is said else "prompt"
                raise ApiError(
                    400,
                    f"{place} should be a text, a list of texts, token ids or a list of such, none empty, and is "
                    f"{shown(ids)}.",
                    param=place,
                )
        return nested


class TokenizeRequest(_Part, frozen=True, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Any], Meta(max_length=MOST_TOOLS)] = []
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(_Part, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[int]


# What the message of an error may begin with.
_FIELDS = {
    name for of in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest) for name in of.__struct_fields__
}

# Fields of OpenAI's API and of its imitators whose values here ask for nothing; with any other they are refused.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}
_LABELS = {"metadata": dict[str, str], "safety_identifier": str, "prompt_cache_key": str}


def read_request(body: bytes, of: type) -> Any:
    """The body as one of the types above. Raises ApiError for anything else."""
    # Looked for before it is read. Those in texts count too: no prompt has so many.
    for marks, what, most in (((b",", b":"), "commas and colons", MOST_VALUES), ((b"[", b"{"), "brackets", MOST_LISTS)):
        if (count := sum(map(body.count, marks))) > most:
            raise ApiError(413, f"the request has {count:,} {what}, and may have {most:,}.", code="too_large")
    try:
        said = parse_json(body, where="the request", of=dict, exact=True)
    except ValueError as error:
        raise bad_request(error) from None
    said = {name: value for name, value in said.items() if value is not None}
    known = of.__struct_fields__
    for name in [name for name in said if name not in known]:
        value = said[name]
        if name in _LABELS and issubclass(of, _Sampled):
            try:
                typed(value, _LABELS[name], where=name)
            except ValueError as error:
                raise bad_request(error, name) from None
        elif name in _NOTHING and issubclass(of, _Sampled):
            harmless = _NOTHING[name]
            if name == "best_of" and value == said.get("n"):
                harmless = (value,)
            if not any(type(value) is type(one) and value == one for one in harmless) and not (
                isinstance(value, int | float) and not isinstance(value, bool) and value in harmless
            ):
                may = f", or give {' or '.join(map(json.dumps, harmless))}" if harmless else ""
                given = json.dumps(value) if isinstance(value, bool) else shown(value)
                raise ApiError(400, f"{name} is not supported, and is {given}: leave it out{may}.", param=name)
        else:
            continue
        del said[name]
    try:
        request = typed(said, of, where="the request")
    except ValueError as error:
        raise bad_request(error) from None
    _check_combinations(request)
    return request


def _check_combinations(request: Any) -> None:
    if isinstance(request, _Sampled):
        if request.stream_options.include_obfuscation:
            raise ApiError(
                400,
                "stream_options.include_obfuscation is not supported: leave it out, or give false.",
                param="stream_options.include_obfuscation",
            )
        if request.stream_options.include_usage and not request.stream:
            raise ApiError(400, "stream_options is for streams: give stream: true too.", param="stream_options")
    if isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        if not request.tools and request.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice asks for a call, and tools has none to call.", param="tool_choice")
    if isinstance(request, TokenizeRequest) and (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give either prompt or messages.", param="prompt")


def check_parts(messages: Sequence[Any]) -> None:
    """Pictures are cut in one way: another `detail` than that is refused, and so are parts without end. Raises
    ApiError."""
    count = 0
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            count += 1
            if count > MOST_PARTS:
                raise ApiError(400, f"messages have more than {MOST_PARTS:,} parts.", param=f"messages[{i}].content")
            url = part.get("image_url") if isinstance(part, dict) else None
            detail = url.get("detail") if isinstance(url, dict) else None
            if detail not in (None, "auto", "high"):
                place = f"messages[{i}].content[{j}].image_url.detail"
                raise ApiError(400, f"{place} may be auto or high, and is {shown(detail)}.", param=place)


def text_length(value: Any) -> int:
    """Characters of all texts in a JSON value, but those of pictures."""
    length, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            length += len(one)
        elif isinstance(one, dict):
            left += [inner for name, inner in one.items() if name not in ("image_url", "url")]
            length += sum(map(len, one))
        elif isinstance(one, list):
            left += one
    return length


def results_in_order(messages: Sequence[Any]) -> list[Any]:
    """The messages, with results of tools in the order of the calls: Llama 4's format knows them by it alone, and
    OpenAI's by `tool_call_id`. Raises ApiError for an id that is of no call before it, or is answered twice."""
    ordered, i = list(messages), 0
    calls: dict[str, int] = {}  # ids of the last calls → their place among them
    while i < len(ordered):
        message = ordered[i]
        role = message.get("role") if isinstance(message, dict) else None
        if role == "assistant":
            said = message.get("tool_calls")
            ids = [call.get("id") for call in said if isinstance(call, dict)] if isinstance(said, list) else []
            calls = {identity: j for j, identity in enumerate(ids) if isinstance(identity, str)}
        if role != "tool":
            i += 1
            continue
        end = i
        while end < len(ordered) and isinstance(ordered[end], dict) and ordered[end].get("role") == "tool":
            end += 1
        ids = [one.get("tool_call_id") for one in ordered[i:end]]
        answered: set[str] = set()
        for j, identity in enumerate(ids):
            place = f"messages[{i + j}].tool_call_id"
            known = isinstance(identity, str) and identity in calls
            if identity is not None and (not known or identity in answered):
                why = "is answered twice" if known else "is the id of no call before it"
                raise ApiError(400, f"{place} {why}: {shown(identity)}.", param=place)
            answered.add(identity)
        if None not in ids:
            ordered[i:end] = sorted(ordered[i:end], key=lambda one: calls[one["tool_call_id"]])
        i = end
    return ordered


def pictures_in(messages: Sequence[Message]) -> list[tuple[int, int, Picture]]:
    """Message, part and picture of each."""
    return [
        (i, j, part)
        for i, message in enumerate(messages)
        for j, part in enumerate(message.content)
        if isinstance(part, Picture)
    ]

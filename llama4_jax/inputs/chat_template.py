"""Hugging Face's way: messages → tokens through the template that a checkpoint ships, written in Jinja.

An alternative to `ChatFormat`, for checkpoints whose template is not Meta's format. The ids are those of
`apply_chat_template` of transformers 5.23, whose environment is given here too: the immutable sandbox (a template comes
with a checkpoint, and is somebody's program), `tojson` without HTML's escapes, `raise_exception`, `strftime_now`, loop
controls and the `generation` block. Two things are added.

No text can pass for structure. transformers tokenizes what was rendered, so that `<|eot|>` in a user's message ends the
turn. Here the first and last characters of special tokens, `<` and `>`, are other ones in everything that the caller
gives, keys too, while the template is rendered: private characters that occur in none of it. What then spells a special
token was spelled by the template. Between these tokens the characters are put back, and the text is encoded as text. A
template that looks for `<` in what is said does not find it; Llama 4's does not look.

Pictures are expanded: each `<|image|>` that the template writes becomes the ids of the next picture.

Where the template that transformers' conversion script gives to Llama 4 differs from Meta's format (`ChatFormat`):

- It ends every message by `<|eot|>`. Meta ends calls of tools and their results by `<|eom|>`.
- It trims the system message, and with tools the first message of the user. Meta trims nothing.
- It writes a result of a tool as a JSON string, quoted and escaped. Meta writes it as it is.
- It writes a message with calls as `<|python_start|>content<|python_end|>{"name": …, "parameters": …}`, without the
  `"type": "function"` of Meta's JSON and without escapes for what is not ASCII. Meta uses no such marks.
- It puts tools into the first message of the user, each as JSON of its own, with other sentences; a system message then
  begins with "Environment: ipython". In the first message of the user there cannot then be pictures: it is taken for a
  string.
- It joins the texts of a message before they are tokenized. Meta tokenizes each by itself.
- An assistant message that ends a message and not the turn (`end_of_message`) ends as any other.
"""

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from etils import epath

from llama4_jax.inputs.chat import Rendered, count_pictures
from llama4_jax.inputs.messages import Message, Tool, read_messages, read_tools
from llama4_jax.inputs.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """A template, in the vocabulary of a tokenizer.

    `variables` are given to every rendering; bos_token and eos_token among them, which are `<|begin_of_text|>` and
    `<|eot|>` if nothing else is said. Raises ValueError if the template is no Jinja.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, variables: dict[str, Any] | None = None):
        self.tokenizer = tokenizer
        self._variables = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", **(variables or {})}
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._guarded = sorted({end for name in longest_first for end in (name[0], name[-1])})
        strange = [char for char in self._guarded if char.isalnum() or char.isspace()]
        if strange:
            raise ValueError(f"a special token begins or ends with {strange[0]!r}, which every text may have.")
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is no Jinja, in line {error.lineno}: {error.message}.") from error

    @classmethod
    def from_pretrained(cls, directory: str | epath.PathLike, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template of a Hugging Face directory: chat_template.jinja, or the one in tokenizer_config.json.

        Raises FileNotFoundError if it ships none, ValueError if it is damaged.
        """
        directory = epath.Path(directory)
        config = _read_config(directory / "tokenizer_config.json")
        template = config.get("chat_template")
        if (directory / TEMPLATE_FILE).is_file():
            template = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
        if template is None:
            raise FileNotFoundError(
                f"{directory} ships no chat template: there is no {TEMPLATE_FILE}, and no chat_template in "
                f"tokenizer_config.json. Meta's format needs none."
            )
        if not isinstance(template, str):
            raise ValueError(f"{directory}/tokenizer_config.json: chat_template should be a string of Jinja.")
        tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        spelled = {name: said.get("content") if isinstance(said, dict) else said for name, said in tokens.items()}
        return cls(template, tokenizer, {name: said for name, said in spelled.items() if isinstance(said, str)})

    def encode(
        self,
        messages: Sequence[Message | dict[str, Any]],
        *,
        tools: Sequence[Tool | dict[str, Any]] = (),
        pictures: Sequence[Sequence[int]] = (),
        generation_prompt: bool = True,
        **variables: Any,
    ) -> Rendered:
        """The tokens of a conversation, as the template has it; `reply` is None, since a template does not tell.

        - messages, tools, pictures, generation_prompt: as `ChatFormat.encode` takes them
        - variables: what else the template may use, as in `date_string="1 Jan 2026"`

        Raises ValueError as `ChatFormat.encode` does, and if the template cannot render them or leaves out a picture.
        """
        said = read_messages(messages)
        count_pictures(said, pictures)
        given = {
            **variables,
            "messages": [_as_dict(message) for message in said],
            "tools": [_tool_as_dict(tool) for tool in read_tools(tools)] or None,
        }
        masks = dict(zip(self._guarded, _unused_characters(given), strict=False))
        given = _translated(given, str.maketrans(masks))
        given["add_generation_prompt"] = generation_prompt
        try:
            text = self._template.render({**self._variables, **given})
        except Exception as error:  # whatever a template may raise
            raise ValueError(f"the chat template cannot render these messages: {error}.") from error
        left, tokens = iter(pictures), []
        pieces = self._special.split(text)
        placed = pieces.count("<|image|>")
        if placed != len(pictures):
            raise ValueError(f"the chat template writes {placed} <|image|>, and there are {len(pictures)} pictures.")
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                tokens += self.tokenizer.encode(_unmasked(piece, masks))
            elif piece == "<|image|>":
                tokens += next(left)
            else:
                tokens.append(self.tokenizer.special_tokens[piece])
        return Rendered(tokens, None)


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as templates expect it: texts alone as one string, which every template takes, else a list of parts."""
    if all(isinstance(part, str) for part in message.content):
        content: Any = message.text
    else:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.content
        ]
    said = {"role": message.role, "content": content}
    if message.tool_calls:
        said["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return said


def _tool_as_dict(tool: Tool) -> dict[str, Any]:
    inner = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": inner}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _unused_characters(value: Any) -> Iterator[str]:
    """Characters for private use (planes 15 and 16) that are in none of these strings."""
    used = set().union(*_strings(value))
    return (chr(code) for code in (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)) if chr(code) not in used)


def _translated(value: Any, table: dict[int, Any]) -> Any:
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {_translated(key, table): _translated(inner, table) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_translated(inner, table) for inner in value]
    return value


def _unmasked(text: str, masks: dict[str, str]) -> str:
    """With the characters that the masks stand for, also where `tojson` has escaped them."""
    for char, mask in masks.items():
        text = text.replace(mask, char).replace(json.dumps(mask)[1:-1], char)
    return text


def _read_config(path: epath.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} should hold a dict.")
    return said


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks replies for training: what is inside is rendered."""

    tags: set[str] = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

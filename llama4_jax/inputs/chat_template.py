"""Hugging Face's way: messages → tokens through the template that a checkpoint ships, written in Jinja.

An alternative to `ChatFormat`, for checkpoints whose template is not Meta's format. The ids are those of
`apply_chat_template` of transformers 5.23. Three things are added.

A template is somebody's program, and may loop for ever or fill the memory. It is rendered in a process of its own
(`template_process`), which imports Jinja alone, starts in a fraction of a second, is kept for the next rendering, and
has `SECONDS`, bounded memory, and at most `_MOST_TIMES` what was given to write. Past a limit it is ended, and that is
one ValueError. What it can reach is bounded by Jinja's sandbox, as in transformers.

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

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from llama4_jax.inputs.chat import Rendered, count_pictures
from llama4_jax.inputs.messages import Message, Tool, read_messages, read_tools
from llama4_jax.inputs.tokenizer import Tokenizer
from llama4_jax.untrusted_json import read_json, shortened

TEMPLATE_FILE = "chat_template.jinja"
OTHERS = "additional_chat_templates"  # a directory of NAME.jinja
LEGACY_FILE = "chat_template.json"  # of processors
SECONDS = 10.0  # of one rendering; thousands of times what a template takes
_STARTING = 60.0  # Python and Jinja, on the busiest of machines
_MOST_TIMES = 16  # characters written, for each one given
_MOST_ANYWAY = 1 << 20
_MOST_BYTES = 1 << 20  # of a file with a template


class ChatTemplate:
    """A template, or several by name, in the vocabulary of a tokenizer.

    Of several, "tool_use" is taken for conversations with tools, where there is one, and "default" otherwise.
    `variables` are given to every rendering; bos_token and eos_token among them, which are `<|begin_of_text|>` and
    `<|eot|>` if nothing else is said. Raises ValueError if a template is no Jinja, or none is called "default".
    """

    def __init__(
        self, template: str | Mapping[str, str], tokenizer: Tokenizer, variables: dict[str, Any] | None = None
    ):
        self.tokenizer = tokenizer
        self._variables = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", **(variables or {})}
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._guarded = sorted({end for name in longest_first for end in (name[0], name[-1])})
        strange = [char for char in self._guarded if char.isalnum() or char.isspace()]
        if strange:
            raise ValueError(f"a special token begins or ends with {strange[0]!r}, which every text may have.")
        self._templates = {"default": template} if isinstance(template, str) else dict(template)
        if "default" not in self._templates:
            raise ValueError(
                f"no chat template is called default, but {shortened(', '.join(self._templates)) or 'none'}."
            )
        for template in self._templates.values():
            _render(template, None, 0)

    @classmethod
    def from_pretrained(cls, directory: str | epath.PathLike, tokenizer: Tokenizer) -> "ChatTemplate":
        """The templates of a Hugging Face directory, where transformers finds them: chat_template.jinja and others in
        additional_chat_templates/; else chat_template.json; else chat_template in tokenizer_config.json, one or a list
        of {"name", "template"}.

        Raises FileNotFoundError if it ships none, ValueError if it is damaged.
        """
        directory = epath.Path(directory)
        file = directory / "tokenizer_config.json"
        config = read_json(file, of=dict) if file.is_file() else {}
        templates = _templates(directory, config)
        if templates is None:
            raise FileNotFoundError(
                f"{directory} ships no chat template: there is no {TEMPLATE_FILE}, and no chat_template in "
                f"tokenizer_config.json. Meta's format needs none."
            )
        tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token")}
        spelled = {name: said.get("content") if isinstance(said, dict) else said for name, said in tokens.items()}
        return cls(templates, tokenizer, {name: said for name, said in spelled.items() if isinstance(said, str)})

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
        - variables: what else the template may use, as in `date_string="1 Jan 2026"`: values that JSON has

        Raises ValueError as `ChatFormat.encode` does, and if the template cannot render them within its limits, or
        leaves out a picture.
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
        template = self._templates["default"]
        if given["tools"]:
            template = self._templates.get("tool_use", template)
        text = _render(
            template, {**self._variables, **given}, _MOST_TIMES * sum(map(len, _strings(given))) + _MOST_ANYWAY
        )
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


def _templates(directory: epath.Path, config: dict[str, Any]) -> dict[str, str] | None:
    """By name; None if there are none."""
    found = {file.name.removesuffix(".jinja"): _read_template(file) for file in (directory / OTHERS).glob("*.jinja")}
    if (directory / TEMPLATE_FILE).is_file():
        found["default"] = _read_template(directory / TEMPLATE_FILE)
    if found:
        return found
    where, said = directory / "tokenizer_config.json", config.get("chat_template")
    if (directory / LEGACY_FILE).is_file():
        where = directory / LEGACY_FILE
        said = read_json(where, of=dict).get("chat_template")
    if said is None:
        return None
    if isinstance(said, list) and said:
        named = [one for one in said if isinstance(one, dict) and isinstance(one.get("name"), str)]
        said = {one["name"]: one.get("template") for one in named} if len(named) == len(said) else None
    found = {"default": said} if isinstance(said, str) else said
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise ValueError(f"{where}: chat_template should be a string of Jinja, or a list of {{name, template}}.")
    return found


def _read_template(file: epath.Path) -> str:
    with file.open("rb") as opened:
        content = opened.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{file} is too large for a chat template: at most {_MOST_BYTES:,} bytes are read.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


def _render(template: str, variables: dict[str, Any] | None, most: int) -> str:
    """The text, of at most so many characters. Without variables, only whether the template is Jinja is asked."""
    try:
        request = json.dumps({"template": template, "variables": variables, "most": most})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a variable of the chat template is no value of JSON: {error}.") from error
    answer = _PROCESS.ask(request)
    if "syntax" in answer:
        raise ValueError(
            f"the chat template is no Jinja, in line {answer['line']}: {shortened(answer['syntax'], 200)}."
        )
    if "error" in answer:
        what = "be compiled" if variables is None else "render these messages"
        raise ValueError(f"the chat template cannot {what}: {shortened(answer['error'], 300)}.")
    return answer["text"]


class _Process:
    """`template_process`, started when it is first needed and again after it was ended; one request at a time."""

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        """Also in a fork, which must not talk with its parent's."""
        self._lock = threading.Lock()
        self._running: subprocess.Popen | None = None

    def after_fork(self) -> None:
        if self._running is not None:
            self._running.stdin.close(), self._running.stdout.close()
            self._running.returncode = 0  # of the parent: not ours to wait for
        self._forget()

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to a line. Raises nothing for what the template does: an answer says it."""
        with self._lock:
            try:
                if self._running is None:
                    self._start()
                answer = self._exchange(request, SECONDS)
            except BaseException:  # as by Ctrl-C: half a request must not stand before the next
                self._end()
                raise
            if answer is None:
                self._end()
                return {"error": f"it takes more than {SECONDS:g} seconds, or too much memory"}
            return answer

    def _start(self) -> None:
        file = Path(__file__).with_name("template_process.py")
        paths = [os.path.abspath(path) for path in sys.path if path]  # without the working directory, and fast
        code = f"import sys; sys.path[:] = {paths!r}; import runpy; runpy.run_path({str(file)!r}, run_name='__main__')"
        # A session of its own, since Ctrl-C in a terminal is for all of a session's processes.
        self._running = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if self._exchange(json.dumps({"template": "", "variables": None, "most": 0}), _STARTING) is None:
            raise OSError(f"no process for chat templates could be started by {sys.executable!r}: is Jinja installed?")

    def _exchange(self, request: str, seconds: float) -> dict[str, Any] | None:
        """None if the process ended, or had to be."""
        timer = threading.Timer(seconds, self._running.kill)
        timer.daemon = True
        timer.start()
        try:
            self._running.stdin.write(request.encode() + b"\n")
            self._running.stdin.flush()
            line = self._running.stdout.readline()
        except OSError:
            return None
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith(b"\n") else None

    def _end(self) -> None:
        process, self._running = self._running, None
        if process is not None:
            process.kill()
            process.stdin.close(), process.stdout.close()
            process.wait()

    def close(self) -> None:
        """At the end of the program. It would end by itself, as its input does."""
        self._end()


_PROCESS = _Process()
atexit.register(_PROCESS.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_PROCESS.after_fork)

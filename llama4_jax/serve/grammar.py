"""What a reply must look like, as masks over the vocabulary: JSON, JSON of a schema, calls of tools. By llguidance.

A grammar says of each token whether it may come next, and the sampler chooses among those alone: whatever the model
has learned, its reply is JSON of the schema, if the budget of tokens lets it end. A schema that llguidance cannot keep
to wholly is refused, never kept to in part.

Calls are written as the model's chat format writes them, and as `inputs.tool_calls` reads them. In Meta's format that
is `[f(a=1, b="x")]`: the properties of a schema become keyword arguments in the schema's order; where a schema says
more than that (alternatives, dependencies, references to other places), or a name is none in Python, the arguments are
`[f(**{"a": 1})]`, which the whole schema describes. In a template's format a call is
`{"type": "function", "name": "f", "parameters": {"a": 1}}`.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from llama4_jax.inputs.messages import Tool
from llama4_jax.inputs.tokenizer import Tokenizer
from llama4_jax.untrusted_json import shortened

Notation = Literal["pythonic", "json"]

_MAX_SCHEMA = 100_000  # characters of all schemas of a request
_MAX_TEXT = 10_000  # of a text in a schema: while it is written, each mask costs as much
# Space without end is what models fall into, and JSON allows it: this much between two signs is enough for any layout.
_JSON = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,40}", "lenient": False}
# Of schemas: what keyword arguments express by themselves, and what changes nothing.
_OF_KEYWORDS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_NOTES = {"title", "description", "$schema", "$id", "examples", "default", "$comment"}


class Grammars:
    """Compiles grammars for one tokenizer.

    - vocab_size: of the model, whose logits may be more than the tokenizer has ids; none of those is ever allowed

    May be used from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._lock = threading.Lock()
        self._known: LLTokenizer | None = None

    def prepare(self) -> None:
        """What takes seconds for a large vocabulary, once."""
        with self._lock:
            if self._known is None:
                wrapped = TokenizerWrapper(_Vocabulary(self.tokenizer))
                self._known = LLTokenizer(wrapped, eos_token=list(self.tokenizer.stop_ids))

    def compile(
        self,
        *,
        schema: dict[str, Any] | None = None,
        tools: Sequence[Tool] = (),
        parallel: bool = True,
        notation: Notation = "pythonic",
        text: bool = False,
    ) -> "Grammar":
        """A grammar that allows what of these is given:

        - schema: JSON that it describes
        - tools: calls of these; `parallel`: several of them
        - text: any text, if it does not begin as a call does

        Raises ValueError, which begins with `schema` or `tools[i]`, for a schema that cannot be kept to.
        """
        self.prepare()
        rules, starts, size = [], [], 0
        if schema is not None:
            size = self._check(schema, "schema", size)
            rules.append(f"answer: {_json(schema)}")
            starts.append("answer")
        for i, tool in enumerate(tools):
            where = f"tools[{i}] ({tool.name})"
            parameters = _of_object(tool.parameters)
            size = self._check(parameters, where, size)
            rules += _call_rules(f"call{i}", tool.name, parameters, notation)
        if tools:
            rules.append("call: " + " | ".join(f"call{i}" for i in range(len(tools))))
            more = ' (", " call)*' if parallel else ""
            if notation == "pythonic" or parallel:
                rules.append(f'calls: "[" call{more} "]"' + (" | call" if notation == "json" else ""))
            else:
                rules.append("calls: call")
            starts.append("calls")
        if text:
            rules.append("free: FREE?\nFREE: /[^\\[{<\\s](.|\\n)*/")
            starts.append("free")
        lark = "\n".join([f"start: {' | '.join(starts)}", *rules])
        grammar = LLMatcher.grammar_from_lark(lark)
        where = "schema" if schema is not None and not tools else "tools"
        self._raise_for(grammar, where)
        made = Grammar(LLMatcher(self._known, grammar, log_level=0, limits=_LIMITS), self)
        self._try(made, where)
        return made

    def _check(self, schema: dict[str, Any], where: str, size: int) -> int:
        """One schema by itself, so that an error names it. `size` is that of those before; returns that of all."""
        size += len(json.dumps(schema))
        if size > _MAX_SCHEMA:
            raise ValueError(f"{where}: schemas are too large: {_MAX_SCHEMA:,} characters of all together at most.")
        if "x-guidance" in schema:
            raise ValueError(f"{where}: x-guidance, which changes how a schema is read, is not supported.")
        if any(len(text) > _MAX_TEXT for text in _texts(schema)):
            raise ValueError(f"{where}: its schema has a text of more than {_MAX_TEXT:,} characters.")
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)
        except ValueError as error:  # an integer of more than 64 bits
            raise ValueError(f"{where}: this schema cannot be kept to: {shortened(str(error))}.") from None
        self._raise_for(grammar, where)
        return size

    def _try(self, grammar: "Grammar", where: str) -> None:
        """How a reply begins, so that what admits nothing, or is too complex from its beginning on, is told before
        anything is written."""
        for begun in ("", "{", '{"', "[", "[{"):
            trial = grammar.again()
            mask = trial.mask()
            for token in self.tokenizer.encode(begun):
                if trial.problem is not None or not mask[token // 32] >> token % 32 & 1:
                    break
                trial.accept(token)
                mask = trial.mask()
            if trial.problem is not None:
                raise ValueError(f"{where}: this schema cannot be kept to: {trial.problem}.")

    def _raise_for(self, grammar: str, where: str) -> None:
        """Warnings are errors too: what they tell of would not be kept to."""
        _, problems = LLMatcher.validate_grammar_with_warnings(grammar, self._known, limits=_LIMITS)
        if problems:
            why = " ".join(problems[0].split())
            raise ValueError(f"{where}: this schema cannot be kept to: {shortened(why, 200)}.")


_LIMITS = LLParserLimits(verbose_errors=False)


class Grammar:
    """What may come next, and what came: a `Constraint` of the engine. Used from one thread at a time.

    Never raises: a grammar that becomes too complex on the way allows nothing but the end, and `problem` says why.
    """

    def __init__(self, matcher: LLMatcher, grammars: Grammars):
        self._matcher = matcher
        self.problem: str | None = None
        self._end = np.zeros((grammars.vocab_size + 31) // 32, np.uint32)
        for token in grammars.tokenizer.stop_ids:
            self._end[token // 32] |= np.uint32(1 << token % 32)

    def again(self) -> "Grammar":
        """Another one, at the beginning: for another choice."""
        new = Grammar.__new__(Grammar)
        new._matcher, new.problem, new._end = self._matcher.deep_copy(), self.problem, self._end
        return new

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """Bit i % 32 of word i // 32: token i may come next."""
        if self.problem is None:
            given = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(self._end)]  # it may be longer
            mask = np.zeros_like(self._end)
            mask[: len(given)] = given
            if self._matcher.is_error():
                self.problem = shortened(self._matcher.get_error(), 200)
            elif mask.any():
                return mask
            else:
                self.problem = "no token of this vocabulary goes on from here"
        return self._end

    def accept(self, token: int) -> None:
        if self.problem is None and not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            self.problem = shortened(self._matcher.get_error() or f"token {token} was not allowed", 200)


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.stop_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.special_tokens.values())

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _of_object(parameters: dict[str, Any]) -> dict[str, Any]:
    """ "dict" for "object" is how Meta's examples write it."""
    return {**parameters, "type": "object"}


def _json(schema: dict[str, Any]) -> str:
    """A schema inside of a Lark grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON})}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _call_rules(rule: str, name: str, parameters: dict[str, Any], notation: Notation) -> list[str]:
    if notation == "json":
        head = _quoted(f'{{"type": "function", "name": {json.dumps(name)}, "parameters": ')
        return [f'{rule}: {head} {rule}_all "}}"', f"{rule}_all: {_json(parameters)}"]
    if not _is_keywords(parameters):
        return [f'{rule}: {_quoted(f"{name}(**")} {rule}_all ")"', f"{rule}_all: {_json(parameters)}"]
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    rules, after = [], []
    for k, (key, inner) in enumerate(properties.items()):
        rules.append(f"{rule}_{k}: {_quoted(key + '=')} {rule}_{k}_value")
        rules.append(f"{rule}_{k}_value: {_json({**inner, **shared})}")
    # What may follow once an argument stands, from the last property backwards; and the first, which has no comma.
    names = list(properties)
    for k, key in enumerate(names):
        part = f'", " {rule}_{k}'
        after.append(part if key in required else f"({part})?")
    firsts = []
    for k, key in enumerate(names):
        firsts.append(" ".join([f"{rule}_{k}", *after[k + 1 :]]))
        if key in required:
            break
    else:
        firsts.append('""')
    rules.append(f"{rule}_all: {' | '.join(firsts)}")
    return [f'{rule}: {_quoted(f"{name}(")} {rule}_all ")"', *rules]


def _is_keywords(parameters: dict[str, Any]) -> bool:
    """Whether keyword arguments say all that the schema says."""
    properties = parameters.get("properties", {})
    return (
        parameters.keys() <= _OF_KEYWORDS | _NOTES
        and all(name.isidentifier() and name.isascii() for name in properties)
        and all(
            isinstance(inner, dict) and not inner.keys() & {"$defs", "definitions"} for inner in properties.values()
        )
        and set(parameters.get("required", [])) <= properties.keys()
        and all(ref.startswith(("#/$defs/", "#/definitions/")) for ref in _references(parameters))
    )


def _texts(schema: Any) -> Iterator[str]:
    """All of them, names too."""
    level = [schema]
    while level:
        one = level.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one
            level += one.values()
        elif isinstance(one, list):
            level += one


def _references(schema: Any) -> list[str]:
    found, level = [], [schema]
    while level:
        one = level.pop()
        if isinstance(one, dict):
            found += [str(target) for key, target in one.items() if key in ("$ref", "$dynamicRef", "$recursiveRef")]
            level += one.values()
        elif isinstance(one, list):
            level += one
    return found

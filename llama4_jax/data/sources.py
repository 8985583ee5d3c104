"""From a word on the command line to a data set.

    stdlib                    the running interpreter's standard library: real text on any machine, offline
    text:PATH                 plain text, cut into documents of about 16 KiB
    jsonl:PATH[#FIELD]        a document a line, in the field "text" if none is named
    parquet:PATH[#COLUMN]     a document a row, in the column "text" if none is named
    files:PATH                a document a file
    tokens:PATH               ids of the tokenizer, in .npy files: cut at each end of text
    docstrings                those of the standard library: short texts in English

With pictures, for models that read them (`rows` says what a row may be):

    chat:PATH[#FIELD]         conversations, in the field "messages" if none is named; .jsonl or .parquet
    pictures:PATH[#FIELD]     text with pictures, in the field "text" if none is named; .jsonl or .parquet
    digits                    handwritten digits on pages of print, and which digit it is
    digit-pairs               two of them, and which is larger

PATH is a file, a directory or a glob, on a disk or in a bucket (gs://…).
"""

import difflib
from typing import NamedTuple

from etils import epath

from llama4_jax.data.documents import Documents, find_files
from llama4_jax.data.rows import RowReader, chat_rows, picture_rows, text_rows
from llama4_jax.inputs.tokenizer import Tokenizer

_FORMS = {
    "stdlib": "stdlib",
    "text": "text:PATH",
    "jsonl": "jsonl:PATH[#FIELD]",
    "parquet": "parquet:PATH[#COLUMN]",
    "files": "files:PATH",
    "tokens": "tokens:PATH",
    "docstrings": "docstrings",
    "chat": "chat:PATH[#FIELD]",
    "pictures": "pictures:PATH[#FIELD]",
    "digits": "digits",
    "digit-pairs": "digit-pairs",
}
_FIELDS = {"jsonl": "text", "parquet": "text", "chat": "messages", "pictures": "text"}  # if none is named
CONVERSATIONS = ("chat", "digits", "digit-pairs")  # kinds whose documents are conversations


class Source(NamedTuple):
    """A spec taken apart. `field` is the field or column, for the kinds that have one."""

    kind: str
    path: str
    field: str


def parse_source(spec: str) -> Source:
    """Take a spec apart, opening nothing. Raises ValueError for one of no known form."""
    kind, _, path = spec.partition(":")
    if kind not in _FORMS:
        close = difflib.get_close_matches(kind, _FORMS, n=1)
        hint = f" Did you mean {_FORMS[close[0]]}?" if close else ""
        raise ValueError(f"data.sources: {spec!r} is of no known kind.{hint} Known are {', '.join(_FORMS.values())}.")
    field = _FIELDS.get(kind, "-")
    if kind in _FIELDS and "#" in path:
        path, _, field = path.rpartition("#")
    if bool(path) != ("PATH" in _FORMS[kind]) or not field:
        raise ValueError(f"data.sources: {spec!r} should have the form {_FORMS[kind]}.")
    return Source(kind, path, field)


def open_source(spec: str, tokenizer: Tokenizer | None = None) -> Documents:
    """The data set that a spec names. `tokenizer` is of the ids in a source of tokens, and otherwise not needed.

    What can be wrong with it is found here, not in the middle of a run, except for what only a read of a whole Parquet
    file would show. Raises FileNotFoundError if nothing matches, ValueError for files that are empty or not what they
    should be, naming the file and the line.
    """
    kind, path, field = parse_source(spec)
    match kind:
        case "stdlib":
            from llama4_jax.data.files import standard_library

            return standard_library()
        case "docstrings":
            from llama4_jax.data.docstrings import DocstringDocuments

            return DocstringDocuments()
        case "digits" | "digit-pairs":
            from llama4_jax.data.digits import DigitDocuments

            return DigitDocuments(pairs=kind == "digit-pairs")
        case "files":
            from llama4_jax.data.files import FileDocuments

            return FileDocuments.find(path)
        case "tokens":
            from llama4_jax.data.tokens import TokenDocuments

            if tokenizer is None:
                raise ValueError(f"data.sources: {spec} can only be opened with its tokenizer.")
            return TokenDocuments(path, tokenizer)
        case "text":
            from llama4_jax.data.text import TextDocuments

            return TextDocuments(path)
        case "jsonl" | "parquet":
            return _open_rows(spec, path, text_rows(field), parquet=kind == "parquet")
        case _:
            rows = chat_rows(field) if kind == "chat" else picture_rows(field)
            return _open_rows(spec, path, rows, parquet=path.endswith(".parquet") or _only_parquet(path))


def _open_rows(spec: str, path: str, rows: RowReader, *, parquet: bool) -> Documents:
    if not parquet:
        from llama4_jax.data.jsonl import JsonlDocuments

        return JsonlDocuments(spec, path, rows)
    from llama4_jax.data.parquet import ParquetDocuments  # pyarrow takes a while to import

    return ParquetDocuments(spec, path, rows, strings=spec.startswith("parquet:"))


def _only_parquet(path: str) -> bool:
    return epath.Path(path).expanduser().is_dir() and not _holds(path, "*.jsonl") and _holds(path, "*.parquet")


def _holds(folder: str, inside: str) -> bool:
    try:
        return bool(find_files(folder, inside)[0])
    except FileNotFoundError:
        return False

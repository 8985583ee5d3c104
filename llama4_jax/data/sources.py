"""From a word on the command line to a data set.

    stdlib                    the running interpreter's standard library: real text on any machine, offline
    text:PATH                 plain text, cut into documents of about 16 KiB
    jsonl:PATH[#FIELD]        a document a line, in the field "text" if none is named
    parquet:PATH[#COLUMN]     a document a row, in the column "text" if none is named
    files:PATH                a document a file

PATH is a file, a directory or a glob.
"""

import difflib
from typing import NamedTuple

from llama4_jax.data.documents import Documents

_FORMS = {
    "stdlib": "stdlib",
    "text": "text:PATH",
    "jsonl": "jsonl:PATH[#FIELD]",
    "parquet": "parquet:PATH[#COLUMN]",
    "files": "files:PATH",
}


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
    field = "text"
    if kind in ("jsonl", "parquet") and "#" in path:
        path, _, field = path.rpartition("#")
    if bool(path) == (kind == "stdlib") or not field:
        raise ValueError(f"data.sources: {spec!r} should have the form {_FORMS[kind]}.")
    return Source(kind, path, field)


def open_source(spec: str) -> Documents:
    """The data set that a spec names.

    What can be wrong with it is found here, not in the middle of a run, except for what only a read of a whole Parquet
    file would show. Raises FileNotFoundError if nothing matches, ValueError for files that are empty or not what they
    should be, naming the file and the line.
    """
    kind, path, field = parse_source(spec)
    match kind:
        case "stdlib":
            from llama4_jax.data.files import standard_library

            return standard_library()
        case "files":
            from llama4_jax.data.files import FileDocuments

            return FileDocuments.find(path)
        case "text":
            from llama4_jax.data.text import TextDocuments

            return TextDocuments(path)
        case "jsonl":
            from llama4_jax.data.jsonl import JsonlDocuments

            return JsonlDocuments(path, field)
        case _:
            from llama4_jax.data.parquet import ParquetDocuments  # pyarrow takes a while to import

            return ParquetDocuments(path, field)

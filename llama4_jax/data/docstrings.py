"""The docstrings of Python's standard library: thousands of short English texts that every machine has."""

import ast
import functools

from llama4_jax.data.documents import Documents, hash64
from llama4_jax.data.files import standard_library
from llama4_jax.inputs.tokenizer import utf8


class DocstringDocuments(Documents):
    """One docstring, one document. The split is by text, so that copies are on the same side of it."""

    def __init__(self):
        self._texts = _docstrings()
        super().__init__([hash64(utf8(text)) for text in self._texts], sizes=[len(text) for text in self._texts])

    def __getitem__(self, index: int) -> str:
        return self._texts[index]


@functools.cache  # training and held-out data are two readers of one list, which takes seconds to make
def _docstrings() -> tuple[str, ...]:
    files, texts = standard_library(), []
    for i in range(len(files)):
        try:
            tree = ast.parse(files[i])
        except (SyntaxError, ValueError):  # the library has files that are meant to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return tuple(text for text in texts if text)

"""A row of a file of rows (a line of JSON Lines, a row of Parquet) → a document. Three kinds of rows:

    text        {"text": "…"}
    chat        {"messages": [{"role": "user", "content": […]}, …], "tools": […], "images": […]}
    pictures    {"text": "A cat: <|image|>", "images": […]}     or "image": a single one

Messages are OpenAI's (`inputs.messages`). A picture is a path, relative to the file's folder and in it, bytes, or both
as data sets of Hugging Face have them ({"bytes": …, "path": …}). A path that leads out of the folder, by `..`, from the
root or through a symbolic link, is an error: data may be anybody's, and should not read what is not theirs. Pictures
that are kept elsewhere go into Parquet as bytes, or the rows into a folder above both.

A picture stands in a message, or in "images", of which each place without a picture of its own takes the next. In rows
of pictures `<|image|>` marks their places; without it they come first. This is the one place where such text is more
than text: the row's author decides where the pictures are.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from llama4_jax.data.documents import Conversation, Document, Illustrated
from llama4_jax.inputs.messages import Message, Picture, read_messages, read_tools
from llama4_jax.inputs.picture_files import file_in
from llama4_jax.inputs.pictures import IMAGE
from llama4_jax.untrusted_json import parse_json, shown


class RowReader(NamedTuple):
    """How a row is read.

    - field: which it must have
    - optional: others that are read, if it has them
    - read: (row, where it is, the folder of its file) → document; raises ValueError for a row that is none, naming it,
      and FileNotFoundError for a picture that is not there
    """

    field: str
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], str, epath.Path], Document]


def text_rows(field: str) -> RowReader:
    def read(row: dict[str, Any], where: str, folder: epath.Path) -> str:
        if not isinstance(row[field], str):
            raise ValueError(f"{where}: the field {field!r} should be a string, and is {shown(row[field])}.")
        return row[field]

    return RowReader(field, (), read)


def chat_rows(field: str) -> RowReader:
    return RowReader(field, ("tools", "images"), functools.partial(_read_chat, field))


def picture_rows(field: str) -> RowReader:
    return RowReader(field, ("image", "images"), functools.partial(_read_pictures, field))


def _read_chat(field: str, row: dict[str, Any], where: str, folder: epath.Path) -> Conversation:
    messages = read_messages(_loaded(row[field], f"{where}, {field}"), where=f"{where}, {field}")
    tools = read_tools(_loaded(row.get("tools") or [], f"{where}, tools"), where=f"{where}, tools")
    places = [part for message in messages for part in message.content if isinstance(part, Picture)]
    pictures = _pictures(row, where, folder, [part.source for part in places])

    def filled(message: Message) -> Message:
        content = tuple(next(pictures) if isinstance(part, Picture) else part for part in message.content)
        return dataclasses.replace(message, content=content)

    pictures = iter(pictures)
    return Conversation(tuple(map(filled, messages)), tools, where)


def _read_pictures(field: str, row: dict[str, Any], where: str, folder: epath.Path) -> Illustrated:
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: the field {field!r} should be a string, and is {shown(row[field])}.")
    texts = row[field].split(IMAGE)
    if len(texts) == 1:  # no place is marked
        given = _given(row, where)
        texts = [""] * len(given) + texts
    pictures = _pictures(row, where, folder, [None] * (len(texts) - 1))
    content: list[str | Picture] = [texts[0]]
    for picture, text in zip(pictures, texts[1:], strict=True):
        content += [picture, text]
    return Illustrated(tuple(part for part in content if part != ""), where)


def _pictures(row: dict[str, Any], where: str, folder: epath.Path, places: list[Any]) -> list[Picture]:
    """A picture for each place: its own, or, where that is None, the next of the row's."""
    given = _given(row, where)
    free = sum(source is None for source in places)
    if free != len(given):
        raise ValueError(
            f"{where}: there are {free} places for pictures, and {len(given)} pictures in its image or images: each "
            f"picture needs a place, and each place a picture."
        )
    rest = iter(given)
    return [Picture(_found(next(rest) if source is None else source, where, folder)) for source in places]


def _given(row: dict[str, Any], where: str) -> list[Any]:
    single, several = row.get("image"), row.get("images")
    if several is not None and not isinstance(several, list):
        raise ValueError(f"{where}: images should be a list, and is {shown(several)}.")
    return ([] if single is None else [single]) + (several or [])


def _found(source: Any, where: str, folder: epath.Path) -> epath.Path | bytes:
    if isinstance(source, dict):  # {"bytes": …, "path": …}
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(f"{where}: a picture should be a path or bytes, and is {shown(source)}.")
    return file_in(folder, folder / source, name=where)


def _loaded(value: Any, where: str) -> Any:
    """Columns of nested lists are often kept as JSON."""
    return parse_json(value, where=where) if isinstance(value, str) else value

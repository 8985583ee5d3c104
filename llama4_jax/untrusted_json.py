"""JSON that others wrote, read so that a file can do no more than be refused.

    config = read_json(path / "config.json")                         # any JSON
    index = read_json(path / INDEX, of=Index)                        # as a type: a msgspec.Struct, dict[str, str], …
    row = parse_json(line, where="rows.jsonl, line 3", of=dict)

Everything from a file, a request or a model's reply comes through here. Whatever is wrong with it (bytes that are no
UTF-8, no JSON, nesting without end, integers of a million digits, a value of another type than expected) is one
ValueError that names the file and the place in it, in a few hundred characters at most and without the control
characters that it may hold. Values are not converted: "3", 3.0 and true are no integers, but 3 is a float.
"""

import json
from pathlib import Path
from typing import Any

import msgspec
from etils import epath

MAX_BYTES = 100_000_000  # of a file: what the safetensors package allows a header
_SHOWN = 80  # characters of a value in a message


def read_json(path: Path | epath.Path, *, of: Any = Any, why: str = "", max_bytes: int = MAX_BYTES) -> Any:
    """What a file holds, as the type `of`.

    - why: why the file should be there, for the message if it is not

    Raises FileNotFoundError if there is no such file; ValueError for one that is too large, or as `parse_json` does.
    """
    return parse_json(read_text(path, why=why, max_bytes=max_bytes), where=str(path), of=of)


def read_text(path: Path | epath.Path, *, why: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """What a file holds, for `parse_json`. Raises as `read_json` does."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}" + (f" ({why})." if why else "."))
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} is too large: of a file like this {max_bytes:,} bytes are read at most.")
    return data


def parse_json(data: bytes | str, *, where: str, of: Any = Any, exact: bool = False) -> Any:
    """A JSON text, as the type `of`. Raises ValueError, which begins with `where`.

    - exact: what readers in other languages refuse, and Python's takes, is an error too: a name twice in one object,
      half of a surrogate pair in an object's names and texts, NaN and infinities, and the integer -0
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, **_EXACT) if exact else json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is no valid JSON: it is nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise ValueError(f"{where} is no valid JSON: {shortened(str(error), 200)}.") from None
    return typed(value, of, where=where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"'{shortened(twice)}' is there twice")
    for name, value in pairs:
        for text in (name, value) if isinstance(value, str) else (name,):
            text.encode("utf-8")  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return found


def _whole(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no integer")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


_EXACT: dict[str, Any] = {"object_pairs_hook": _unique, "parse_int": _whole, "parse_constant": _no_constant}


def typed(value: Any, of: Any, *, where: str) -> Any:
    """The value as the type `of`, which msgspec knows how to check. Raises ValueError, which begins with `where` and
    names the place in it: "config.json: text_config.hidden_size: expected `int`, got `str`"."""
    if of is Any:
        return value
    try:
        return msgspec.convert(value, of)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply.") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half of a surrogate pair is no text.") from None
    except OverflowError:
        raise ValueError(f"{where}: a number is too large.") from None
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at `$")
        place = place.removesuffix("`").removeprefix(".")
        said = said[:1].lower() + said[1:]
        raise ValueError(f"{where}: {shortened(place) + ': ' if place else ''}{shortened(said, 200)}.") from None


def shortened(text: str, most: int = _SHOWN) -> str:
    """Text of others for a message: of one line, printable in every encoding, at most about so many characters."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return safe if len(text) <= most else safe[:most] + "…"


def shown(value: Any) -> str:
    """A value of others for a message: as `repr`, but `shortened`, and without walking through all of a large one."""
    if isinstance(value, int | float | bool | None) and not (isinstance(value, int) and abs(value) >= 10**30):
        return repr(value)
    if isinstance(value, str):
        return shortened(repr(value[: _SHOWN + 1]))
    if isinstance(value, list | dict):
        kind, of = ("a list", "entries") if isinstance(value, list) else ("an object", "keys")
        simple = isinstance(value, list) and len(value) <= 8 and all(isinstance(x, int | float | str) for x in value)
        return f"[{', '.join(map(shown, value))}]" if simple else f"{kind} of {len(value):,} {of}"
    return f"a {type(value).__name__}" if not isinstance(value, int) else "an integer of more than 30 digits"

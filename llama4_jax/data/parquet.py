"""Parquet: a document a row, of files that need not fit into memory; `rows` says what is read of it.

A row can only be read with its whole row group. So a row group is a block of the data set (shuffling goes through
blocks in random order, and through the rows of a block in random order), and those in use are kept.

A row gives the document that the same row gives as a line of JSON Lines, whatever types Arrow keeps it in: strings
large or in a dictionary, lists of every kind, maps, structs. Three things a file of Arrow's types cannot tell, so they
are settled here for all:

- Every struct of a column has the same fields, and those that a row had not are null. So a null in a struct is a field
  that is not there: `{"city": "Oslo", "zone": null}` is `{"city": "Oslo"}`. Nulls in lists and in maps were written,
  and stay.
- The fields of all structs stand in one order, that of the type.
- What stood as 1 beside a 2.5 is 1.0, and what was a date in a string may be a timestamp. The first is taken as it is;
  timestamps and other values that JSON does not have are an error where JSON is meant, as in the arguments of a call.

Arguments and tools kept as strings of JSON keep nulls, order and numbers.
"""

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from llama4_jax.atomic import in_bucket
from llama4_jax.data.documents import Document, Documents, empty_error, find_files, hash64
from llama4_jax.data.rows import RowReader
from llama4_jax.data.watch import stamp
from llama4_jax.untrusted_json import shortened

_CACHE = 1 << 30  # bytes of row groups to keep. The rows of a batch drift apart, so several are in use at a time.


class ParquetDocuments(Documents):
    """One document a row. The split is by the file's name and the row's number.

    Opening reads the files' footers alone. Raises ValueError, naming the file, for one that is no Parquet file, has no
    such column, or has nulls in it: here where the footer counts them, otherwise when one is met.

    - strings: whether the column must hold strings
    """

    def __init__(self, spec: str, pattern: str, rows: RowReader, *, strings: bool):
        self._paths, names = find_files(pattern, "*.parquet")
        stamps = [stamp(path) for path in self._paths]
        self._rows = rows
        self._groups: list[tuple[int, int]] = []  # file, row group in it
        hashes, sizes, largest = [], [], 1
        for number, (path, name) in enumerate(zip(self._paths, names, strict=True)):
            try:
                file = _open(path)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is no Parquet file, or damaged: {error}.") from error
            with file:
                column = _check_column(file, rows.field, str(path), strings=strings)
                metadata = file.metadata
                for group in range(metadata.num_row_groups):
                    chunk = metadata.row_group(group).column(column) if column is not None else None
                    if chunk is not None and chunk.statistics is not None and chunk.statistics.null_count:
                        raise _null_error(str(path), rows.field)
                    self._groups.append((number, group))
                    sizes.append(metadata.row_group(group).num_rows)
                    size = chunk.total_uncompressed_size if chunk else metadata.row_group(group).total_byte_size
                    largest = max(largest, size)
                hashes.append(np.random.PCG64(hash64(name.encode())).random_raw(metadata.num_rows))
        if not sum(sizes):
            raise empty_error(spec)
        self._firsts = np.cumsum([0, *sizes])
        blocks = np.unique(self._firsts)
        super().__init__(np.concatenate(hashes), sizes=sizes, blocks=blocks, stamps=stamps)
        self._read = functools.lru_cache(maxsize=max(2, _CACHE // largest))(self._read_group)

    def __getitem__(self, index: int) -> Document:
        group = int(np.searchsorted(self._firsts, index, side="right")) - 1
        inside = index - int(self._firsts[group])
        number, group_in_file = self._groups[group]
        path, table = self._paths[number], self._read(group)
        where = f"{path}, row {inside} of row group {group_in_file}"
        try:
            row = {
                name: _plain(table.column(name)[inside].as_py(), table.field(name).type) for name in table.column_names
            }
        except ValueError as error:  # a string that is no UTF-8, two fields of one name, a date beyond Python's
            raise ValueError(f"{where} cannot be read: {shortened(str(error), 200)}.") from error
        if row[self._rows.field] is None:
            raise _null_error(str(path), self._rows.field)
        return self._rows.read(row, where, path.parent)

    def _read_group(self, group: int) -> pa.Table:
        number, group_in_file = self._groups[group]
        with _open(self._paths[number]) as file:
            names = [name for name in (self._rows.field, *self._rows.optional) if name in file.schema_arrow.names]
            return file.read_row_group(group_in_file, columns=names)


def _open(path: epath.Path) -> pq.ParquetFile:
    """Whose file is closed with it."""
    return pq.ParquetFile(pa.PythonFile(path.open("rb"), "r") if in_bucket(path) else path)


def _plain(value: Any, kind: pa.DataType) -> Any:
    """A value of Arrow's as JSON would have it: structs without their nulls, and maps as dicts."""
    if value is None:
        return None
    kind = _stored(kind)
    if isinstance(kind, pa.StructType):
        return {field.name: _plain(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if isinstance(kind, pa.MapType):
        return {_plain(key, kind.key_type): _plain(inner, kind.item_type) for key, inner in value}
    if isinstance(value, list):
        return [_plain(inner, kind.value_type) for inner in value]
    return value


def _stored(kind: pa.DataType) -> pa.DataType:
    """What a type that only says how values are kept is made of."""
    while isinstance(kind, pa.BaseExtensionType | pa.DictionaryType | pa.RunEndEncodedType):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    return kind


def _holds_strings(kind: pa.DataType) -> bool:
    kind = _stored(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _check_column(file: pq.ParquetFile, column: str, path: str, *, strings: bool) -> int | None:
    """The number of a column that must be there; None if it is made of several."""
    schema = file.schema_arrow
    if column not in schema.names:
        raise ValueError(f"{path} has no column {column!r}, but {', '.join(map(repr, schema.names))}. Name one with #.")
    if strings and not _holds_strings(schema.field(column).type):
        raise ValueError(f"{path}: the column {column!r} should hold strings, and holds {schema.field(column).type}.")
    numbers = (i for i in range(file.metadata.num_columns) if file.schema.column(i).path == column)
    return next(numbers, None)


def _null_error(path: str, column: str) -> ValueError:
    return ValueError(f"{path}: the column {column!r} has nulls. Leave those rows out of the file.")

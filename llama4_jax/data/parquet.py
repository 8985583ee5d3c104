"""Parquet: a document a row, in one column, of files that need not fit into memory.

A row can only be read with its whole row group. So a row group is a block of the data set (shuffling goes through
blocks in random order, and through the rows of a block in random order), and those in use are kept.
"""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llama4_jax.data.documents import Documents, empty_error, find_files, hash64

_CACHE = 1 << 30  # bytes of row groups to keep. The rows of a batch drift apart, so several are in use at a time.


class ParquetDocuments(Documents):
    """One column of strings. The split is by the file's name and the row's number.

    Opening reads the files' footers alone. Raises ValueError, naming the file, for one that is no Parquet file, has no
    such column, or has nulls in it: here where the footer counts them, otherwise when one is met.
    """

    def __init__(self, pattern: str, column: str):
        self._paths, names = find_files(pattern, "*.parquet")
        self._column = column
        self._groups: list[tuple[int, int]] = []  # file, row group in it
        hashes, sizes, largest = [], [], 1
        for number, (path, name) in enumerate(zip(self._paths, names, strict=True)):
            try:
                file = pq.ParquetFile(path)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is no Parquet file, or damaged: {error}.") from error
            with file:
                index = _column_index(file, column, str(path))
                metadata = file.metadata
                for group in range(metadata.num_row_groups):
                    chunk = metadata.row_group(group).column(index)
                    if chunk.statistics is not None and chunk.statistics.null_count:
                        raise _null_error(str(path), column)
                    self._groups.append((number, group))
                    sizes.append(metadata.row_group(group).num_rows)
                    largest = max(largest, chunk.total_uncompressed_size)
                hashes.append(np.random.PCG64(hash64(name.encode())).random_raw(metadata.num_rows))
        if not sum(sizes):
            raise empty_error(f"parquet:{pattern}#{column}")
        self._firsts = np.cumsum([0, *sizes])
        super().__init__(np.concatenate(hashes), sizes=sizes, blocks=np.unique(self._firsts))
        self._read = functools.lru_cache(maxsize=max(2, _CACHE // largest))(self._read_group)

    def __getitem__(self, index: int) -> str:
        group = int(np.searchsorted(self._firsts, index, side="right")) - 1
        text = self._read(group)[index - int(self._firsts[group])].as_py()
        if text is None:
            raise _null_error(str(self._paths[self._groups[group][0]]), self._column)
        return text

    def _read_group(self, group: int) -> pa.ChunkedArray:
        number, group_in_file = self._groups[group]
        with pq.ParquetFile(self._paths[number]) as file:
            return file.read_row_group(group_in_file, columns=[self._column]).column(0)


def _column_index(file: pq.ParquetFile, column: str, path: str) -> int:
    schema = file.schema_arrow
    if column not in schema.names:
        raise ValueError(f"{path} has no column {column!r}, but {', '.join(map(repr, schema.names))}. Name one with #.")
    if schema.field(column).type not in (pa.string(), pa.large_string()):
        raise ValueError(f"{path}: the column {column!r} should hold strings, and holds {schema.field(column).type}.")
    return next(i for i in range(file.metadata.num_columns) if file.schema.column(i).path == column)


def _null_error(path: str, column: str) -> ValueError:
    return ValueError(f"{path}: the column {column!r} has nulls. Leave those rows out of the file.")

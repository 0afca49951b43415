"""Reads rows of CSV and Parquet files through Arrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from raymem.errors import DataError
from raymem.text import cut, shown
from raymem.training.data.rows.json_text import too_long

Row = dict[str, Any]
_AT_ONCE = 64
"""Rows that become Python values together."""
_LARGEST_BLOCK_BYTES = 1 << 30


def num_rows(path: Path, name: str, max_bytes: int) -> int:
    """Count the rows of a file.

    Raises:
        DataError: it is malformed.
    """
    if path.suffix == ".parquet":
        return int(_parquet(path, name).metadata.num_rows)
    return int(_csv_table(path, name, _stamp(path), max_bytes).num_rows)


def rows(path: Path, name: str, first: int, end: int, max_bytes: int) -> Iterator[Row]:
    """Yield the rows from index ``first`` up to ``end``.

    Raises:
        DataError: the file is malformed, or a row has more than ``max_bytes``.
    """
    if path.suffix != ".parquet":
        table = _csv_table(path, name, _stamp(path), max_bytes)
        yield from _python(table.slice(first, end - first), name, first, max_bytes)
        return
    at = 0
    for group in range((metadata := _parquet(path, name).metadata).num_row_groups):
        size = metadata.row_group(group).num_rows
        if at < end and first < at + size:
            low, high = max(first - at, 0), min(end - at, size)
            table = _row_group(path, name, _stamp(path), group)
            yield from map(without_absent, _python(table.slice(low, high - low), name, at + low, max_bytes))
        at += size


def without_absent(row: Row) -> Row:
    """Drop the keys that Arrow fills in: every object in a column has all keys that any of them has."""
    return {name: _present(value) for name, value in row.items()}


def num_bytes(value: Any) -> int:
    """Return about how many bytes the texts and numbers in a value have."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(len(str(key)) + num_bytes(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(num_bytes, value)) if value and isinstance(value[0], str | dict | list) else 8 * len(value)
    return 8


@contextlib.contextmanager
def explained(what: str, cure: str) -> Iterator[None]:
    """Turn what Arrow or the library ``datasets`` raises in the block, which is of many types, into a sentence."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{what} ({cut(reason)}): {cure}.") from error


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _python(table: Any, name: str, first: int, max_bytes: int) -> Iterator[Row]:
    for at in range(0, table.num_rows, _AT_ONCE):
        piece = table.slice(at, _AT_ONCE)
        if piece.nbytes > max_bytes:
            for index in range(piece.num_rows):
                if piece.slice(index, 1).nbytes > max_bytes:
                    raise DataError(f"{name} row {first + at + index + 1}: {too_long(max_bytes)}.")
        try:
            yield from piece.to_pylist()
        except UnicodeDecodeError:
            for index in range(piece.num_rows):
                _check_utf8(piece.slice(index, 1), f"{name} row {first + at + index + 1}")
            raise AssertionError("one of the rows is not UTF-8") from None


def _check_utf8(row: Any, where: str) -> None:
    for index, column in enumerate(row.columns):
        try:
            column.to_pylist()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where} column {shown(row.schema.names[index])} is not UTF-8 ({error.reason}): "
                "write its texts as UTF-8."
            ) from None


def _stamp(path: Path) -> tuple[int, int]:
    """Return a part of a cache key, so that a file that was replaced is read again."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


# It cannot be entered in the middle. One is kept, because a process reads the blocks of a file one after another.
@lru_cache(maxsize=1)
def _csv_table(path: Path, name: str, stamp: tuple[int, int], max_bytes: int) -> Any:
    """Read all columns as strings: a text that looks like a number is still a text."""
    from pyarrow import ArrowInvalid, csv, string

    block_bytes = min(max(2 * max_bytes, 1 << 20), _LARGEST_BLOCK_BYTES)  # a row may not be longer than a block
    reading = csv.ReadOptions(block_size=block_bytes)
    parsing = csv.ParseOptions(newlines_in_values=True)
    try:
        names = csv.open_csv(path, read_options=reading, parse_options=parsing).schema.names
        if twice := next((column for column in names if names.count(column) > 1), None):
            raise DataError(f"{name}:1: the column {shown(twice)} is given twice; rename or remove one of them.")
        types = csv.ConvertOptions(column_types=dict.fromkeys(names, string()), strings_can_be_null=False)
        return csv.read_csv(path, read_options=reading, parse_options=parsing, convert_options=types)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}:1: the names of the columns are not UTF-8 ({error}): convert the file to UTF-8."
        ) from None
    except ArrowInvalid as error:
        if "straddling" in str(error):
            raise DataError(
                f"{name}: a row is longer than a block of {block_bytes} bytes: {too_long(max_bytes)}."
            ) from None
        raise DataError(
            f"{name} is not a valid CSV file ({cut(str(error))}): write a header line, commas, and quotes around "
            "texts, all in UTF-8."
        ) from None


def _parquet(path: Path, name: str) -> Any:
    from pyarrow import parquet

    with explained(f"{name} is not a valid Parquet file", "write it again"):
        return parquet.ParquetFile(path)


@lru_cache(maxsize=1)
def _row_group(path: Path, name: str, stamp: tuple[int, int], group: int) -> Any:
    with explained(f"{name} row group {group} is damaged", "write the file again"):
        return _parquet(path, name).read_row_group(group)

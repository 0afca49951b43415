"""Reads rows of files and Hugging Face data sets by *block*: a range of rows that one task reads on its own.

A block is a small plain value, so that it can be sent to another process instead of its rows. Every row comes with its
place (``file.jsonl:17``), which the error messages about it begin with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from raymem.errors import DataError
from raymem.recipe.paths import DATA_FILES
from raymem.storage.publish import file_sha256

Row = dict[str, Any]


@dataclass(frozen=True)
class FileBlock:
    """Rows ``first_row`` .. ``first_row + num_rows - 1`` of a local file."""

    path: str
    first_row: int
    num_rows: int
    offset: int = 0
    """The byte at which the first row begins, for JSON lines."""
    first_line: int = 1
    """The line number of the first row, for JSON lines."""
    name: str = ""
    """The name of the file in messages, where ``path`` is a copy of it."""


@dataclass(frozen=True)
class HubBlock:
    """Rows ``first_row`` .. ``first_row + num_rows - 1`` of a Hugging Face data set."""

    path: str
    subset: str | None
    split: str
    revision: str | None
    fingerprint: str
    first_row: int
    num_rows: int


Block = FileBlock | HubBlock
BLOCK_BYTES = 16 << 20
"""Bytes at which a block of JSON lines ends, so that long rows do not fill the memory of a task."""


class _GivenTwice(ValueError):
    """Two values of one key, of which only one could be read."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:80]!r} is given twice; keep one of them.")


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _GivenTwice(next(key for key in keys if keys.count(key) > 1))
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def index_file(path: Path, block_rows: int, name: str = "") -> tuple[str, list[FileBlock]]:
    """Compute SHA-256 of a file and its blocks of at most ``block_rows`` rows (none if it is empty).

    Args:
        name: what to call the file in messages; by default its path.

    Raises:
        DataError: the file cannot be read or parsed.
    """
    name = name or str(path)
    try:
        if _is_json_lines(path):
            return _index_lines(path, block_rows, name)
        rows = _count_rows(path, name)
        blocks = [
            FileBlock(str(path), first, min(block_rows, rows - first), name=name)
            for first in range(0, rows, block_rows)
        ]
        return file_sha256(path), blocks
    except OSError as error:
        raise _unreadable(name, error) from error


def index_hub(
    path: str, subset: str | None, split: str, revision: str | None, block_rows: int
) -> tuple[str, list[HubBlock]]:
    """Return the resolved fingerprint of a Hugging Face data set, and its blocks."""
    rows = load_hub(path, subset, split, revision)
    fingerprint = str(rows._fingerprint)
    blocks = [
        HubBlock(path, subset, split, revision, fingerprint, first, min(block_rows, len(rows) - first))
        for first in range(0, len(rows), block_rows)
    ]
    return fingerprint, blocks


def read_block(block: Block) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for every row of a block.

    Raises:
        DataError: a row is malformed, or what the block describes cannot be read any more.
    """
    if isinstance(block, HubBlock):
        yield from _read_hub(block)
        return
    path, name = Path(block.path), block.name or block.path
    try:
        if _is_json_lines(path):
            yield from _read_lines(path, block, name)
        else:
            for index, row in enumerate(_read_range(path, block, name), start=block.first_row + 1):
                if not isinstance(row, dict):
                    raise DataError(_not_an_object(f"{name} row {index}", row))
                yield f"{name} row {index}", row
    except OSError as error:
        raise _unreadable(name, error) from error


def load_hub(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    """Call ``datasets.load_dataset``, with every failure as one sentence.

    Raises:
        DataError: no such data set, subset or split, or no network and not cached.
    """
    import datasets

    try:
        return datasets.load_dataset(path, name=subset, split=split, revision=revision)
    except Exception as error:  # the library raises two dozen types here
        reason = str(error).strip().splitlines() or [""]
        raise DataError(
            f"Hugging Face data set {path} (subset {subset}, split {split}, revision {revision}) cannot be loaded "
            f"({type(error).__name__}: {reason[0]}): check the names and the network, or pass a local "
            f"{DATA_FILES} file or directory as the path."
        ) from error


@lru_cache(maxsize=1)
def _cached_hub(path: str, subset: str | None, split: str, revision: str | None, fingerprint: str) -> Any:
    rows = load_hub(path, subset, split, revision)
    if str(rows._fingerprint) != fingerprint:
        raise DataError(
            f"Hugging Face data set {path} differs between processes (fingerprint {rows._fingerprint}, expected "
            f"{fingerprint}): pin it with revision."
        )
    return rows


def _read_hub(block: HubBlock) -> Iterator[tuple[str, Row]]:
    rows = _cached_hub(block.path, block.subset, block.split, block.revision, block.fingerprint)
    for index in range(block.first_row, block.first_row + block.num_rows):
        yield f"{block.path}[{block.split}] row {index + 1}", _without_absent(rows[index])


def _is_json_lines(path: Path) -> bool:
    """Say whether a file is JSON lines: .jsonl always, .json unless its first character opens a list."""
    if path.suffix != ".json":
        return path.suffix == ".jsonl"
    with path.open("rb") as file:
        for line in file:
            if text := line.lstrip(b"\xef\xbb\xbf").strip():
                return not text.startswith(b"[")
    return True


def _index_lines(path: Path, block_rows: int, name: str) -> tuple[str, list[FileBlock]]:
    """Read the bytes once: hashes them, and finds where blocks begin, counting lines that are not blank."""
    content = hashlib.sha256()
    blocks: list[FileBlock] = []
    rows = offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content.update(line)
            if line.strip():
                last = blocks[-1] if blocks else None
                if last is None or rows - last.first_row == block_rows or offset - last.offset >= BLOCK_BYTES:
                    blocks.append(FileBlock(str(path), rows, 0, offset, number, name))
                rows += 1
            offset += len(line)
    ends = [*(block.first_row for block in blocks[1:]), rows]
    counted = [replace(block, num_rows=end - block.first_row) for block, end in zip(blocks, ends, strict=False)]
    return content.hexdigest(), counted


def _read_lines(path: Path, block: FileBlock, name: str) -> Iterator[tuple[str, Row]]:
    left = block.num_rows
    with path.open("rb") as file:
        file.seek(block.offset)
        for number, line in enumerate(file, start=block.first_line):
            if left == 0:
                return
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = _JSON.decode(line.decode("utf-8-sig"))
            except _GivenTwice as error:
                raise DataError(f"{where}: {error}") from None
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise DataError(
                    f"{where} is not valid JSON ({error}): write one UTF-8 JSON object per line."
                ) from error
            if not isinstance(row, dict):
                raise DataError(_not_an_object(where, row))
            left -= 1
            yield where, row


def _count_rows(path: Path, name: str) -> int:
    if path.suffix == ".parquet":
        return int(_parquet(path, name).metadata.num_rows)
    return len(_whole(path, name))


def _read_range(path: Path, block: FileBlock, name: str) -> list[Any]:
    end = block.first_row + block.num_rows
    if path.suffix != ".parquet":
        rows = _whole(path, name)[block.first_row : end]
        return rows if isinstance(rows, list) else list(rows.to_pylist())
    rows, first = [], 0
    for group in range((metadata := _parquet(path, name).metadata).num_row_groups):
        size = metadata.row_group(group).num_rows
        if first < end and block.first_row < first + size:
            low, high = max(block.first_row - first, 0), min(end - first, size)
            table = _row_group(path, name, _stamp(path), group).slice(low, high - low)
            rows += map(_without_absent, table.to_pylist())
        first += size
    return rows


def _without_absent(row: Row) -> Row:
    """Drop the keys that Arrow fills in: every object in a column has all keys that any of them has."""
    return {name: _present(value) for name, value in row.items()}


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _stamp(path: Path) -> tuple[int, int]:
    """Return a part of a cache key, so that a file that was replaced is read again."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _whole(path: Path, name: str) -> Any:
    return (_csv_table if path.suffix == ".csv" else _json_list)(path, name, _stamp(path))


# These cannot be entered in the middle. One is kept, because a process reads the blocks of a file one after another.
@lru_cache(maxsize=1)
def _json_list(path: Path, name: str, stamp: tuple[int, int]) -> list[Any]:
    try:
        rows = _JSON.decode(path.read_bytes().decode("utf-8-sig"))
    except _GivenTwice as error:
        raise DataError(f"{name}: {error}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{error.lineno} is not valid JSON ({error}): write one list of objects.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 ({error}): convert it to UTF-8.") from error
    assert isinstance(rows, list)  # it begins with [ and is valid
    return rows


@lru_cache(maxsize=1)
def _csv_table(path: Path, name: str, stamp: tuple[int, int]) -> Any:
    """Read all columns as strings: a text that looks like a number is still a text."""
    from pyarrow import ArrowInvalid, csv, string

    reading = csv.ReadOptions(block_size=1 << 26)  # a row may not be longer than a block; the default is 1 MiB
    parsing = csv.ParseOptions(newlines_in_values=True)
    try:
        names = csv.open_csv(path, read_options=reading, parse_options=parsing).schema.names
        if twice := next((column for column in names if names.count(column) > 1), None):
            raise DataError(f"{name}:1: the column {twice[:80]!r} is given twice; rename or remove one of them.")
        types = csv.ConvertOptions(column_types=dict.fromkeys(names, string()), strings_can_be_null=False)
        return csv.read_csv(path, read_options=reading, parse_options=parsing, convert_options=types)
    except ArrowInvalid as error:
        if path.stat().st_size == 0:
            return []
        raise DataError(
            f"{name} is not a valid CSV file ({error}): write a header line, commas, and quotes around texts."
        ) from error


def _parquet(path: Path, name: str) -> Any:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise DataError(f"{name} is not a valid Parquet file ({error}): write it again.") from error


@lru_cache(maxsize=1)
def _row_group(path: Path, name: str, stamp: tuple[int, int], group: int) -> Any:
    from pyarrow import ArrowException

    try:
        return _parquet(path, name).read_row_group(group)
    except (ArrowException, OSError) as error:
        raise DataError(f"{name} row group {group} is damaged ({error}): write the file again.") from error


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"{name} cannot be read ({error.strerror or error}): check that this process may read it.")


def _not_an_object(where: str, row: Any) -> str:
    return f"{where} is {type(row).__name__} {str(row)[:40]!r}, not an object: write one JSON object per example."

"""Reads rows of files and Hugging Face data sets by *block*: a range of rows that one task reads on its own.

A block is a small plain value, so that it can be sent to another process instead of its rows. Every row comes with its
place (``file.jsonl:17``), which the error messages about it begin with.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from raymem.errors import DataError
from raymem.recipe.data import MAX_EXAMPLE_BYTES
from raymem.recipe.paths import DATA_FILES, TEXT_SUFFIX
from raymem.storage.publish import file_sha256
from raymem.text import shown
from raymem.training.data.rows import plain_text, tables
from raymem.training.data.rows.json_text import Elements, Unusable, decode, too_long
from raymem.training.data.rows.tables import Row


@dataclass(frozen=True)
class FileBlock:
    """Rows ``first_row`` .. ``first_row + num_rows - 1`` of a local file."""

    path: str
    first_row: int
    num_rows: int
    offset: int = 0
    """The byte at which the first row begins, for JSON."""
    first_line: int = 1
    """The line number of the first row, for JSON."""
    name: str = ""
    """The name of the file in messages, where ``path`` is a copy of it."""
    max_bytes: int = MAX_EXAMPLE_BYTES
    """The largest size of one row."""


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
    max_bytes: int = MAX_EXAMPLE_BYTES
    """The largest size of one row."""


Block = FileBlock | HubBlock
BLOCK_BYTES = 16 << 20
"""Bytes at which a block of JSON lines ends, so that long rows do not fill the memory of a task."""


def index_file(
    path: Path, block_rows: int, name: str = "", max_bytes: int = MAX_EXAMPLE_BYTES
) -> tuple[str, list[FileBlock]]:
    """Compute SHA-256 of a file and its blocks of at most ``block_rows`` rows (none if it is empty).

    Args:
        name: what to call the file in messages; by default its path.
        max_bytes: the largest size of one row.

    Raises:
        DataError: the file cannot be read or parsed, or a row is longer.
    """
    name = name or str(path)
    try:
        if not path.stat().st_size:  # empty, or one of /proc, which may never end
            return hashlib.sha256().hexdigest(), []
        if path.suffix != ".parquet":
            _check_text(path, name)
        if _is_json_lines(path):
            return _index_lines(path, block_rows, name, max_bytes)
        if path.suffix == TEXT_SUFFIX:
            return file_sha256(path), _index_text(path, block_rows, name, max_bytes)
        if path.suffix == ".json":
            return file_sha256(path), _index_list(path, block_rows, name, max_bytes)
        rows = tables.num_rows(path, name, max_bytes)
        blocks = [
            FileBlock(str(path), first, min(block_rows, rows - first), name=name, max_bytes=max_bytes)
            for first in range(0, rows, block_rows)
        ]
        return file_sha256(path), blocks
    except OSError as error:
        raise _unreadable(name, error) from error


def index_hub(
    path: str,
    subset: str | None,
    split: str,
    revision: str | None,
    block_rows: int,
    max_bytes: int = MAX_EXAMPLE_BYTES,
) -> tuple[str, list[HubBlock]]:
    """Return the resolved fingerprint of a Hugging Face data set, and its blocks."""
    rows = load_hub(path, subset, split, revision)
    fingerprint = str(rows._fingerprint)
    blocks = [
        HubBlock(path, subset, split, revision, fingerprint, first, min(block_rows, len(rows) - first), max_bytes)
        for first in range(0, len(rows), block_rows)
    ]
    return fingerprint, blocks


def read_block(block: Block) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for every row of a block.

    Raises:
        DataError: a row is malformed or too long, or what the block describes cannot be read any more.
    """
    if isinstance(block, HubBlock):
        yield from _read_hub(block)
        return
    path, name = Path(block.path), block.name or block.path
    try:
        if _is_json_lines(path):
            yield from _read_lines(path, block, name)
        elif path.suffix == TEXT_SUFFIX:
            yield from _read_text(path, block, name)
        elif path.suffix == ".json":
            yield from _read_list(path, block, name)
        else:
            end = block.first_row + block.num_rows
            found = tables.rows(path, name, block.first_row, end, block.max_bytes)
            for index, row in enumerate(found, start=block.first_row + 1):
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
        where = f"{block.path}[{block.split}] row {index + 1}"
        with tables.explained(f"{where} cannot be read", "mend or leave out this row"):
            row = tables.without_absent(rows[index])
        if tables.num_bytes(row) > block.max_bytes:
            raise DataError(f"{where}: {too_long(block.max_bytes)}.")
        yield where, row


def _check_text(path: Path, name: str) -> None:
    """Refuse a file that is no text in UTF-8 by its first bytes."""
    with path.open("rb") as file:
        begin = file.read(4096)
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in begin:
        raise DataError(
            f"{name} is not UTF-8 (it begins with {shown(begin[:8])}, as UTF-16 or a file that is no text): "
            f"convert it, for example with iconv -f UTF-16 -t UTF-8."
        )


def _is_json_lines(path: Path) -> bool:
    """Say whether a file is JSON lines: .jsonl always, .json unless its first character opens a list."""
    if path.suffix != ".json":
        return path.suffix == ".jsonl"
    with path.open("rb") as file:
        while chunk := file.read(1 << 16):
            if text := chunk.lstrip(b"\xef\xbb\xbf \t\r\n"):
                return not text.startswith(b"[")
    return True


def _lines(file: BinaryIO, name: str, max_bytes: int, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line, of which none is read far beyond the limit."""
    for number, line in enumerate(iter(partial(file.readline, max_bytes + 2), b""), start=first):
        if len(line) > max_bytes and len(line.rstrip(b"\r\n")) > max_bytes:
            raise DataError(f"{name}:{number}: {too_long(max_bytes)}.")
        yield number, line


def _index_lines(path: Path, block_rows: int, name: str, max_bytes: int) -> tuple[str, list[FileBlock]]:
    """Read the bytes once: hashes them, and finds where blocks begin, counting lines that are not blank."""
    content = hashlib.sha256()
    blocks: list[FileBlock] = []
    rows = offset = 0
    with path.open("rb") as file:
        for number, line in _lines(file, name, max_bytes):
            content.update(line)
            if line.strip():
                last = blocks[-1] if blocks else None
                if last is None or rows - last.first_row == block_rows or offset - last.offset >= BLOCK_BYTES:
                    blocks.append(FileBlock(str(path), rows, 0, offset, number, name, max_bytes))
                rows += 1
            offset += len(line)
    return content.hexdigest(), _counted(blocks, rows)


def _index_list(path: Path, block_rows: int, name: str, max_bytes: int) -> list[FileBlock]:
    blocks: list[FileBlock] = []
    rows = 0
    with path.open("rb") as file:
        for offset, line, _ in _elements(Elements(file, max_bytes), name):
            if rows % block_rows == 0:
                blocks.append(FileBlock(str(path), rows, 0, offset, line, name, max_bytes))
            rows += 1
    return _counted(blocks, rows)


def _index_text(path: Path, block_rows: int, name: str, max_bytes: int) -> list[FileBlock]:
    blocks: list[FileBlock] = []
    rows = 0
    with path.open("rb") as file:
        for offset, line, _ in plain_text.pieces(_lines(file, name, max_bytes)):
            last = blocks[-1] if blocks else None
            if last is None or rows - last.first_row == block_rows or offset - last.offset >= BLOCK_BYTES:
                blocks.append(FileBlock(str(path), rows, 0, offset, line, name, max_bytes))
            rows += 1
    return _counted(blocks, rows)


def _read_text(path: Path, block: FileBlock, name: str) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        file.seek(block.offset)
        lines = _lines(file, name, block.max_bytes, block.first_line)
        for _, line, piece in islice(plain_text.pieces(lines, block.offset), block.num_rows):
            try:
                yield f"{name}:{line}", {"text": plain_text.text_of(piece)}
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}: the text from line {line} on is not UTF-8 ({error.reason}): convert the file to UTF-8."
                ) from None


def _counted(blocks: list[FileBlock], rows: int) -> list[FileBlock]:
    """Give blocks the number of their rows, of which there are ``rows`` in all."""
    ends = [*(block.first_row for block in blocks[1:]), rows]
    return [replace(block, num_rows=end - block.first_row) for block, end in zip(blocks, ends, strict=False)]


def _read_lines(path: Path, block: FileBlock, name: str) -> Iterator[tuple[str, Row]]:
    left = block.num_rows
    with path.open("rb") as file:
        file.seek(block.offset)
        for number, line in _lines(file, name, block.max_bytes, block.first_line):
            if left == 0:
                return
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = decode(line)
            except Unusable as error:
                raise _unusable(where, error, "write one UTF-8 JSON object per line") from None
            left -= 1
            yield where, _object(where, row)


def _read_list(path: Path, block: FileBlock, name: str) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        file.seek(block.offset)
        elements = _elements(Elements(file, block.max_bytes, block.offset, block.first_line), name)
        for index, (_, _, row) in zip(range(block.first_row, block.first_row + block.num_rows), elements, strict=False):
            where = f"{name} row {index + 1}"
            yield where, _object(where, row)


def _elements(elements: Elements, name: str) -> Iterator[tuple[int, int, Any]]:
    try:
        yield from elements
    except Unusable as error:
        raise _unusable(f"{name}:{error.line}", error, "write one list of objects, in UTF-8") from None


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} is {type(row).__name__} {shown(row)}, not an object: write one JSON object per example."
        )
    return row


def _unusable(where: str, error: Unusable, cure: str) -> DataError:
    return DataError(f"{where}: {error}." if error.is_json else f"{where} is not valid JSON ({error}): {cure}.")


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"{name} cannot be read ({error.strerror or error}): check that this process may read it.")

"""A recipe's :class:`Source` -> what it contains (identity) and the blocks to read it by."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from raymem.errors import DataError
from raymem.recipe.paths import DATA_SUFFIXES, is_local
from raymem.recipe.schema import Source
from raymem.training.data.readers import Block, Row, index_file, index_hub, read_block


@dataclass(frozen=True)
class OpenedSource:
    """A source that exists and has rows."""

    place: str
    """Where the recipe names it, for example ``data.train[0]``."""
    identity: list[str]
    """What tells its contents apart from any other: one content hash per file, or the data set's fingerprint."""
    blocks: list[Block]
    first_place: str
    first_row: Row


def open_source(source: Source, place: str, cache_dir: Path, block_rows: int) -> OpenedSource:
    """Find a source, hash it and cut it into blocks of ``block_rows`` rows.

    Raises:
        DataError: it does not exist, cannot be read, is malformed, or is empty.
    """
    identity: list[str]
    blocks: list[Block]
    if not (source.path.startswith("demo:") or "://" in source.path or is_local(source.path)):
        fingerprint, hub_blocks = index_hub(source.path, source.subset, source.split, source.revision, block_rows)
        identity = ["hub", source.path, source.subset or "", source.split, source.revision or "", fingerprint]
        blocks = [*hub_blocks]
    else:
        indexed = [index_file(path, block_rows) for path in _files(source, place, cache_dir)]
        identity = [content for content, _ in indexed]
        blocks = [block for _, file_blocks in indexed for block in file_blocks]
    if not blocks:
        raise DataError(f"{place}.path={source.path!r} has no rows: give it at least one example.")
    first_place, first_row = next(iter(read_block(blocks[0])))
    return OpenedSource(place, identity, blocks, first_place, first_row)


def _files(source: Source, place: str, cache_dir: Path) -> list[Path]:
    if source.path.startswith("demo:"):
        return [_demo_file(source, place, cache_dir)]
    if "://" in source.path:
        raise DataError(f"{place}.path={source.path!r} is a URL: copy the data to a path that every node sees.")
    path = Path(source.path).expanduser().absolute()
    if not path.exists():
        raise DataError(f"{place}.path={source.path!r} does not exist{_hint(path)}")
    if path.is_dir():
        return _files_in(path, f"{place}.path={source.path!r}")
    if path.suffix not in DATA_SUFFIXES:
        raise DataError(
            f"{place}.path={source.path!r} is no known kind of file: use one of {', '.join(DATA_SUFFIXES)}."
        )
    return [path]


def _files_in(directory: Path, place: str) -> list[Path]:
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror}): check that this process may read it.") from error
    files = [
        path for path in entries if path.is_file() and path.suffix in DATA_SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{place} has no data files: put {', '.join(DATA_SUFFIXES)} files directly into it.")
    return files


def _demo_file(source: Source, place: str, cache_dir: Path) -> Path:
    # Here, because the demo itself is built on this package and may be imported first.
    from raymem.training.data.demo import CORPORA, SPLITS, ensure_demo

    corpus = source.path.removeprefix("demo:")
    if corpus not in CORPORA:
        raise DataError(
            f"{place}.path={source.path!r} is no demo data: use {' or '.join(f'demo:{c}' for c in CORPORA)}."
        )
    if source.split not in SPLITS:
        raise DataError(f"{place}.split={source.split!r} is no split of the demo data: use {' or '.join(SPLITS)}.")
    return ensure_demo(cache_dir).corpus(corpus, source.split)


def _hint(path: Path) -> str:
    """'; the nearest ...' for a missing path, as far as the file system can tell."""
    parent = path.parent
    if not parent.is_dir():
        return f", nor does its directory {parent}: check the path."
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in parent.iterdir()), n=1)
    return f": did you mean {parent / near[0]}?" if near else f": {parent} has nothing of a similar name."

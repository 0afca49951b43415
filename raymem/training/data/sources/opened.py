"""Opens a recipe's :class:`Source`: finds its identity, and the blocks to read it by."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raymem.errors import DataError
from raymem.recipe.data import MAX_EXAMPLE_BYTES, Source
from raymem.recipe.paths import DATA_FILES, DATA_SUFFIXES, is_local
from raymem.text import cut
from raymem.training.data.readers import Block, index_hub, read_block
from raymem.training.data.rows.tables import Row
from raymem.training.data.sources.copies import LocalFile, SourceFile
from raymem.training.data.sources.digests import is_rewritten, stamp
from raymem.training.data.sources.index import FileIndex, IndexFiles, index_here
from raymem.training.data.sources.remote import RemoteDirectory, RemoteFile, shown
from raymem.training.data.sources.splits import check_single, choose, data_files

_DEFAULT_SPLIT = "train"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedSource:
    """A source that exists and has rows."""

    where: str
    """The path in the recipe, for example ``data.train[0]``."""
    identity: list[str]
    """The identity of its contents: one content hash per file, or the data set's fingerprint."""
    blocks: list[Block]
    first_place: str
    first_row: Row
    files: tuple[SourceFile, ...] = ()
    """Its files; None for a Hugging Face id."""
    looks: list[dict[str, Any]] = field(default_factory=list)
    """The outward facts of the plain files when they were indexed."""
    remote: dict[str, RemoteFile] = field(default_factory=dict)
    """The files that are not on this machine, by the ``path`` of their blocks."""

    def check_unchanged(self) -> None:
        """Refuse rows read meanwhile if a file has changed: they would be stored under the identity of other rows.

        Raises:
            DataError: a file was written, or is gone.
        """
        for then in self.looks:
            if is_rewritten(then, stamp(Path(then["path"]), then["path"])):
                raise DataError(f"{then['path']} changed while it was prepared: run again when it is complete.")


def open_source(
    source: Source, where: str, cache_dir: Path, block_rows: int, max_bytes: int = MAX_EXAMPLE_BYTES
) -> OpenedSource:
    """Open a source by reading it here; see :func:`open_sources`."""
    return open_sources([(where, source)], cache_dir, block_rows, max_bytes)[0]


def open_sources(
    sources: Sequence[tuple[str, Source]],
    cache_dir: Path,
    block_rows: int,
    max_bytes: int = MAX_EXAMPLE_BYTES,
    index: IndexFiles | None = None,
) -> list[OpenedSource]:
    """Find sources, hash them and cut them into blocks of at most ``block_rows`` rows of ``max_bytes`` each.

    Args:
        sources: place in the recipe and source of each.
        index: indexes the files; by default they are read here.

    Raises:
        DataError: one does not exist, cannot be read, is malformed, or is empty.
    """
    files = [() if is_hub(source) else tuple(files_of(source, where, cache_dir)) for where, source in sources]
    asked = [(file, where) for (where, _), its in zip(sources, files, strict=True) for file in its]
    indexed = iter((index or index_here(cache_dir, block_rows, max_bytes))(asked))
    opened = []
    for (where, source), its in zip(sources, files, strict=True):
        if is_hub(source):
            opened.append(_open_hub(source, where, block_rows, max_bytes))
        else:
            opened.append(_open_files(source, where, its, [next(indexed) for _ in its]))
    return opened


def _open_hub(source: Source, where: str, block_rows: int, max_bytes: int) -> OpenedSource:
    split = source.split or _DEFAULT_SPLIT
    fingerprint, blocks = index_hub(source.path, source.subset, split, source.revision, block_rows, max_bytes)
    identity = ["hub", source.path, source.subset or "", split, source.revision or "", fingerprint]
    kept = _wanted(source, where, blocks)
    place, row = next(iter(read_block(kept[0])))
    return OpenedSource(where, identity, kept, place, row)


def _open_files(
    source: Source, where: str, files: tuple[SourceFile, ...], indexed: Sequence[FileIndex]
) -> OpenedSource:
    identity = [one.content for one in indexed]
    _warn_of_doubles(where, files, identity)
    blocks = _wanted(source, where, [block for one in indexed for block in one.blocks])
    begins = next(one for one in indexed if one.blocks)
    place, row = begins.first or next(iter(read_block(blocks[0])))
    looks = [one.looks for one in indexed if one.looks is not None]
    remote = {one.blocks[0].path: one.remote for one in indexed if one.blocks and one.remote is not None}
    return OpenedSource(where, identity, blocks, place, row, files, looks, remote)


def _wanted(source: Source, where: str, blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks of a source that are to be read. Raises DataError if there is none."""
    if not blocks:
        raise DataError(f"{where}.path={source.path!r} has no rows: give it at least one example.")
    return list(blocks) if source.max_rows is None else _first_rows(blocks, source.max_rows)


def _first_rows(blocks: Sequence[Block], max_rows: int) -> list[Block]:
    """Return the blocks of the first rows; the last one may be cut."""
    kept: list[Block] = []
    left = max_rows
    for block in blocks:
        if left <= 0:
            break
        kept.append(replace(block, num_rows=min(left, block.num_rows)))
        left -= block.num_rows
    return kept


def is_hub(source: Source) -> bool:
    """Say whether a source is an id of the Hugging Face hub, rather than files."""
    return not (source.path.startswith("demo:") or "://" in source.path or is_local(source.path))


def files_of(source: Source, where: str, cache_dir: Path) -> list[SourceFile]:
    """List the files that a source consists of; none of them is read.

    Raises:
        DataError: there is none, they are of no known kind, or they do not say which of them make its split.
    """
    for option in ("subset", "revision"):
        if getattr(source, option) is not None:
            raise DataError(
                f"{where}.{option}={getattr(source, option)!r} means something for a Hugging Face id only: leave it "
                f"out, or write it into the path (a folder, or hf://datasets/<owner>/<name>@<revision>/...)."
            )
    if source.path.startswith("demo:"):
        return [LocalFile(_demo_file(source, where, cache_dir))]
    named = f"{where}.path={cut(source.path, 300)!r}"
    if "://" in source.path:
        remote = RemoteDirectory(source.path, where)
        if remote.is_file():
            file = remote.file()
            _check_file(file.name, source, where)
            return [file]
        names = _some(data_files(remote.entries), named)
        directory = shown(source.path).rstrip("/").rpartition("/")[2]
        return [remote.file(name) for name in choose(names, source.split, where, directory)]
    path = _existing(source.path, named)
    if not path.is_dir():
        _check_file(str(path), source, where)
        return [LocalFile(path)]

    def entries(folder: str) -> Iterator[tuple[str, bool]]:
        try:
            for entry in (path / folder).iterdir():
                is_folder = entry.is_dir()
                if is_folder and entry.is_symlink():
                    _refuse_loop(path, entry, named)
                yield entry.name, is_folder
        except OSError as error:
            raise DataError(
                f"{named} cannot be read ({error.strerror}): check that this process may read it."
            ) from error

    names = _some(data_files(entries), named)
    return [LocalFile(path / name) for name in choose(names, source.split, where, path.name)]


def _existing(text: str, named: str) -> Path:
    """Return the absolute path of a file or folder that is there."""
    try:
        path = Path(text).expanduser().absolute()
        path.stat()
    except RuntimeError:
        raise DataError(f"{named}: no such user, or one without a home: write the whole path.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{named} does not exist{_hint(path)}") from None
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a NUL
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{named} cannot be read ({reason}): check the path, and that this process may read it."
        ) from None
    return path


def _refuse_loop(directory: Path, link: Path, named: str) -> None:
    """Refuse a link in a directory to a folder on the way to it, which would be read without end."""
    way = [folder.resolve() for folder in link.parents if folder.is_relative_to(directory)]
    if (target := link.resolve()) in way:
        raise DataError(f"{named}: the link {link} leads back to {target}, which holds it: remove the link.")


def _warn_of_doubles(where: str, files: Sequence[SourceFile], contents: Sequence[str]) -> None:
    """Warn of files with the same contents, such as a file and its compressed copy in a directory."""
    first: dict[str, str] = {}
    for file, content in zip(files, contents, strict=True):
        if (other := first.setdefault(content, file.name)) != file.name:
            log.warning("%s: %s and %s have the same contents, and both are read", where, other, file.name)


def _check_file(name: str, source: Source, where: str) -> None:
    if not name.endswith(DATA_SUFFIXES):
        raise DataError(f"{where}.path={source.path!r} is no known kind of file: use one of {DATA_FILES}.")
    check_single("/".join(name.split("/")[-2:]), source.split, where)


def _some(names: list[str], named: str) -> list[str]:
    if not names:
        raise DataError(
            f"{named} has no data files: put {DATA_FILES} files directly into it, into data/, or into folders that are "
            f"named after splits."
        )
    return names


def _demo_file(source: Source, where: str, cache_dir: Path) -> Path:
    # Here, because the demo itself is built on this package and may be imported first.
    from raymem.training.data.demo import CORPORA, SPLITS, ensure_demo

    corpus, split = source.path.removeprefix("demo:"), source.split or _DEFAULT_SPLIT
    if corpus not in CORPORA:
        raise DataError(
            f"{where}.path={source.path!r} is no demo data: use {' or '.join(f'demo:{c}' for c in CORPORA)}."
        )
    if split not in SPLITS:
        raise DataError(f"{where}.split={source.split!r} is no split of the demo data: use {' or '.join(SPLITS)}.")
    return ensure_demo(cache_dir).corpus(corpus, split)


def _hint(path: Path) -> str:
    """Return '; the nearest ...' for a missing path, as far as the file system can tell."""
    parent = path.parent
    if not parent.is_dir():
        return f", nor does its directory {parent}: check the path."
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in parent.iterdir()), n=1)
    return f": did you mean {parent / near[0]}?" if near else f": {parent} has nothing of a similar name."

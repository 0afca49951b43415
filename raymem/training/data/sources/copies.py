"""Makes plain local files of compressed and remote ones, once, under ``<cache_dir>/sources/``.

A compressed file cannot be entered in the middle, and a remote one not as often as a block is read. Both become plain
copies under a key of their contents; the copies may be deleted whenever no run is being prepared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raymem.cache import publish_entry
from raymem.errors import DataError
from raymem.recipe.data import MAX_EXAMPLE_BYTES
from raymem.recipe.paths import COMPRESSIONS
from raymem.storage.publish import digest
from raymem.storage.retry import retrying
from raymem.training.data.rows.json_text import too_long
from raymem.training.data.sources.digests import content_digest
from raymem.training.data.sources.remote import RemoteDirectory, RemoteFile

FOLDER = "sources"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine's file tree."""

    path: Path

    @property
    def name(self) -> str:
        """The name of the file in messages."""
        return str(self.path)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.path.stat().st_size


SourceFile = LocalFile | RemoteFile


def codec(name: str) -> str | None:
    """Return the codec of a compressed file, by its suffix."""
    return next((codec for suffix, codec in COMPRESSIONS.items() if name.endswith(suffix)), None)


def plain_copy(file: SourceFile, where: str, cache_dir: Path, max_bytes: int = MAX_EXAMPLE_BYTES) -> Path:
    """Return a local file with the plain bytes of ``file``, which may be the file itself.

    Args:
        max_bytes: the largest size of one row.

    Raises:
        DataError: it cannot be fetched, changes meanwhile, is damaged, or unpacks to a longer row; nothing is kept.
        StorageError: the cache cannot be written.
    """
    if isinstance(file, LocalFile) and codec(file.name) is None:
        return file.path
    if isinstance(file, RemoteFile):
        key = ["fetched", file.uri, file.version, file.size]
        write = partial(_fetch, file, where, max_bytes)
    else:
        key = ["unpacked", content_digest(file.path, cache_dir)]
        write = partial(_unpack_local, file, max_bytes)
    name = _plain_name(file.name)
    directory = cache_dir / FOLDER / digest([*key, name.rpartition(".")[2]])
    publish_entry(directory, write)
    return directory / name


def _plain_name(name: str) -> str:
    """Name a copy: ``data.jsonl`` for ``s3://bucket/x.jsonl.gz``."""
    parts = name.rsplit("/", 1)[-1].split(".")
    return f"data.{parts[-1] if codec(name) is None else parts[-2]}"


def _fetch(file: RemoteFile, where: str, max_bytes: int, directory: Path) -> dict[str, Any]:
    remote = RemoteDirectory(file.uri, where)
    raw = directory / ("raw" if codec(file.name) else _plain_name(file.name))

    def fetch() -> int:
        with raw.open("wb") as out:
            return sum(out.write(chunk) for chunk in remote.chunks(_CHUNK_BYTES))

    fetched = retrying(remote.path, remote.retry_for_s, fetch)
    if remote.file() != file or fetched != file.size:
        raise DataError(f"{file.name} changed while it was fetched: run again.")
    if codec(file.name) is not None:
        _unpack(raw, file.name, max_bytes, directory)
        raw.unlink()
    return {"from": file.name, "version": file.version}


def _unpack_local(file: LocalFile, max_bytes: int, directory: Path) -> dict[str, Any]:
    _unpack(file.path, file.name, max_bytes, directory)
    return {"from": file.name}


def _unpack(packed: Path, name: str, max_bytes: int, directory: Path) -> None:
    with (directory / _plain_name(name)).open("wb") as out:
        for chunk in _unpacked(packed, name, max_bytes):
            out.write(chunk)


def _unpacked(packed: Path, name: str, max_bytes: int) -> Iterator[bytes]:
    """Yield the plain bytes of a compressed file.

    Raises:
        DataError: it is damaged or cut off, is no such file at all, or holds a row that is too long: a few kilobytes
            can become as many gigabytes.
    """
    import pyarrow as pa

    end_of_row = b"}" if _plain_name(name).endswith(".json") else b"\n"  # every row has one, and perhaps more
    read_bytes = lines = row_bytes = 0
    try:
        with pa.OSFile(str(packed)) as file, pa.CompressedInputStream(file, codec(name)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                read_bytes += len(chunk)
                end = chunk.rfind(end_of_row)
                row_bytes = row_bytes + len(chunk) if end < 0 else len(chunk) - end - 1
                if row_bytes > max_bytes + _CHUNK_BYTES:
                    raise DataError(f"{name}:{lines + 1}: {too_long(max_bytes)}.")
                lines += chunk.count(b"\n")
                yield chunk
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"{name} cannot be read ({error}): check that this process may read it.") from error
        if read_bytes == 0:
            raise DataError(
                f"{name} is damaged, or no {codec(name)} file ({error}): compress it again, or rename it."
            ) from error
        raise DataError(
            f"{name} is damaged or cut off after line {lines} ({read_bytes} bytes of text could be read; {error}): "
            f"copy or compress it again. Nothing of it was used."
        ) from error

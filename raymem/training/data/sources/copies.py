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

from raymem.errors import DataError
from raymem.recipe.paths import COMPRESSIONS
from raymem.storage.publish import digest, publish
from raymem.storage.retry import retrying
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


def plain_copy(file: SourceFile, where: str, cache_dir: Path) -> Path:
    """Return a local file with the plain bytes of ``file``, which may be the file itself.

    Raises:
        DataError: it cannot be fetched, changes meanwhile, or is damaged; nothing of it is kept.
        StorageError: the cache cannot be written.
    """
    if isinstance(file, LocalFile) and codec(file.name) is None:
        return file.path
    if isinstance(file, RemoteFile):
        key = ["fetched", file.uri, file.version, file.size]
        write = partial(_fetch, file, where)
    else:
        key = ["unpacked", content_digest(file.path, cache_dir)]
        write = partial(_unpack_local, file)
    name = _plain_name(file.name)
    directory = cache_dir / FOLDER / digest([*key, name.rpartition(".")[2]])
    publish(directory, write)
    return directory / name


def _plain_name(name: str) -> str:
    """Name a copy: ``data.jsonl`` for ``s3://bucket/x.jsonl.gz``."""
    parts = name.rsplit("/", 1)[-1].split(".")
    return f"data.{parts[-1] if codec(name) is None else parts[-2]}"


def _fetch(file: RemoteFile, where: str, directory: Path) -> dict[str, Any]:
    remote = RemoteDirectory(file.uri, where)
    raw = directory / ("raw" if codec(file.name) else _plain_name(file.name))

    def fetch() -> int:
        with raw.open("wb") as out:
            return sum(out.write(chunk) for chunk in remote.chunks(_CHUNK_BYTES))

    fetched = retrying(remote.path, remote.retry_for_s, fetch)
    if remote.file() != file or fetched != file.size:
        raise DataError(f"{file.name} changed while it was fetched: run again.")
    if codec(file.name) is not None:
        _unpack(raw, file.name, directory)
        raw.unlink()
    return {"from": file.name, "version": file.version}


def _unpack_local(file: LocalFile, directory: Path) -> dict[str, Any]:
    _unpack(file.path, file.name, directory)
    return {"from": file.name}


def _unpack(packed: Path, name: str, directory: Path) -> None:
    with (directory / _plain_name(name)).open("wb") as out:
        for chunk in _unpacked(packed, name):
            out.write(chunk)


def _unpacked(packed: Path, name: str) -> Iterator[bytes]:
    """Yield the plain bytes of a compressed file.

    Raises:
        DataError: it is damaged or cut off, or is no such file at all.
    """
    import pyarrow as pa

    read_bytes = lines = 0
    try:
        with pa.OSFile(str(packed)) as file, pa.CompressedInputStream(file, codec(name)) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                read_bytes += len(chunk)
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

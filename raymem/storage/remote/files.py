"""Reads files of an object store, or of the Hugging Face hub, as if they lay in a directory of this machine.

:func:`directory_at` gives what is needed of a :class:`pathlib.Path` to read a model tensor by tensor: ``directory /
file``, ``open``, ``stat`` and ``is_file``. On ``s3://`` and ``gs://`` every read is one request for that range of
bytes; :mod:`raymem.storage.remote.copies` copies whole files instead.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from pyarrow import fs as pafs

from raymem.errors import ModelError
from raymem.storage.errors import explain
from raymem.storage.retry import retrying
from raymem.storage.storage import Storage

HUB = "hf://"
Value = TypeVar("Value")


def directory_at(location: str) -> Any:
    """Return a directory by its path, ``s3://`` or ``gs://`` address, or as ``hf://<owner>/<model>@<revision>``.

    Raises:
        StorageError: the address is malformed.
    """
    if location.startswith(HUB):
        name, _, revision = location.removeprefix(HUB).partition("@")
        return HubDirectory(name, revision or None)
    return RemoteDirectory(location) if "://" in location else Path(location)


@dataclass(frozen=True)
class HubDirectory:
    """A model on the hub; a file is downloaded into the cache of huggingface_hub when it is named."""

    name: str
    revision: str | None

    def __truediv__(self, file: str) -> Path:
        """Raise ModelError if the file cannot be had."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                f"model.name: {file} of {self.name!r} cannot be had from the Hugging Face hub on node "
                f"{os.uname().nodename} ({said[0]}); check the network and HF_TOKEN there, or copy the model into the "
                "bucket and set model.name to that address"
            ) from None


@dataclass(frozen=True)
class RemoteDirectory:
    """A directory of an object store."""

    uri: str

    def __truediv__(self, file: str) -> RemotePath:
        return RemotePath(self.uri, file)

    def __str__(self) -> str:
        return self.uri


@dataclass(frozen=True)
class RemotePath:
    """A file in a directory of an object store."""

    uri: str
    name: str

    def __str__(self) -> str:
        return storage_at(self.uri).join(self.name)

    def open(self, mode: str = "rb", buffering: int = 0) -> RemoteFile:
        """Open the file for reading. Raises StorageError."""
        assert mode == "rb"
        return RemoteFile(storage_at(self.uri), self.name)

    def stat(self) -> SimpleNamespace:
        """Return ``st_size``, in bytes. Raises StorageError."""
        return SimpleNamespace(st_size=self._info().size)

    def is_file(self) -> bool:
        """Say whether it is there. Raises StorageError."""
        return bool(self._info().type == pafs.FileType.File)

    def _info(self) -> Any:
        storage = storage_at(self.uri)
        return asked(storage, self.name, lambda path: storage.filesystem.get_file_info(path))


class RemoteFile(io.RawIOBase):
    """A file of an object store; each read is a request for its range, done again while the store is away."""

    def __init__(self, storage: Storage, name: str) -> None:
        super().__init__()
        self._storage, self._name = storage, name
        self._position = 0
        self._file: Any = None
        self._ask(lambda file: None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from here, as far as the file goes; returns the number of bytes. Raises StorageError."""

        def read(file: Any) -> int:
            file.seek(self._position)
            return int(file.readinto(buffer))

        count = self._ask(read)
        self._position += count
        return count

    def _ask(self, operation: Callable[[Any], Value]) -> Value:
        def once(path: str) -> Value:
            try:
                if self._file is None:
                    self._file = self._storage.filesystem.open_input_file(path)
                return operation(self._file)
            except OSError:
                self._file = None
                raise

        return asked(self._storage, self._name, once)


@lru_cache(maxsize=8)
def storage_at(uri: str) -> Storage:
    """Open the root at an address, once per process: it asks for the bucket's region."""
    return Storage.open(uri)


def asked(storage: Storage, name: str, operation: Callable[[str], Value]) -> Value:
    """Return the value of an operation on a file's path in the store, done again while the store is away."""
    path = f"{storage.root}/{name}".rstrip("/")

    def once() -> Value:
        try:
            return operation(path)
        except OSError as error:
            raise explain(error, "read", storage.join(name)) from error

    return retrying(storage.path, storage.retry_for_s, once)

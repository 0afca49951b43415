"""Lists and reads files, in their versions, on object stores and on the Hugging Face hub.

``s3://`` and ``gs://`` go through Arrow, as storage does; ``hf://datasets/...`` through huggingface_hub.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from raymem.errors import DataError, TransientStorageError
from raymem.storage.errors import cause, is_passing
from raymem.storage.retry import RETRY_FOR_S, retried, retrying
from raymem.storage.uris import CURE, secret_in

SCHEMES = ("s3", "gs", "gcs", "hf")
_CHECK = "check the path, and that this process may read it"


@dataclass(frozen=True)
class RemoteFile:
    """A file on an object store or on the hub."""

    uri: str
    """The URI, with the options of the one that the recipe names."""
    size: int
    version: str
    """The version, which differs whenever the contents do: an ETag, a generation, the id of a blob."""

    @property
    def name(self) -> str:
        """The name of the file in messages: the URI without its options."""
        return shown(self.uri)


class RemoteDirectory:
    """A file or a directory that a URI names.

    Args:
        where: where the recipe names it, for errors.

    While an object store is away, everything is tried again for some minutes; the hub's own library does so, too.

    Raises:
        DataError: unknown scheme, secrets in the URI, or it cannot be opened.
        TransientStorageError: here and below: the store does not come back.
    """

    def __init__(self, uri: str, where: str) -> None:
        parts = urlsplit(uri)
        self._uri, self._where = uri, where
        if found := secret_in(uri):
            raise DataError(f"{where}.path: {parts.scheme}:// with {found} would write credentials into logs: {CURE}.")
        if parts.scheme not in SCHEMES:
            raise DataError(
                f"{where}.path={uri!r}: data are not read from {parts.scheme}://: use s3://, gs://, hf://datasets/..., "
                f"or copy them to a path that every node sees."
            )
        if parts.scheme == "hf" and parts.netloc != "datasets":
            raise DataError(f"{where}.path={uri!r}: write hf://datasets/<owner>/<name>, with @<revision> if need be.")
        self._is_hub = parts.scheme == "hf"
        self.path, self.retry_for_s = shown(uri), RETRY_FOR_S
        self._filesystem, self._root = retrying(self.path, self.retry_for_s, self._connected)

    def _connected(self) -> tuple[Any, str]:
        with self._explained():
            if self._is_hub:
                from huggingface_hub import HfFileSystem

                # Not the instance that fsspec keeps: it remembers listings.
                return HfFileSystem(skip_instance_cache=True), unquote(self._uri.removeprefix("hf://")).rstrip("/")
            from raymem.storage.connect import connect  # pyarrow is slow to import

            filesystem, root = connect(self._uri)
            return filesystem, root.rstrip("/")

    @retried
    def is_file(self) -> bool:
        """Say whether the URI names a file; False for a directory.

        Raises:
            DataError: there is nothing, or it cannot be told.
        """
        with self._explained():
            if self._is_hub:
                return bool(self._filesystem.info(self._root)["type"] == "file")
            from pyarrow import fs

            kind = self._filesystem.get_file_info(self._root).type
        if kind == fs.FileType.NotFound:
            raise DataError(f"{self._where}.path={self._uri!r} does not exist: {_CHECK}.")
        return bool(kind == fs.FileType.File)

    @retried
    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """List (name, is a folder) of the entries directly in a folder below the directory."""
        at = f"{self._root}/{folder}" if folder else self._root
        with self._explained():
            if self._is_hub:
                entries = self._filesystem.ls(at, detail=True)
                return [(item["name"].rsplit("/", 1)[-1], item["type"] == "directory") for item in entries]
            from pyarrow import fs

            infos = self._filesystem.get_file_info(fs.FileSelector(at))
            return [(info.base_name, info.type == fs.FileType.Directory) for info in infos]

    @retried
    def file(self, name: str = "") -> RemoteFile:
        """Return a file below the directory, or the file itself, as it is now."""
        at = f"{self._root}/{name}" if name else self._root
        uri = below(self._uri, name)
        with self._explained():
            if self._is_hub:
                facts = self._filesystem.info(at)
                return RemoteFile(uri, int(facts["size"]), str(facts["blob_id"]))
            with self._filesystem.open_input_file(at) as file:
                facts = {key.lower(): value for key, value in file.metadata().items()}
                size = file.size()
            for key in ("etag", "generation"):
                if facts.get(key):
                    return RemoteFile(uri, size, f"{key}={facts[key]!r}")
            return RemoteFile(uri, size, f"mtime={self._filesystem.get_file_info(at).mtime_ns}")

    def chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        """Yield the bytes of the file that the URI names; after a TransientStorageError they begin anew."""
        with self._explained():
            if self._is_hub:
                opened = self._filesystem.open(self._root, block_size=0)  # one stream, not many ranges
            else:  # by itself Arrow would unpack what ends in .gz
                opened = self._filesystem.open_input_stream(self._root, compression=None)
            with opened as stream:
                while chunk := stream.read(chunk_bytes):
                    yield chunk

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # both libraries raise many types
            words, cure = _hub_cause(error) if self._is_hub else cause(error)
            kind = TransientStorageError if not self._is_hub and is_passing(error) else DataError
            raise kind(
                f"{self._where}.path={shown(self._uri)!r} cannot be read ({words}): {cure or _CHECK}."
            ) from error


def below(uri: str, name: str) -> str:
    """Return the URI of something below another; options stay."""
    if not name:
        return uri
    if uri.startswith("hf://"):
        return f"{uri.rstrip('/')}/{quote(name)}"
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def shown(uri: str) -> str:
    """Return a URI without its options."""
    return uri if uri.startswith("hf://") else urlunsplit(urlsplit(uri)._replace(query="", fragment=""))


def _hub_cause(error: Exception) -> tuple[str, str]:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cure = "check owner, name, revision and path, the network, and that the token of `hf auth login` or HF_TOKEN may "
    return lines[0].strip(), f"{cure}read it"

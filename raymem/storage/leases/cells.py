"""Cells: small files of a storage that are written only over what their writer has read.

Arrow's file systems cannot put a condition on a write. obstore sends it to S3 (``If-None-Match``, ``If-Match``) and to
Google's store (``x-goog-if-generation-match``), with the credentials that boto3 and google-auth find.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

from raymem.errors import StorageError
from raymem.storage import connect
from raymem.storage.errors import explain, writing
from raymem.storage.storage import Storage

_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_WITHOUT_CONDITIONS = ("NotImplemented", "501 Not Implemented", "MethodNotAllowed")


LOCKS = ".locks"
"""The directory of a storage in which the cells of runs lie, and their file locks."""


class Changed(Exception):
    """A cell is not as its writer has read it: somebody else has written it since."""


@dataclass(frozen=True)
class Version:
    """What a cell held at some time."""

    data: bytes
    tag: Any = None
    """The store's own name for it."""


class Cell(Protocol):
    """A small file that is written only over what was read. Nothing is tried again for long."""

    place: str
    """Path or URI, for messages."""

    def read(self) -> Version | None:
        """Return what the cell holds; None if there is no such file.

        Raises:
            StorageError: it cannot be read.
        """

    def write(self, data: bytes, over: Version | None) -> Version:
        """Write a cell that still is as it was read, or that is not there.

        Raises:
            Changed: it is another one by now; it stays.
            StorageError: it cannot be written.
        """


class ObjectCell:
    """An object of ``s3://`` or ``gs://``."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.place = storage.join(name)
        bucket, _, prefix = storage.root.partition("/")
        self._key = f"{prefix}/{name}" if prefix else name
        with self._explained("open"):
            self._store = _open(storage, bucket)

    def read(self) -> Version | None:
        import obstore

        with self._explained("read"):
            try:
                got = obstore.get(self._store, self._key)
                return Version(bytes(got.bytes()), {"e_tag": got.meta["e_tag"], "version": got.meta["version"]})
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def write(self, data: bytes, over: Version | None) -> Version:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create"
        if over is not None:
            mode = {name: tag for name, tag in over.tag.items() if tag is not None}
        with self._explained("write"):
            try:
                put = obstore.put(self._store, self._key, data, mode=mode, use_multipart=False)
                return Version(data, {"e_tag": put["e_tag"], "version": put["version"]})
            except (AlreadyExistsError, PreconditionError):
                pass
            except FileNotFoundError as error:
                if over is None or "NoSuchBucket" in str(error):
                    raise
        now = self.read()
        if now is not None and now.data == data:  # the answer to an earlier try was lost
            return now
        raise Changed(self.place)

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except ImportError:
            raise
        except Exception as error:  # obstore, boto3 and google-auth have no base class in common
            words = _words(error)
            if any(word in words for word in _WITHOUT_CONDITIONS):
                raise StorageError(
                    f"storage: cannot {action} {self.place}: the object store knows no conditional writes ({words}), "
                    "by which two drivers of one run are told apart; update it, or use another storage"
                ) from error
            raise explain(OSError(words), action, self.place) from error


class FileCell:
    """A file in a directory, which must be there: below a mount that is gone none is made.

    Between its reading and its writing only a file lock keeps others out, which the caller has.
    """

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self._path = path

    def read(self) -> Version | None:
        try:
            return Version(self._path.read_bytes())
        except OSError as error:
            raise explain(error, "read", self.place) from error

    def write(self, data: bytes, over: Version | None) -> Version:
        if self.read() != over:
            raise Changed(self.place)
        with writing(self._path), self._path.open("r+b") as file:
            file.write(data)
            file.truncate()
        return Version(data)


def run_cell(storage: Storage, name: str) -> Cell:
    """Return the cell of the lease on a run; in a directory it is the file that drivers lock.

    Raises:
        StorageError: the object store cannot be reached.
    """
    return FileCell(Path(storage.join(LOCKS, name))) if storage.is_local else ObjectCell(storage, f"{LOCKS}/{name}")


def _open(storage: Storage, bucket: str) -> Any:
    """Return obstore's client for a storage, with the options of its URI."""
    from obstore.store import GCSStore, S3Store

    parts = urlsplit(storage.path)
    options = dict(parse_qsl(parts.query))
    endpoint = options.get("endpoint_override")
    if endpoint is not None and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    client: Any = {
        "connect_timeout": timedelta(seconds=connect.CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=connect.SILENCE_S),
    }
    retry: Any = {
        "max_retries": connect.TRIES - 1,
        "retry_timeout": timedelta(seconds=connect.TRIES * connect.SILENCE_S),
    }
    anonymous = parts.username == "anonymous"
    if parts.scheme != "s3":
        client["allow_http"] = (endpoint or "").startswith("http://")
        given: dict[str, Any] = {"base_url": endpoint} if endpoint else {}
        if anonymous:
            given["bearer_token"] = "anonymous"  # noqa: S105 - for emulators; without one obstore asks for credentials
        else:
            from obstore.auth.google import GoogleCredentialProvider

            given["credential_provider"] = GoogleCredentialProvider()
        return GCSStore(bucket, client_options=client, retry_config=retry, **given)
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    client["allow_http"] = (endpoint or "").startswith("http://")
    if "tls_ca_file_path" in options:
        client["root_certificate"] = Path(options["tls_ca_file_path"]).read_bytes()
    given = {"endpoint": endpoint} if endpoint else {}
    if anonymous:
        given["skip_signature"] = True
    else:
        from obstore.auth.boto3 import Boto3CredentialProvider

        given["credential_provider"] = Boto3CredentialProvider()
    region = storage.filesystem.region
    return S3Store(bucket, region=region, client_options=client, retry_config=retry, **given)


def _words(error: Exception) -> str:
    """Return what an error of obstore says, on one line: the store's own code and message where there are any."""
    text = str(error).partition("\n\nDebug source")[0]
    code, message = _CODE.search(text), _MESSAGE.search(text)
    head = text.partition(": <?xml")[0]
    return " ".join(f"{head}: {code[1]}: {message[1] if message else ''}".split()) if code else " ".join(text.split())

"""Opens a storage root: a local directory, ``s3://`` or ``gs://``, with the few operations that runs need.

Names given to a :class:`Storage` are ``/``-separated and relative to its root; :meth:`Storage.join` turns one into the
absolute path or URI that another process can open. A directory counts as whole once its *marker* file (by default
``manifest.json``) is there: uploads write the marker last, deletions remove it first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pyarrow import fs as pafs

from raymem.errors import StorageError, TransientStorageError
from raymem.storage import json_files
from raymem.storage.connect import CHUNK_BYTES, connect, copy_file, verify, verify_names
from raymem.storage.errors import explain
from raymem.storage.folders import make_directory
from raymem.storage.leases import held as leases
from raymem.storage.publish import seal, unseal
from raymem.storage.retry import RETRY_FOR_S, check_wanted, retried, retrying
from raymem.storage.unfinished import scratch
from raymem.storage.uris import CURE, secret_in

MARKER = "manifest.json"
_CHANGES = ("write", "delete", "rename")
_DAMAGED = "the file is damaged: delete it, or restore it from a copy"


class Storage:
    """A storage root; pickles as its path. Every operation is tried again while the storage is away; what is still away
    then is a TransientStorageError."""

    def __init__(self, path: str, filesystem: pafs.FileSystem, root: str, retry_for_s: float = RETRY_FOR_S) -> None:
        self.path = path
        """Absolute local path, or the URI as given."""
        self.filesystem = filesystem
        """The file system, for Ray's ``RunConfig(storage_filesystem=)`` and ``torch.distributed.checkpoint``."""
        self.root = root
        """The root's path in ``filesystem``: no scheme, no options."""
        self.retry_for_s = retry_for_s
        """Seconds for which an operation is tried again."""

    @classmethod
    def open(cls, path: str, retry_for_s: float = RETRY_FOR_S) -> Storage:
        """Open a storage root; nothing is created, and local paths are not touched.

        Args:
            retry_for_s: seconds for which operations are tried again while the storage is away; 0 for none.

        Raises:
            StorageError: relative path, unknown scheme, malformed URI, secrets in the URI, unknown bucket region.
        """
        if "://" not in path:
            if not os.path.isabs(path):
                raise StorageError(
                    f"storage.path: {path!r} is relative, which means another place in each worker; "
                    "give an absolute path, s3:// or gs://"
                )
            root = os.path.normpath(path)
            return cls(root, pafs.LocalFileSystem(), root, retry_for_s)
        parts = urlsplit(path)
        if parts.scheme == "file":
            return cls.open(unquote(parts.path), retry_for_s)
        if parts.scheme not in ("s3", "gs", "gcs"):
            raise StorageError(
                f"storage.path: scheme {parts.scheme}:// is not supported; give an absolute path, s3:// or gs://"
            )
        if found := secret_in(path):
            raise StorageError(
                f"storage.path: {parts.scheme}:// with {found} would write credentials into logs and checkpoints; "
                f"{CURE}"
            )
        if not parts.hostname:
            raise StorageError(f"storage.path: {path!r} names no bucket; write {parts.scheme}://bucket/path")
        filesystem, root = retrying(path, retry_for_s, lambda: _connect(path))
        return cls(path, filesystem, root.rstrip("/"), retry_for_s)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Storage.open, (self.path, self.retry_for_s))

    def __repr__(self) -> str:
        return f"Storage({self.path!r})"

    @property
    def is_local(self) -> bool:
        """Whether the root is a path of this machine's file tree (which may still be a network mount)."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def join(self, *names: str) -> str:
        """Return the absolute path or URI of a name below the root; a URI keeps its ``?options``."""
        name = _clean("/".join(names))
        if self.is_local:
            return os.path.join(self.root, name) if name else self.root
        parts = urlsplit(self.path)
        below = f"{parts.path.rstrip('/')}/{quote(name)}" if name else parts.path
        return urlunsplit(parts._replace(path=below))

    def child(self, *names: str) -> Storage:
        """Return the storage whose root is a directory below this one."""
        return Storage(self.join(*names), self.filesystem, self._at("/".join(names)), self.retry_for_s)

    @retried
    def exists(self, name: str) -> bool:
        """Say whether a file or directory is there. Raises StorageError when that cannot be known."""
        with self._explained("look up", name):
            return bool(self.filesystem.get_file_info(self._at(name)).type != pafs.FileType.NotFound)

    @retried
    def list_dirs(self, name: str = "") -> list[str]:
        """List the directories directly below ``name``, sorted; empty if it does not exist."""
        with self._explained("list", name):
            infos = self.filesystem.get_file_info(pafs.FileSelector(self._at(name), allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    @retried
    def sizes(self, name: str) -> dict[str, int]:
        """Map each file directly in a directory to its bytes. Raises StorageError if they cannot be listed."""
        with self._explained("list", name):
            infos = self.filesystem.get_file_info(pafs.FileSelector(self._at(name), allow_not_found=True))
        return {info.base_name: info.size for info in sorted(infos, key=lambda i: i.path) if info.is_file}

    @retried
    def read_bytes(self, name: str) -> bytes:
        """Read a small file whole. Raises StorageError if it is missing or unreadable."""
        with self._explained("read", name), self._opened(name) as stream:
            return bytes(stream.read())

    def _opened(self, name: str) -> Any:
        if self.is_local and not Path(self._at(name)).is_file() and Path(self._at(name)).exists():
            raise OSError("it is no regular file")  # reading a device or a pipe may never end
        return self.filesystem.open_input_stream(self._at(name), None)

    @retried
    def sha256(self, name: str) -> str:
        """Return the hex SHA-256 of a file's bytes. Raises StorageError if it is missing or unreadable."""
        digest = hashlib.sha256()
        with self._explained("read", name), self._opened(name) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    @retried
    def read_json(self, name: str, *, cure: str = _DAMAGED) -> Any:
        """Parse a JSON file. Raises StorageError if it is missing, unreadable or not JSON."""
        with self._explained("read", name), self._opened(name) as stream:
            text = stream.read(json_files.LIMIT_BYTES + 1)
        return json_files.parse(text, self.join(name), StorageError, cure)

    def read_object(
        self, name: str, fields: Mapping[str, tuple[type, ...]] | None = None, *, cure: str | None = None
    ) -> dict[str, Any]:
        """Parse a JSON file that holds an object. Raises StorageError, also if a field is of another type."""
        cure = cure or _DAMAGED
        return json_files.as_object(self.read_json(name, cure=cure), self.join(name), StorageError, cure, fields)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file that is seen either whole or not at all. Raises StorageError."""
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    @retried
    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file that is seen either whole or not at all. Raises StorageError."""
        with self._explained("write", name):
            self._put(name, data)

    def write_record(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON object with the SHA-256 of its values, for :meth:`read_record`. Raises StorageError."""
        self.write_json(name, seal(values))

    def read_record(
        self, name: str, fields: Mapping[str, tuple[type, ...]] | None = None, *, cure: str | None = None
    ) -> dict[str, Any]:
        """Read what :meth:`write_record` wrote. Raises StorageError, also if a value is another than was written."""
        values = unseal(self.read_object(name, fields, cure=cure))
        if values is None:
            raise StorageError(
                f"{self.join(name)} has other values than were written (by its own SHA-256); {cure or _DAMAGED}"
            )
        return values

    def upload_dir(self, local: str | Path, name: str, last: str | None = MARKER) -> dict[str, dict[str, Any]]:
        """Copy a local directory to ``name``, which is replaced; the file ``last`` is written last.

        With ``last=None`` the files are merged into the directory instead (several ranks upload their own shards; one
        of them then writes the marker with :meth:`write_json`). A failed upload is removed again, to give back space.

        Returns file -> ``{bytes, sha256}``, as it was copied.

        Raises:
            StorageError: the copy failed, or the local directory lacks its marker.
        """
        local = Path(local)
        files = sorted(p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file())
        if last is not None:
            if last not in files:
                raise StorageError(f"{local} has no {last}, which marks a complete directory; it was not uploaded")
            files = [f for f in files if f != last] + [last]
            self.delete_dir(name, last)
        copied = {}
        try:
            for file in files:
                copied[file] = self.upload_file(local / file, f"{name}/{file}")
        except StorageError as error:
            if last is not None and not isinstance(error, TransientStorageError):
                with contextlib.suppress(StorageError):
                    self.delete_dir(name, last)
            raise
        if self.is_local and files:
            sync(self._at(name))
        return copied

    @retried
    def upload_file(self, local: Path, name: str) -> dict[str, Any]:
        """Copy a local file to ``name``. Raises StorageError."""
        with self._explained("write", name):
            target = self._at(name)
            self._make_parent(target)
            copied = copy_file(pafs.LocalFileSystem(), str(local), self.filesystem, target)
            if self.is_local:
                sync(target)
            return copied

    def download_dir(self, name: str, local: str | Path, last: str | None = MARKER) -> dict[str, dict[str, Any]]:
        """Copy the directory ``name`` to ``local``, which must not exist yet and appears only when whole.

        If the marker is a JSON object with ``files: {name: {bytes, sha256}}``, each of these is verified. Returns
        file -> ``{bytes, sha256}``, as it was copied.

        Raises:
            StorageError: marker or a listed file missing, wrong size or digest, ``local`` taken, or the copy failed.
        """
        local = Path(local)
        if local.exists() and (not local.is_dir() or any(local.iterdir())):
            raise StorageError(f"{local} already exists; remove it, or download {self.join(name)} to another place")
        if last is not None and not self.exists(f"{name}/{last}"):
            raise StorageError(
                f"{self.join(name)} has no {last}: its upload never finished, or it was deleted; use another one"
            )
        manifest = self.read_json(f"{name}/{last}") if last is not None and last.endswith(".json") else {}
        expected = manifest.get("files", {}) if isinstance(manifest, dict) else {}
        copies = {}
        scratch = local.parent / f".{local.name}.part-{uuid.uuid4().hex[:8]}"
        try:
            files = self._files(name)
            verify_names(self.join(name), expected, files)
            for file in files:
                copies[file] = self.download_file(f"{name}/{file}", scratch / file)
                verify(self.join(name, file), expected.get(file), copies[file])
            with self._explained("download", name):
                scratch.mkdir(parents=True, exist_ok=True)
                os.rename(scratch, local)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return copies

    @retried
    def _files(self, name: str) -> list[str]:
        """List the files in and below a directory, relative to it."""
        base = self._at(name)
        with self._explained("list", name):
            infos = self.filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
        return sorted(info.path[len(base) :].strip("/") for info in infos if info.is_file)

    @retried
    def download_file(self, name: str, local: Path) -> dict[str, Any]:
        """Copy the file ``name`` to a local one. Raises StorageError."""
        with self._explained("download", name):
            local.parent.mkdir(parents=True, exist_ok=True)
            return copy_file(self.filesystem, self._at(name), pafs.LocalFileSystem(), str(local))

    @retried
    def delete_file(self, name: str) -> None:
        """Delete a file; absent is fine. Raises StorageError."""
        with self._explained("delete", name), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self._at(name))

    @retried
    def delete_dir(self, name: str, last: str | None = MARKER) -> None:
        """Delete a directory, marker first, so that an interrupted deletion never looks whole; absent is fine."""
        assert _clean(name), "the storage root itself is never deleted"
        with self._explained("delete", name):
            for path, delete in ((f"{name}/{last}", "delete_file"), (name, "delete_dir")):
                if last is None and delete == "delete_file":
                    continue
                with contextlib.suppress(FileNotFoundError):
                    getattr(self.filesystem, delete)(self._at(path))

    def rename_dir(self, name: str, new: str) -> None:
        """Give a directory another name, which must be free; an object store copies its files, as it cannot rename.

        Raises:
            StorageError: the system refuses. The old name may be gone only when the new one is whole.
        """
        if self.is_local:
            self._rename(name, new)
            return
        for file in self._files(name):
            self._copy_within(f"{name}/{file}", f"{new}/{file}")
        self.delete_dir(name)

    @retried
    def _rename(self, name: str, new: str) -> None:
        with self._explained("rename", name):
            os.rename(self._at(name), self._at(new))

    @retried
    def _copy_within(self, name: str, new: str) -> None:
        with self._explained("rename", name):
            copy_file(self.filesystem, self._at(name), self.filesystem, self._at(new))

    @retried
    def check_writable(self) -> None:
        """Write, read back and delete a probe file, creating a local root that is missing.

        Raises:
            StorageError: names the path, the system's words and the cure.
        """
        data = uuid.uuid4().bytes
        action = "create" if self.is_local and not os.path.isdir(self.root) else "write to"
        try:
            with scratch(self, "probe") as folder:
                self._put(f"{folder}/probe", data)
                with self.filesystem.open_input_stream(self._at(f"{folder}/probe")) as stream:
                    back = stream.read()
        except OSError as error:
            raise explain(error, action, self.path) from error
        if back != data:
            raise StorageError(f"storage: {self.path} gave back other bytes than were written; check its mount")

    def _at(self, name: str) -> str:
        name = _clean(name)
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def _make_parent(self, target: str) -> None:
        # Object stores have no directories; creating some would only leave empty marker objects behind.
        if self.is_local:
            make_directory(Path(target).parent)

    def _put(self, name: str, data: bytes) -> None:
        target = self._at(name)
        self._make_parent(target)
        if not self.is_local:  # one put of an object is atomic
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(data)
            return
        scratch = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex[:8]}"
        try:
            with open(scratch, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
        sync(os.path.dirname(target))

    @contextlib.contextmanager
    def _explained(self, action: str, name: str) -> Iterator[None]:
        if action in _CHANGES:
            check_wanted()
            leases.check(self._at(name))
        try:
            yield
        except OSError as error:
            raise explain(error, action, self.join(name)) from error


def _connect(path: str) -> tuple[pafs.FileSystem, str]:
    try:
        return connect(path)
    except Exception as error:  # Arrow raises its own, ValueError and OSError here
        raise explain(error, "open", path) from error


def _clean(name: str) -> str:
    path = PurePosixPath(name)
    assert not path.is_absolute() and ".." not in path.parts, f"{name!r} leaves the storage root"
    return "" if str(path) == "." else str(path)


def sync(path: str | Path) -> None:
    """Flush a file or directory to disk: the marker must not survive a power cut that its files do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

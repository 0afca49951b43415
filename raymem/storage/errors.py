"""Explains storage operations that fail, in one sentence with the cure, also those inside of other people's code."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from raymem.errors import RaymemError, StorageError, TransientStorageError
from raymem.memory.budget import bytes_text

_PERMISSION = "give this user write permission there, or set {key} to a directory that it owns"
_CREDENTIALS = (
    "check that the credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "GOOGLE_APPLICATION_CREDENTIALS) or the role of the machine may read and write this bucket"
)
_SPACE = "free some, or set {key} to a larger disk"
_NOT_A_DIRECTORY = "a part of the path is a file: remove it, or set {key} to another directory"
_MISSING = "it does not exist: check the path, or create it"
_DISK = "check the disk or the mount (`dmesg` may say more)"

_BY_ERRNO = {
    errno.EACCES: ("permission denied", _PERMISSION),
    errno.EPERM: ("permission denied", _PERMISSION),
    errno.EROFS: ("read-only file system", "mount it read-write, or set {key} to a writable directory"),
    errno.ENOSPC: ("no space left on the device", _SPACE),
    errno.EDQUOT: ("no space left in this user's quota", _SPACE),
    errno.ENOENT: ("no such file or directory", _MISSING),
    errno.ENOTDIR: ("not a directory", _NOT_A_DIRECTORY),
    errno.EEXIST: ("not a directory", _NOT_A_DIRECTORY),
    errno.EIO: ("input/output error", _DISK),
    errno.ESTALE: ("the file is gone on the server of this mount", _DISK),
    errno.ENOTCONN: ("the mount has lost its server", _DISK),
    errno.EHOSTDOWN: ("the mount has lost its server", _DISK),
}

# What the servers of network mounts and networks themselves cause, and mend.
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ENOTCONN,
}  # fmt: skip

_NETWORK = (
    "check the network and the endpoint (s3://bucket/path?endpoint_override=host:port&scheme=http for one that is not "
    "AWS)"
)
_BUSY = "the object store is overloaded or broken: ask those who run it"

# Object stores tell the cause in words only; the first match counts.
_BY_WORDS = (
    (("NO_SUCH_BUCKET", "Bucket '", "NoSuchBucket", "bucket does not exist"), "create the bucket, or correct its name"),
    (
        ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "InvalidAccessKeyId", "HTTP status 403"),
        _CREDENTIALS,
    ),
    (("HTTP status 401", "credential", "UNAUTHENTICATED", "PERMISSION_DENIED"), _CREDENTIALS),
    (("403 Forbidden", "401 Unauthorized"), _CREDENTIALS),
    (("curlCode: 60", "curlCode: 77"), "check the certificates of this machine and of the endpoint"),
    (("NETWORK_CONNECTION", "curlCode", "CURL error", "Could not connect", "HTTP error: "), _NETWORK),
    (("SLOW_DOWN", "THROTTLING", "RESOURCE_EXHAUSTED", "HTTP status 429"), _BUSY),
    (("INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "REQUEST_TIMEOUT", "DEADLINE_EXCEEDED", "UNAVAILABLE"), _BUSY),
    (("408 Request Timeout", "429 Too Many", "500 Internal", "502 Bad", "503 Service", "504 Gateway"), _BUSY),
    (("HTTP status 408", "HTTP status 500", "HTTP status 502", "HTTP status 503", "HTTP status 504"), _BUSY),
    (("Cannot parse URI",), "write spaces and other special characters as %20 and so on"),
    (("query parameter",), "use only options that pyarrow knows, such as endpoint_override, scheme and region"),
)

# Libraries in other languages tell the system's error in words, or by number within their words.
_NUMBERED = re.compile(r"\[?(?:[Ee]rrno|os error) (\d+)\b")
_IN_WORDS = (
    ("database or disk is full", errno.ENOSPC),
    ("attempt to write a readonly database", errno.EACCES),
    ("unable to open database file", errno.EACCES),
    *((os.strerror(code), code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)),
)
_FULL_BYTES = 64 << 20
_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_SYSTEM = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTCONN,
    errno.EHOSTDOWN,
}  # fmt: skip


def explain(
    error: Exception,
    action: str,
    path: str,
    *,
    where: str = "storage",
    cure: str | None = None,
    then: str | None = None,
) -> StorageError:
    """Return a StorageError for a failure of ``action`` (an infinitive) at ``path``.

    What may pass by itself (a network, an overloaded store, a mount whose server is away) is a TransientStorageError.

    Args:
        where: the option or part of the recipe that names the place.
        cure: what helps; by default what helps against the system's refusal.
        then: what is to be done after that.
    """
    kind = TransientStorageError if is_passing(error) else StorageError
    code = (error.errno if isinstance(error, OSError) else None) or system_error(error)
    key = "storage.path" if where == "storage" else where
    if code in _BY_ERRNO:
        words, known = _BY_ERRNO[code]
        words, known = f"{words}{_facts(code, path)}", known.format(key=key)
    else:
        words, of_store = cause(error)
        known = of_store or (_DISK if is_passing(error) else f"set {key} to a place that works")
    return kind(f"{where}: cannot {action} {path}: {words}; {cure or known}{f', then {then}' if then else ''}")


def is_passing(error: Exception) -> bool:
    """Say whether the cause of an error may go away by itself."""
    code = (error.errno if isinstance(error, OSError) else None) or system_error(error)
    return code in _PASSING or cause(error)[1] in (_NETWORK, _BUSY)


@contextlib.contextmanager
def writing(
    path: object, *, where: str = "storage", cure: str | None = None, then: str | None = None
) -> Iterator[None]:
    """Turn what the system refuses in the block into a StorageError, whoever's code met it.

    tokenizers, safetensors, sqlite and others have exceptions of their own for a full disk. What is not the system's
    refusal passes through.

    Args:
        path: what is written.
        where, cure, then: see :func:`explain`.
    """
    try:
        yield
    except RaymemError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and system_error(error) is None:
            raise
        raise explain(error, "write", str(path), where=where, cure=cure, then=then) from error


def refusal(error: Exception) -> StorageError | None:
    """Return the sentence for an error of other people's code that the system caused by refusing; else None.

    This is for what no :func:`writing` expected. Such code often does not say what it wrote; then the fullest disk of
    those that libraries write to without being told is named.
    """
    code = system_error(error)
    if code is None:
        return None
    named = next((one.filename for one in _chain(error) if isinstance(one, OSError) and one.filename), None)
    if named is None and code in _OF_SPACE:
        fullest = min(_unasked(), key=lambda place: shutil.disk_usage(place).free)
        named = fullest if shutil.disk_usage(fullest).free < _FULL_BYTES else None
    words, known = _BY_ERRNO[code]
    place = "a file" if named is None else os.fsdecode(named)
    return StorageError(f"{place}: {words}{_facts(code, place)}; {known.format(key='storage.path, TMPDIR or HF_HOME')}")


def system_error(error: BaseException | None) -> int | None:
    """Return the number of the system's refusal (space, permission, a broken disk) that caused an error, or None."""
    for one in _chain(error):
        if isinstance(one, RaymemError):
            return None
        if isinstance(one, OSError) and one.errno in _OF_THE_SYSTEM:
            return one.errno
        text = str(one)
        if (numbered := _NUMBERED.search(text)) and int(numbered[1]) in _OF_THE_SYSTEM:
            return int(numbered[1])
        if (code := next((code for words, code in _IN_WORDS if words in text), None)) is not None:
            return code
    return None


def cause(error: Exception) -> tuple[str, str | None]:
    """Return the words of an object store's error on one line, and the cure if it is known."""
    text = " ".join(str(error).split())
    return text, next((cure for words, cure in _BY_WORDS if any(word in text for word in words)), None)


def user_name(uid: int) -> str:
    """Return the name of a user, or the number of one that this machine does not know."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _unasked() -> list[str]:
    """Return the directories that libraries write to by themselves, as far as they are there."""
    home = os.path.expanduser("~")
    places = [tempfile.gettempdir(), os.environ.get("HF_HOME") or os.path.join(home, ".cache"), home, os.getcwd()]
    return [place for place in places if os.path.isdir(place)] or [os.sep]


def _facts(code: int, path: str) -> str:
    """Return in brackets what a person asks next: whose directory it is, or how much room there is."""
    if not os.path.isabs(path):
        return ""
    with contextlib.suppress(OSError):
        there = _nearest(Path(path))
        if code in (errno.EACCES, errno.EPERM):
            status = there.stat()
            return (
                f" ({there} belongs to {user_name(status.st_uid)}, mode {stat.filemode(status.st_mode)}; this user is "
                f"{user_name(os.geteuid())})"
            )
        if code in _OF_SPACE:
            return f" ({bytes_text(shutil.disk_usage(there).free)} free)"
    return ""


def _nearest(path: Path) -> Path:
    """Return the first of a path and those above it that is there and that this user may not write, or is there."""
    there = [one for one in (path, *path.parents) if _is_there(one)]
    effective = os.access in os.supports_effective_ids
    return next((one for one in there if not os.access(one, os.W_OK, effective_ids=effective)), there[0])


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True

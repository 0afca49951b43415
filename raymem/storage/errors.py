"""Explains storage operations that fail, in one sentence with the cure."""

from __future__ import annotations

import errno

from raymem.errors import StorageError, TransientStorageError

_PERMISSION = "give this user write permission there, or set storage.path to a directory that it owns"
_CREDENTIALS = (
    "check that the credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "GOOGLE_APPLICATION_CREDENTIALS) or the role of the machine may read and write this bucket"
)
_SPACE = "free some, or set storage.path to a larger disk"
_NOT_A_DIRECTORY = "a part of the path is a file: remove it, or set storage.path to another directory"
_MISSING = "it does not exist: check the path, or create it"

_BY_ERRNO = {
    errno.EACCES: ("permission denied", _PERMISSION),
    errno.EPERM: ("permission denied", _PERMISSION),
    errno.EROFS: ("read-only file system", "mount it read-write, or set storage.path to a writable directory"),
    errno.ENOSPC: ("no space left on the device", _SPACE),
    errno.EDQUOT: ("no space left in this user's quota", _SPACE),
    errno.ENOENT: ("no such file or directory", _MISSING),
    errno.ENOTDIR: ("not a directory", _NOT_A_DIRECTORY),
    errno.EEXIST: ("not a directory", _NOT_A_DIRECTORY),
}

# What the servers of network mounts and networks themselves cause, and mend.
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ENOTCONN,
}  # fmt: skip
_MOUNT = "check the mount, and the server or disk behind it"

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
    (("curlCode: 60", "curlCode: 77"), "check the certificates of this machine and of the endpoint"),
    (("NETWORK_CONNECTION", "curlCode", "CURL error", "Could not connect"), _NETWORK),
    (("SLOW_DOWN", "THROTTLING", "RESOURCE_EXHAUSTED", "HTTP status 429"), _BUSY),
    (("INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "REQUEST_TIMEOUT", "DEADLINE_EXCEEDED", "UNAVAILABLE"), _BUSY),
    (("HTTP status 408", "HTTP status 500", "HTTP status 502", "HTTP status 503", "HTTP status 504"), _BUSY),
    (("Cannot parse URI",), "write spaces and other special characters as %20 and so on"),
    (("query parameter",), "use only options that pyarrow knows, such as endpoint_override, scheme and region"),
)


def explain(error: Exception, action: str, path: str) -> StorageError:
    """Return a StorageError for a failure of ``action`` (an infinitive) at ``path``.

    What may pass by itself (a network, an overloaded store, a mount whose server is away) is a TransientStorageError.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code in _BY_ERRNO:
        words, cure = _BY_ERRNO[code]
        return StorageError(f"storage: cannot {action} {path}: {words}; {cure}")
    text, known = cause(error)
    if is_passing(error):
        return TransientStorageError(f"storage: cannot {action} {path}: {text}; {known or _MOUNT}")
    return StorageError(f"storage: cannot {action} {path}: {text}; {known or 'set storage.path to a place that works'}")


def is_passing(error: Exception) -> bool:
    """Whether the cause of an error may go away by itself."""
    return getattr(error, "errno", None) in _PASSING or cause(error)[1] in (_NETWORK, _BUSY)


def cause(error: Exception) -> tuple[str, str | None]:
    """Return the words of an object store's error on one line, and the cure if it is known."""
    text = " ".join(str(error).split())
    return text, next((cure for words, cure in _BY_WORDS if any(word in text for word in words)), None)

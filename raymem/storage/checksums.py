"""Checksums of the files that leave raymem: ``raymem.sha256`` beside them, in the form of ``sha256sum``.

A directory of an adapter, a model or a pruned model is read by many tools, and all of them load it with a bit that has
flipped. So every file that raymem writes there is listed with its SHA-256, and is compared with it before raymem uses
the directory; ``sha256sum -c raymem.sha256`` does the same. Files that are not listed are somebody else's, and a
directory without the list is taken as it is: whoever changes a file on purpose deletes the list.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path

from raymem.errors import RaymemError, StorageError
from raymem.storage.inside import is_inside
from raymem.storage.permissions import by_umask
from raymem.storage.publish import compared_sha256, file_sha256
from raymem.storage.safetensors_io import atomic_file

CHECKSUMS = "raymem.sha256"
_LINE = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<name>[^\0\n]+)")
_WEIGHTS = ".safetensors"
_SHOWN = 12
_LIMIT_BYTES = 16 << 20


def write_checksums(directory: Path, known: Mapping[str, str] | None = None, *, elsewhere: bool = False) -> None:
    """List every file below a directory; descriptions for people (``*.md``) may change and are left out.

    It is the last thing that is written into a directory that leaves raymem, so the files also get the rights that the
    umask gives (:func:`raymem.storage.permissions.by_umask`), whichever library wrote them.

    Args:
        known: digests that the writers of files have computed; other files are read.
        elsewhere: list what is known whether it is here or not: it lies beside the list on an object store.

    Raises:
        OSError: a file cannot be read.
        StorageError: the list cannot be written.
    """
    by_umask(directory)
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    names = sorted(name for name in files if name != CHECKSUMS and not name.endswith(".md"))
    digests = {name: (known or {}).get(name) or file_sha256(files[name]) for name in names}
    _write(directory, {**(known or {}), **digests} if elsewhere else digests)


def add_checksum(directory: Path, name: str) -> None:
    """List a file that was written into a directory afterwards, if that has a list.

    Raises:
        OSError: see :func:`write_checksums`.
        StorageError: the list is damaged, or cannot be written.
    """
    try:
        listed = _read(directory)
    except ValueError as problem:
        raise StorageError(f"{directory / CHECKSUMS} is damaged ({problem}); take a whole copy or delete it") from None
    if listed is not None:
        _write(directory, {**listed, name: file_sha256(directory / name)})


def check_files(directory: str | Path, error: type[RaymemError], *, weights: bool = True) -> None:
    """Compare the files of a local directory with its list, each once per process; without one all is well.

    Args:
        error: what is raised.
        weights: also read the files of weights, which takes about a second for each GB.

    Raises:
        RaymemError: of the type ``error``; names the file and both digests.
    """
    if (what := difference(directory, weights=weights)) is not None:
        raise error(
            f"{Path(directory) / what}: delete {directory} and run what made it again, or take a whole copy; if the "
            f"change is wanted, delete {Path(directory) / CHECKSUMS}"
        )


def difference(directory: str | Path, *, weights: bool = True) -> str | None:
    """Say which file of a local directory differs from its list, and how; None if none does."""
    directory = Path(directory)
    try:
        listed = _read(directory)
    except ValueError as problem:
        return f"{CHECKSUMS} is not as raymem wrote it ({problem})"
    for name, expected in (listed or {}).items():
        if not weights and name.endswith(_WEIGHTS):
            continue
        path = directory / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return f"{name} is listed in {CHECKSUMS} but is no file"
            actual = compared_sha256(path, expected)
        except OSError as problem:
            return f"{name} is listed in {CHECKSUMS} but cannot be read ({problem.strerror})"
        if actual != expected:
            return (
                f"{name} is not as raymem wrote it (SHA-256 {actual[:_SHOWN]}..., {CHECKSUMS} says "
                f"{expected[:_SHOWN]}...)"
            )
    return None


def _read(directory: Path) -> dict[str, str] | None:
    """Map names to digests; None without a list. Raises ValueError if it is none of raymem's."""
    try:
        with (directory / CHECKSUMS).open("rb") as file:
            raw = file.read(_LIMIT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        raise ValueError(problem.strerror) from None
    if len(raw) > _LIMIT_BYTES or not raw.endswith(b"\n"):
        raise ValueError("it is cut short or too long")
    listed: dict[str, str] = {}
    for number, line in enumerate(raw.decode(errors="replace")[:-1].split("\n"), start=1):
        match = _LINE.fullmatch(line)
        if match is None or not is_inside(match["name"]):
            raise ValueError(f"line {number} is no digest and name of a file of the directory")
        if match["name"] in listed:
            raise ValueError(f"line {number} names a file a second time")
        listed[match["name"]] = match["sha256"]
    return listed


def _write(directory: Path, digests: Mapping[str, str]) -> None:
    with atomic_file(directory / CHECKSUMS) as stream:
        stream.write("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode())

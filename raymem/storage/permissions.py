"""Lets several users work on one storage.

A directory that its group or everybody may write (2775 of a team, 1777 as /tmp is) is shared by them. What raymem makes
in such a storage for all runs alike (locks, prepared data, pruned models, the tracking database) takes over the group
and the rights of those who may write there, whatever the umask of who comes first. Runs, sweeps and other results are
their user's: for them the umask counts. In a directory of one user nothing is changed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from pathlib import Path
from typing import IO

_CLASSES = ((0o070, stat.S_IWGRP), (0o007, stat.S_IWOTH))
_OF_DIRECTORIES = stat.S_ISVTX | stat.S_ISGID


def share(path: Path, like: Path | None = None, *, writable: bool = False) -> None:
    """Give what this user made the group of a directory, and the rights of those who may write in that directory.

    Args:
        like: the directory; by default the one that ``path`` lies in.
        writable: also the right to change it: a directory that others add to, or a file that others write. Otherwise
            they may read it.
    """
    with contextlib.suppress(OSError):  # a file system that knows no owners
        above, own = (like or path.parent).stat(), path.lstat()
        if own.st_uid != os.geteuid() or stat.S_ISLNK(own.st_mode):
            return
        rights = sum(above.st_mode & bits for bits, write in _CLASSES if above.st_mode & write)
        if not rights:
            return
        if own.st_gid != above.st_gid:
            try:
                os.chown(path, -1, above.st_gid)
            except OSError:  # not a member of it: what that group may is not for this user's own group
                rights &= 0o007
        rights &= 0o777 if writable else 0o555
        if not stat.S_ISDIR(own.st_mode):
            rights &= 0o666
        elif writable:
            rights |= above.st_mode & _OF_DIRECTORIES
        path.chmod(stat.S_IMODE(path.lstat().st_mode) | rights)


def share_contents(path: Path) -> None:
    """Let those who may write beside a file or directory read it, and all that is in it."""
    for one in (path, *path.rglob("*")):
        share(one, path.parent)


def by_umask(directory: Path) -> None:
    """Give every file below a directory at least the rights that a file gets which this process opens there.

    Libraries write weights for their owner alone (safetensors into a temporary file of mode 0600, then renamed), so
    that a server that runs as another user could not read them. Files of other users stay as they are.

    Raises:
        OSError: no file can be made in the directory.
    """
    probe = directory / f".mode-{uuid.uuid4().hex}"  # tells the umask, which no thread-safe call does, and default ACLs
    try:
        probe.touch()
        rights = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for path in directory.rglob("*"):
        own = path.lstat()
        if stat.S_ISREG(own.st_mode) and own.st_uid == os.geteuid() and rights & ~own.st_mode:
            path.chmod(stat.S_IMODE(own.st_mode) | rights)


def make_file(path: Path, text: str = "", *, writable: bool = False) -> None:
    """Make a shared file that has content and rights when it appears; one that is there already stays.

    Args:
        writable: see :func:`share`.

    Raises:
        OSError: the system refuses.
    """
    scratch = path.parent / f".making-{uuid.uuid4().hex}"
    try:
        scratch.write_text(text)
        share(scratch, writable=writable)
        try:
            os.link(scratch, path)  # never replaces
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def open_lock(path: Path) -> IO[str]:
    """Open a file to be locked by whoever shares its directory; it is made if it is missing.

    Raises:
        OSError: the system refuses.
    """
    # Never with O_CREAT where it exists: in a sticky directory the kernel may refuse that for another user's file.
    while True:
        with contextlib.suppress(FileNotFoundError):
            try:
                return path.open("r+")
            except PermissionError:  # from before the directory was shared; to lock it on a local disk, reading will do
                return path.open("r")
        make_file(path, writable=True)

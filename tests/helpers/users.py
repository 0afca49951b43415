"""Commands of other users than the one who runs the tests, who has to be root for that."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.commands import run_command
from tests.helpers.small_disk import NEW_MOUNTS

MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18  # of mount(2)
TEAM = 65100
"""A group that users may be in."""


@dataclass(frozen=True)
class User:
    """A person without a name, who is in a group of their own."""

    uid: int
    umask: int
    home: Path
    groups: tuple[int, ...] = (TEAM,)


def run_as(user: User, commands: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]] | None:
    """Run ``raymem`` commands one after the other in this process, which is the user's from then on.

    Returns:
        What each one left, or None where this process may not act as another user.
    """
    with contextlib.suppress(PermissionError):
        open_way(Path(sys.base_prefix))
        become(user)
        return [run_command(*command) for command in commands]
    return None


def become(user: User) -> None:
    """Turn this process into one of the user's. Raises PermissionError."""
    user.home.mkdir(exist_ok=True)
    os.chown(user.home, user.uid, user.uid)
    os.environ.update(HOME=str(user.home), USER=f"user-{user.uid}", LOGNAME=f"user-{user.uid}")
    os.environ["RAYMEM_CACHE"] = str(user.home / "cache")
    os.setgroups(user.groups)
    os.setgid(user.uid)
    os.setuid(user.uid)
    os.umask(user.umask)
    # A process that changed its user may not be looked at, not even by itself, until it says so.
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE


def open_way(place: Path) -> None:
    """Let other users reach a directory below one that is root's alone, for this process and its children.

    The interpreter may lie in root's home; nothing outside of this process changes.
    """
    closed = next((folder for folder in reversed(place.parents) if not folder.stat().st_mode & 0o001), None)
    if closed is None:
        return
    system = ctypes.CDLL(None)

    def mount(source: bytes, target: Path, kind: bytes, flags: int, options: bytes | None = None) -> None:
        if system.mount(source, str(target).encode(), kind, ctypes.c_ulong(flags), options):
            raise PermissionError("mount is refused here")

    if system.unshare(NEW_MOUNTS):
        raise PermissionError("unshare is refused here")
    mount(b"none", Path("/"), b"none", MS_PRIVATE | MS_REC)
    inside = f"/proc/self/fd/{os.open(place, os.O_PATH)}".encode()
    mount(b"tmpfs", closed, b"tmpfs", 0, b"mode=755")
    place.mkdir(parents=True)
    mount(inside, place, b"none", MS_BIND | MS_REC)

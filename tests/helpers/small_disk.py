"""A file system with little room, seen by one process alone."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # of unshare(2)


def mount_small_disk(folder: Path, size: str) -> bool:
    """Mount an empty one for this process, which has one thread; False where the system lets nobody do that."""
    uid, gid = os.geteuid(), os.getegid()
    if ctypes.CDLL(None).unshare(NEW_MOUNTS | (NEW_USER if uid else 0)):
        return False
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path("/proc/self", name).write_text(text)
    mounts = (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)])
    return all(subprocess.run(["mount", *mount], check=False).returncode == 0 for mount in mounts)

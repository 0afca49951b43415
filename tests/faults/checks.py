"""What a round must not leave: processes, placement groups, locks that block, temporary files, checkpoints too many."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pyarrow import fs

from raymem.storage.storage import Storage
from tests.faults.sessions import MARK

if TYPE_CHECKING:
    from tests.faults.rounds import Round

TEMPORARY = re.compile(
    r"(^|/)(\.raymem-probe-|\.raymem-check-|\.writing-|\.step_\d+\.part|\..*\.part-[0-9a-f]+|\..*\.tmp$|\..*\.[0-9a-f]{8}$|.*\.incomplete$)"
)
"""Names that raymem gives to what is not finished."""
STAYS = "raymem-cache-"
"""Beginning of the name of what is kept in the temporary directory for other runs."""
PATIENCE_S = 20.0


def left_behind(round_: Round) -> list[str]:
    """Say in words what is there that should not be."""
    found = _wait_until_none(lambda: [f"process {p.pid}: {' '.join(_words(p))[:80]}" for p in processes_of(round_)])
    cluster = round_.arena.cluster
    if round_.case.workers and cluster is not None:
        found += _wait_until_none(cluster.leftovers)
        found += [name for name in temporary_in(cluster.temporary) if "raymem" in name and name not in round_.before]
    if not round_.case.remote:
        found += _locked(Path(round_.storage))
    found += [f"temporary file {name}" for name in names_in(round_.storage) if TEMPORARY.search(name)]
    found += temporary_in(round_.folder / "tmp")
    kept = [name for name in round_.run.list_dirs("checkpoints") if re.fullmatch(r"step_000000[01]\d", name)]
    if len(kept) > 3:
        found.append(f"{len(kept)} checkpoints are kept: {kept}")
    return found


def processes_of(round_: Round) -> list[psutil.Process]:
    """Living processes of the round's sessions: of their Unix sessions, or that carry the round's mark."""
    groups = {session.pid for session in round_.sessions}
    mark = f"{MARK}={round_.folder}".encode()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            marked = mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if marked or os.getsid(process.pid) in groups:
                found.append(process)
    return found


def names_in(storage: str) -> list[str]:
    """Names of all files and directories in a storage, relative to its root."""
    opened = Storage.open(storage)
    infos = opened.filesystem.get_file_info(fs.FileSelector(opened.root, recursive=True, allow_not_found=True))
    return sorted(info.path[len(opened.root) :].lstrip("/") for info in infos)


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _wait_until_none(look: Callable[[], list[str]]) -> list[str]:
    deadline = time.monotonic() + PATIENCE_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _locked(storage: Path) -> list[str]:
    found = []
    for lock in (storage / ".locks").glob("*"):
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                found.append(f"lock {lock.name} is held")
    return found


def temporary_in(folder: Path) -> list[str]:
    """What a temporary directory holds that is not kept for other runs, in words."""
    if not folder.exists():
        return []
    return [
        f"left in TMPDIR: {entry.name}"
        for entry in folder.iterdir()
        if not entry.name.startswith(STAYS) and entry.name != "ray"
    ]

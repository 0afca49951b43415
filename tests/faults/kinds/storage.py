"""Faults of the storage as a place: full, read-only, gone, slow."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.cases import NAME, Case
from tests.faults.fault import Fault
from tests.faults.sessions import Moment, Session

if TYPE_CHECKING:
    from tests.faults.arena import Arena
    from tests.faults.rounds import Round

FIRST_USES = 30
"""Uses of files in which a session makes itself known to a storage, and a few more."""


class _OnMount(Fault):
    """A fault of a storage that is mounted."""

    def applies(self, case: Case, arena: Arena) -> bool:
        return arena.can_mount and not case.remote


class DiskFull(_OnMount):
    """The disk has no room left; when the command has stopped, room is made."""

    name = "disk full"

    def prepare(self, round_: Round) -> None:
        _mount("-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", round_.storage)

    def inject(self, round_: Round, session: Session) -> None:
        room = self.draw.choice((0, 0, self.draw.randrange(200_000)))
        statistics = os.statvfs(round_.storage)
        used = max(0, statistics.f_bavail * statistics.f_frsize - room)
        descriptor = os.open(self._filler(round_), os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(descriptor, 0, used)
        os.close(descriptor)
        round_.detail = f"{room} bytes free"

    def heal(self, round_: Round, session: Session) -> None:
        self._filler(round_).unlink(missing_ok=True)

    def _filler(self, round_: Round) -> Path:
        return Path(round_.storage) / "filler"


class TemporaryFull(Fault):
    """The node's temporary directory has no room left."""

    name = "temporary directory full"

    def applies(self, case: Case, arena: Arena) -> bool:
        return arena.can_mount and case.workers == 0

    def prepare(self, round_: Round) -> None:
        _mount("-t", "tmpfs", "-o", "size=16m,mode=777", "tmpfs", str(round_.folder / "tmp"))

    def inject(self, round_: Round, session: Session) -> None:
        statistics = os.statvfs(round_.folder / "tmp")
        descriptor = os.open(round_.folder / "tmp" / "ray-filler", os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(descriptor, 0, statistics.f_bavail * statistics.f_frsize)
        os.close(descriptor)

    def heal(self, round_: Round, session: Session) -> None:
        (round_.folder / "tmp" / "ray-filler").unlink(missing_ok=True)


class ReadOnly(_OnMount):
    """The run's directory can only be read, for some seconds or until the command stops."""

    name = "storage read-only"

    def inject(self, round_: Round, session: Session) -> None:
        run = os.path.join(round_.storage, NAME)
        if self.draw.random() < 0.3 or not os.path.isdir(run):
            run = round_.storage
        self._mounted = run
        _mount("--bind", run, run)
        _mount("-o", "remount,bind,ro", run)
        round_.detail = os.path.basename(run)

    def heal(self, round_: Round, session: Session) -> None:
        if hasattr(self, "_mounted"):
            subprocess.run(["umount", "-l", self._mounted], check=False)
            del self._mounted


class Vanished(_OnMount):
    """The storage is unmounted, and mounted again when the command has stopped."""

    name = "storage vanished"

    def moment(self, case: Case, file_uses: int) -> Moment:
        """Not before the storage has its identity: a run cannot miss what it has not seen."""
        drawn = super().moment(case, file_uses)
        return Moment("step", 1) if drawn.kind == "file" and drawn.number < FIRST_USES else drawn

    def prepare(self, round_: Round) -> None:
        self._disk = round_.folder / "disk"
        self._disk.mkdir()
        _mount("--bind", str(self._disk), round_.storage)

    def inject(self, round_: Round, session: Session) -> None:
        subprocess.run(["umount", "-l", round_.storage], check=True)
        self._gone = True

    def heal(self, round_: Round, session: Session) -> None:
        if getattr(self, "_gone", False):
            self._gone = False
            below = sorted(path.relative_to(round_.storage).as_posix() for path in Path(round_.storage).rglob("*"))
            if below:
                round_.problems.append(f"in the empty mount point there are now {below[:5]}")
            _mount("--bind", str(self._disk), round_.storage)


class SlowDisk(Fault):
    """Every use of a file takes longer."""

    name = "disk slow"
    can_fail = False
    timeout_s = 60.0

    def applies(self, case: Case, arena: Arena) -> bool:
        return case.workers == 0 and not case.remote

    def shims(self, number: int) -> tuple[tuple[str, dict[str, Any]], ...]:
        return (("slow_disk", {"folder": self._storage, "seconds": self.draw.uniform(0.002, 0.02)}),)

    def prepare(self, round_: Round) -> None:
        self._storage = round_.storage


class NoMoreFiles(Fault):
    """The command may open no more files (``ulimit -n``)."""

    name = "too many open files"

    def applies(self, case: Case, arena: Arena) -> bool:
        return case.workers == 0

    def inject(self, round_: Round, session: Session) -> None:
        in_use = len(os.listdir(f"/proc/{session.pid}/fd"))
        spare = self.draw.choice((0, 0, 1, 2, 4))
        _, hard = resource.prlimit(session.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(session.pid, resource.RLIMIT_NOFILE, (in_use + spare, hard))
        self._hard = hard
        round_.detail = f"{spare} to spare"

    @property
    def lasts_s(self) -> float:
        return 8.0  # no socket can be opened either: an object store is waited for

    def heal(self, round_: Round, session: Session) -> None:
        if not session.is_over and hasattr(self, "_hard"):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(session.pid, resource.RLIMIT_NOFILE, (min(65536, self._hard), self._hard))


class NoLargeFiles(Fault):
    """The command may write no large files (``ulimit -f``)."""

    name = "file size limit"

    def applies(self, case: Case, arena: Arena) -> bool:
        return case.workers == 0

    def inject(self, round_: Round, session: Session) -> None:
        limit = self.draw.choice((8192, 20_000, 50_000))  # what the command says has to find room in its log
        _, hard = resource.prlimit(session.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(session.pid, resource.RLIMIT_FSIZE, (limit, hard))
        round_.detail = f"{limit} bytes"


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)

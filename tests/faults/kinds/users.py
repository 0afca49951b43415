"""Two users of one storage."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from raymem.storage.storage import Storage
from tests.faults.arena import digest_of
from tests.faults.cases import NAME, Case
from tests.faults.fault import Fault
from tests.faults.sessions import Session
from tests.helpers.users import TEAM

if TYPE_CHECKING:
    from tests.faults.arena import Arena
    from tests.faults.rounds import Round

FIRST, SECOND = 65001, 65002
OTHER = "other"


class TwoUsers(Fault):
    """While one user trains, another one trains a run of the same data on the same storage, from start to end."""

    name = "two users"
    can_fail = False

    def applies(self, case: Case, arena: Arena) -> bool:
        return os.geteuid() == 0 and not case.workers and not case.remote

    def prepare(self, round_: Round) -> None:
        mode = self.draw.choice((0o2770, 0o1777))
        os.chown(round_.storage, -1, TEAM)
        os.chmod(round_.storage, mode)
        round_.folder.chmod(0o755)
        (round_.folder / "tmp").chmod(0o1777)
        round_.environment["RAYMEM_CACHE"] = str(round_.folder / "tmp" / "raymem-cache-of-plans")
        round_.folder.parent.chmod(0o755)
        round_.uid = FIRST
        round_.detail = stat.filemode(mode)

    def inject(self, round_: Round, session: Session) -> None:
        round_.write_recipe("other.yaml", name=OTHER)
        own = {"RAYMEM_CACHE": str(round_.folder / "tmp" / "raymem-cache-of-others")}
        second = round_.start(uid=SECOND, recipe="other.yaml", environment=own)
        if not second.wait(120):
            second.kill()
            round_.problems.append("the second user's run hangs")
        elif second.status != 0:
            round_.problems.append(f"the second user's run ended with {second.status}: {second.output[-400:]!r}")

    def problems(self, round_: Round) -> list[str]:
        storage = Storage.open(round_.storage)
        if not storage.exists(f"{OTHER}/adapter") and not storage.exists(f"{OTHER}/model"):
            return []  # the second user's run is told of above, or there was none
        reference = round_.arena.reference(round_.case)
        same = digest_of(storage, round_.case, OTHER) == reference.digest
        return [] if same else [f"the second user's result differs from that of {NAME} undisturbed"]

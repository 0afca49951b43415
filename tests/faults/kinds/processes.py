"""Faults of processes: of the driver, of workers, of nodes."""

from __future__ import annotations

import random
import signal
import threading
import time
from typing import TYPE_CHECKING

from tests.faults.cases import Case
from tests.faults.fault import Fault
from tests.faults.nodes import signal_all
from tests.faults.sessions import Session

if TYPE_CHECKING:
    from tests.faults.arena import Arena
    from tests.faults.rounds import Round


class DriverKilled(Fault):
    """SIGKILL to the command, in one session or in three."""

    name = "driver killed"

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._times = draw.choice((1, 1, 3))

    def inject(self, round_: Round, session: Session) -> None:
        session.kill()

    def repeats(self, number: int) -> bool:
        return number <= self._times


class DriverStopped(Fault):
    """SIGSTOP to the command for some seconds, as a suspended laptop or a debugger does."""

    name = "driver stopped"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        session.kill(signal.SIGSTOP)

    @property
    def lasts_s(self) -> float:
        return 2.0

    def heal(self, round_: Round, session: Session) -> None:
        if not session.is_over:
            session.kill(signal.SIGCONT)


class DriverAskedToStop(Fault):
    """SIGTERM, SIGINT or SIGHUP to the command."""

    name = "driver asked to stop"

    def inject(self, round_: Round, session: Session) -> None:
        number = self.draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        round_.detail = number.name
        session.kill(number)


class TwoDrivers(Fault):
    """The same command is started a second time while the first one works."""

    name = "two drivers"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        second = round_.start()
        if not second.wait(120):
            round_.problems.append("the second driver hangs")
            second.kill()
        elif second.status == 0:
            if not round_.case.is_staged:  # before LoRAM trains, its stages may be done by several
                round_.problems.append("the second driver was let in")
        elif second.status != 1 or "error: " not in second.output or "Traceback" in second.output:
            round_.problems.append(f"the second driver ended with {second.status}: {second.output[-300:]!r}")
        round_.detail = second.output.strip().splitlines()[-1][:200] if second.output.strip() else ""


class _OfWorkers(Fault):
    """A fault that needs a living worker."""

    def applies(self, case: Case, arena: Arena) -> bool:
        return case.workers > 0

    def await_workers(self, round_: Round, session: Session) -> bool:
        """Wait until there are workers; False if the session is over before."""
        assert round_.arena.cluster is not None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not session.is_over:
            if len(round_.arena.cluster.workers()) >= round_.case.workers:
                return True
            time.sleep(0.1)
        return False


class WorkerKilled(_OfWorkers):
    """SIGKILL to a worker."""

    name = "worker killed"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        if self.await_workers(round_, session):
            assert round_.arena.cluster is not None
            worker = self.draw.choice(round_.arena.cluster.workers())
            round_.detail = f"worker {worker.pid}"
            signal_all([worker], signal.SIGKILL)


class WorkerStopped(_OfWorkers):
    """SIGSTOP to a worker for some seconds."""

    name = "worker stopped"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        if self.await_workers(round_, session):
            assert round_.arena.cluster is not None
            self._worker = self.draw.choice(round_.arena.cluster.workers())
            signal_all([self._worker], signal.SIGSTOP)

    @property
    def lasts_s(self) -> float:
        return 4.0

    def heal(self, round_: Round, session: Session) -> None:
        if hasattr(self, "_worker"):
            signal_all([self._worker], signal.SIGCONT)


class NodeKilled(_OfWorkers):
    """SIGKILL to all processes of a node; another node comes some seconds later."""

    name = "node killed"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        cluster = round_.arena.cluster
        assert cluster is not None
        if self.await_workers(round_, session) and (busy := cluster.busy_nodes()):
            cluster.kill(self.draw.choice(busy))
            self._replacing = threading.Timer(self.draw.uniform(0.0, 3.0), cluster.fill_up)
            self._replacing.start()

    def heal(self, round_: Round, session: Session) -> None:
        if hasattr(self, "_replacing"):
            self._replacing.join()


class NodeDrained(_OfWorkers):
    """A node is taken back with notice: it is drained, and gone some seconds later; another one comes."""

    name = "node drained"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        cluster = round_.arena.cluster
        assert cluster is not None
        if self.await_workers(round_, session) and (busy := cluster.busy_nodes()):
            node, notice_s = self.draw.choice(busy), self.draw.uniform(1.0, 4.0)
            accepted = cluster.drain(node, notice_s)
            round_.detail = f"{notice_s:.1f} s of notice, {'accepted' if accepted else 'declined'}"

            def end() -> None:
                cluster.kill(node)
                cluster.fill_up()

            self._ending = threading.Timer(notice_s, end)
            self._ending.start()

    def heal(self, round_: Round, session: Session) -> None:
        if hasattr(self, "_ending"):
            self._ending.join()

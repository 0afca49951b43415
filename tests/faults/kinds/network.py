"""Faults of what lies behind the network: the object store and the tracking server."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Literal

from tests.faults.cases import NAME, STEPS, Case
from tests.faults.fault import Fault
from tests.faults.sessions import Session
from tests.helpers.faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from tests.faults.arena import Arena
    from tests.faults.rounds import Round


class _OnProxy(Fault):
    """A fault of an object store that is reached by a proxy."""

    timeout_s = 60.0

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._lasts_s = draw.uniform(0.5, 8.0)

    def applies(self, case: Case, arena: Arena) -> bool:
        return case.remote

    def prepare(self, round_: Round) -> None:
        assert round_.arena.bucket is not None
        host, _, port = round_.arena.bucket.partition(":")
        self._proxy = FaultyProxy(host, int(port), seed=round_.seed)
        round_.storage = self._proxy.uri(round_.storage)

    @property
    def lasts_s(self) -> float:
        return self._lasts_s

    def heal(self, round_: Round, session: Session) -> None:
        self._proxy.back()

    def close(self) -> None:
        if hasattr(self, "_proxy"):
            self._proxy.close()


class Away(_OnProxy):
    """The object store cannot be reached: refused, reset in the middle of answers, or no answer at all."""

    name = "S3 away"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        hows: tuple[Literal["refuse", "reset", "hang"], ...] = ("refuse", "reset", "hang")
        how = self.draw.choice(hows)
        round_.detail = f"{how} for {self._lasts_s:.1f} s"
        self._proxy.away(how, at=self.draw.choice((None, None, "manifest.json", ".safetensors")))


class Errors(_OnProxy):
    """The object store answers some or all requests with an internal error."""

    name = "S3 errors"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        rate = self.draw.choice((0.2, 0.5, 1.0))
        round_.detail = f"{rate:.0%} of the requests for {self._lasts_s:.1f} s"
        self._proxy.errors(rate, 500)


class Throttled(_OnProxy):
    """The object store asks for fewer requests."""

    name = "S3 throttled"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        rate = self.draw.choice((0.3, 0.7, 1.0))
        round_.detail = f"{rate:.0%} of the requests for {self._lasts_s:.1f} s"
        self._proxy.throttle(rate)


class Refused(_OnProxy):
    """The object store takes the credentials no more, until the command has stopped."""

    name = "S3 access denied"

    def inject(self, round_: Round, session: Session) -> None:
        self._proxy.errors(1.0, 403)

    @property
    def lasts_s(self) -> float:
        return float("inf")


class Slow(_OnProxy):
    """Each answer of the object store takes longer; some so long that the client gives up."""

    name = "S3 slow"
    can_fail = False

    def inject(self, round_: Round, session: Session) -> None:
        delay_s = self.draw.choice((0.1, 0.5, 5.0))
        round_.detail = f"{delay_s} s per answer for {self._lasts_s:.1f} s"
        self._proxy.slow(delay_s)


class MlflowDown(Fault):
    """The tracking server closes every connection, for some seconds or until the command has ended."""

    name = "MLflow down"
    timeout_s = 60.0

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._lasts_s = draw.choice((draw.uniform(0.2, 6.0), float("inf")))

    def applies(self, case: Case, arena: Arena) -> bool:
        return arena.tracking is not None and not case.is_staged

    def prepare(self, round_: Round) -> None:
        self._experiment = f"round-{round_.seed}-{time.time_ns()}"
        uri = round_.arena.tracking.uri
        round_.sections = {"tracking": {"kind": "mlflow", "uri": uri, "experiment": self._experiment}}

    def inject(self, round_: Round, session: Session) -> None:
        round_.arena.tracking.up = False
        round_.detail = f"for {self._lasts_s:.1f} s"

    @property
    def lasts_s(self) -> float:
        return self._lasts_s

    def heal(self, round_: Round, session: Session) -> None:
        round_.arena.tracking.up = True

    def problems(self, round_: Round) -> list[str]:
        """A run whose server is back before its end is there whole; else the command says that it is not."""
        from mlflow import MlflowClient

        client = MlflowClient(round_.arena.tracking.uri)
        experiment = client.get_experiment_by_name(self._experiment)
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        steps = {m.step for run in runs for m in client.get_metric_history(run.info.run_id, "loss")}
        whole = len(runs) == 1 and runs[0].info.status == "FINISHED" and steps == set(range(1, STEPS + 1))
        told = "warning: tracking" in round_.sessions[-1].output
        if not whole and not told:
            states = [run.info.status for run in runs]
            return [f"the tracked runs of {NAME} are {states} with {len(steps)} steps, and nobody was told"]
        return []

"""One round: a run, a fault at a moment, the same command again until it is done, and a look at what is left."""

from __future__ import annotations

import random
import re
import shutil
import threading
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raymem.storage.storage import Storage
from raymem.training.checkpoint import FOLDER
from tests.faults.arena import BUCKET, Arena, digest_of, losses_of, unmount_below
from tests.faults.cases import ALL, NAME, STEPS, Case
from tests.faults.checks import left_behind, temporary_in
from tests.faults.fault import Fault
from tests.faults.sessions import MARK, Moment, Session, Spec

MOST_SESSIONS = 5
ALONE = 0.9
"""Share of runs of one process where a fault strikes any run: one on Ray takes ten times as long."""
ANSWERS = {130, 143, 129, 75}
"""Exit statuses of a session that was asked to stop."""


@dataclass(frozen=True)
class Record:
    """What came of a round."""

    seed: int
    kind: str
    case: str
    moment: str
    outcome: str
    """``recovered`` within the session that was struck or by the same command again, ``stopped`` with a named error
    first, ``missed`` if the session was over before the moment, or ``failed``."""
    identical: bool
    sessions: list[tuple[int | None, float, str]]
    """Exit status, seconds and last error of each."""
    lost_steps: int | None
    """Steps that were taken again, where it can be known."""
    recovery_s: float | None
    """Seconds from the fault to the finished run."""
    problems: list[str]
    detail: str = ""


@dataclass
class Round:
    """A round under way."""

    arena: Arena
    case: Case
    fault: Fault
    seed: int
    folder: Path
    storage: str = ""
    """Path or URI of the storage."""
    sections: dict[str, Any] = field(default_factory=dict)
    """Laid over the recipe."""
    environment: dict[str, str] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    detail: str = ""
    """What exactly the fault did."""
    problems: list[str] = field(default_factory=list)
    uid: int | None = None
    before: frozenset[str] = frozenset()
    """What lay in the cluster's temporary directory before the round."""
    struck_at: float | None = None
    steps_then: int | None = None

    @property
    def run(self) -> Storage:
        """The run's directory."""
        return Storage.open(self.storage).child(NAME)

    def start(
        self, moment: Moment | None = None, *, uid: int | None = None, recipe: str = "recipe.yaml",
        environment: Mapping[str, str] = types.MappingProxyType({}),
    ) -> Session:  # fmt: skip
        """Begin the next session."""
        number = len(self.sessions) + 1
        log = self.folder / f"session-{number}.log"
        while log.exists():
            log = log.with_name(f"{log.stem}x.log")
        spec = Spec(
            (*self.case.command, str(self.folder / recipe)),
            {**self.environment, **environment, MARK: str(self.folder)},
            log,
            self.folder,
            moment if moment is not None and moment.kind != "checkpoint" else None,
            (*self.fault.shims(number), *self._pace()),
            self.uid if uid is None else uid,
        )
        return Session(spec)

    def _pace(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        return (("paced_workers", {"seconds": 0.15}),) if self.case.workers else ()

    def write_recipe(self, file: str = "recipe.yaml", **sections: Any) -> None:
        recipe = self.case.recipe(self.arena.model, self.arena.examples, self.storage, self.sections, sections)
        (self.folder / file).write_text(yaml.safe_dump(recipe))

    def await_moment(self, session: Session, moment: Moment, timeout_s: float) -> bool:
        """Wait for the moment; False if the session is over before."""
        if moment.kind != "checkpoint":
            return session.reaches_moment(timeout_s)
        deadline = time.monotonic() + timeout_s
        while moment.number and time.monotonic() < deadline and not session.is_over:
            steps = [int(name[5:]) for name in self._checkpoints() if re.fullmatch(r"step_\d+", name)]
            if max(steps, default=0) >= moment.number:
                break
            time.sleep(0.05)
        time.sleep(moment.delay_s)
        return not session.is_over

    def _checkpoints(self) -> list[str]:
        return self.run.list_dirs(FOLDER)


def draw_round(seed: int, kinds: Mapping[str, type[Fault]], arena: Arena) -> tuple[Case, Fault, random.Random]:
    """The run and the fault of a seed."""
    draw = random.Random(f"faults {seed}")
    names = sorted(kinds)
    fault = kinds[names[seed % len(names)]](draw)  # in turn, so that every kind has its share
    cases = [case for case in ALL if _has_ground(case, arena) and fault.applies(case, arena)]
    if not cases:
        raise LookupError(f"{fault.name}: nothing here that it could strike")
    alone = [case for case in cases if not case.workers]
    if alone and draw.random() < ALONE:
        cases = alone
    return draw.choice(cases), fault, draw


def _has_ground(case: Case, arena: Arena) -> bool:
    return (not case.workers or arena.has_cluster) and (not case.remote or arena.bucket is not None)


def run_round(seed: int, case: Case, fault: Fault, arena: Arena) -> Record:
    """Play a round to its end. Its folder stays if something was wrong."""
    reference = arena.reference(case)
    name = f"{seed:06d}-{fault.name.replace(' ', '-')}"
    folder = arena.folder / "rounds" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    round_ = Round(arena, case, fault, seed, folder)
    round_.environment = arena.environment(folder, case)
    if case.remote:
        round_.storage = f"s3://{BUCKET}/{name}?endpoint_override={arena.bucket}&scheme=http&region=us-east-1"
    else:
        round_.storage = str(folder / "storage")
        Path(round_.storage).mkdir()
    if case.workers and arena.cluster is not None:
        arena.cluster.fill_up()
        round_.before = frozenset(temporary_in(arena.cluster.temporary))
    moment = fault.moment(case, reference.file_uses)
    fault.prepare(round_)
    round_.write_recipe()
    try:
        outcome = _play(round_, moment)
        record = _judge(round_, moment, outcome)
    finally:
        for session in round_.sessions:
            if not session.is_over:
                session.kill()
                session.wait(10)
        unmount_below(folder)
        fault.close()
    if record.outcome != "failed":
        shutil.rmtree(folder, ignore_errors=True)
    return record


def _play(round_: Round, moment: Moment) -> str:
    """Run sessions until one succeeds; returns the outcome so far."""
    fault, struck, stopped = round_.fault, False, False
    timeout_s = fault.timeout_s + (240.0 if round_.case.workers else 120.0)
    for number in range(1, MOST_SESSIONS + 1):
        strikes = fault.repeats(number)
        if number > 1:
            fault.before(round_, number)
        session = round_.start(moment if strikes else None)
        round_.sessions.append(session)
        if strikes and round_.await_moment(session, moment, timeout_s):
            struck = True
            if round_.struck_at is None:
                round_.struck_at = time.monotonic()
            round_.steps_then = _steps_so_far(round_, session)
            fault.inject(round_, session)
            session.release()
            healing = threading.Timer(min(fault.lasts_s, timeout_s), fault.heal, (round_, session))
            healing.daemon = True
            healing.start()
            over = session.wait(timeout_s)
            healing.cancel()
            healing.join()
        else:
            over = session.wait(timeout_s)
        if not over:
            round_.problems.append(f"session {number} hangs: no end after {timeout_s:.0f} s")
            session.kill()
            session.wait(10)
            return "failed"
        fault.heal(round_, session)
        if session.status == 0:
            break
        wrong = _what_is_wrong(session)
        if wrong:
            round_.problems.append(f"session {number}: {wrong}")
        stopped = stopped or not _was_killed(session)
        if stopped and not fault.can_fail:
            round_.problems.append(f"session {number} stopped, which this fault should not do: {last_error(session)}")
    else:
        round_.problems.append(f"no success in {MOST_SESSIONS} sessions")
        return "failed"
    if not struck:
        return "missed"
    return "stopped" if stopped else "recovered"


def _was_killed(session: Session) -> bool:
    return session.status is not None and (session.status < 0 or session.status in ANSWERS)


def _what_is_wrong(session: Session) -> str | None:
    """Say what is wrong with how a session failed; None if it was killed or told its error in a sentence."""
    output = session.output
    if "Traceback (most recent call last)" in output:
        return "a traceback: " + output.strip().splitlines()[-1][:300]
    if session.status in (-6, -7, -11, -4):
        return f"it crashed with signal {-session.status}"
    if not _was_killed(session) and not re.search(r"^error: .{20,}", output, re.MULTILINE):
        return f"exit status {session.status} without an error in words: {output[-300:]!r}"
    return None


def last_error(session: Session) -> str:
    """The last error that a session told."""
    errors = re.findall(r"^(?:error|WARNING [\w.]+): (.*)$", session.output, re.MULTILINE)
    return errors[-1] if errors else ""


def _steps_so_far(round_: Round, session: Session) -> int | None:
    if session.steps_done is not None and len(round_.sessions) == 1 and not round_.case.is_staged:
        return session.steps_done
    if round_.case.remote:
        return None
    return max(losses_of(Path(round_.storage) / NAME), default=0)


def _judge(round_: Round, moment: Moment, outcome: str) -> Record:
    case, reference = round_.case, round_.arena.reference(round_.case)
    ended = time.monotonic()
    identical = False
    if outcome != "failed":
        try:
            identical = digest_of(Storage.open(round_.storage), case) == reference.digest
        except LookupError as error:
            round_.problems.append(str(error))
        if not identical:
            round_.problems.append("the result differs from that of the undisturbed run")
        if not case.remote:
            round_.problems += _wrong_losses(losses_of(Path(round_.storage) / NAME), reference.losses)
        round_.problems += round_.fault.problems(round_)
        round_.problems += left_behind(round_)
    sessions = [
        (session.status, round((session.ended or ended) - session.began, 2), last_error(session))
        for session in round_.sessions
    ]
    lost = None
    resumed = [int(step) for s in round_.sessions[1:] for step in re.findall(r"resuming from step (\d+)", s.output)]
    resumed += [int(step) for s in round_.sessions for step in re.findall(r"\(resumed at (\d+)\)", s.output)]
    if round_.steps_then is not None and outcome in ("recovered", "stopped"):
        if resumed:
            lost = max(0, round_.steps_then - resumed[0])
        else:
            lost = round_.steps_then if len(round_.sessions) > 1 else 0
            if round_.steps_then == STEPS:
                lost = 0  # complete: nothing was taken again
    recovery = None if round_.struck_at is None else round(ended - round_.struck_at, 2)
    if round_.problems:
        outcome = "failed"
    return Record(
        round_.seed, round_.fault.name, case.title, str(moment), outcome, identical, sessions, lost, recovery,
        round_.problems, round_.detail,
    )  # fmt: skip


def _wrong_losses(losses: dict[int, float], expected: dict[int, float]) -> list[str]:
    missing = sorted(set(expected) - set(losses))
    if missing:
        return [f"history: steps {missing} are missing in metrics.jsonl"]
    different = [step for step, loss in expected.items() if losses[step] != loss]
    return [f"history: steps {different} have other losses"] if different else []

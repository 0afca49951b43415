"""A few rounds of the soak, each with a fault that no other test injects; ``python -m tests.faults`` plays them all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from raymem.testing.processes import start_server
from tests.faults.arena import Arena
from tests.faults.cases import NAME, Case
from tests.faults.fault import Fault
from tests.faults.kinds import KINDS
from tests.faults.kinds.files import Strays
from tests.faults.kinds.machine import ClockJumps
from tests.faults.kinds.processes import DriverStopped
from tests.faults.kinds.storage import NoLargeFiles
from tests.faults.report import write_report
from tests.faults.rounds import Record, Round, run_round
from tests.faults.sessions import PRELOADED, Moment, Session

CASE = Case("lora", 0)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    """Without Ray, object store and mounts."""
    start_server(PRELOADED)
    made = Arena(tmp_path_factory.mktemp("faults"))
    made.build()
    return made


def at(fault: Fault, moment: Moment) -> Fault:
    fault.moment = lambda case, file_uses: moment  # type: ignore[method-assign]
    return fault


@pytest.mark.parametrize(
    ("kind", "moment", "outcome"),
    [
        (ClockJumps, Moment("step", 1), "recovered"),
        (DriverStopped, Moment("step", 5), "recovered"),
        (Strays, Moment("step", 6), "recovered"),
        (NoLargeFiles, Moment("step", 5), "stopped"),
    ],
)
def test_a_run_is_the_same_in_spite_of(kind: type[Fault], moment: Moment, outcome: str, arena: Arena) -> None:
    record = run_round(0, CASE, at(kind(random.Random(1)), moment), arena)
    assert record.problems == []
    assert (record.outcome, record.identical) == (outcome, True)
    assert [status for status, *_ in record.sessions][-1] == 0


class Spoiler(Fault):
    """Changes the result and leaves something behind, which a round has to notice."""

    name = "spoiler"

    def heal(self, round_: Round, session: Session) -> None:
        (weights,) = Path(round_.storage).glob(f"{NAME}/adapter/*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        (round_.folder / "tmp" / "raymem-checkpoint-left").touch()


def test_a_round_notices_another_result_and_what_is_left(arena: Arena) -> None:
    record = run_round(1, CASE, at(Spoiler(random.Random(0)), Moment("step", 12)), arena)
    assert record.outcome == "failed" and not record.identical
    assert "the result differs from that of the undisturbed run" in record.problems
    assert "left in TMPDIR: raymem-checkpoint-left" in record.problems


def test_the_report_counts_by_kind() -> None:
    def record(seed: int, outcome: str, lost: int | None) -> dict[str, object]:
        found = Record(seed, "disk full", CASE.title, "step 3", outcome, outcome != "failed", [], lost, 2.0, [])
        return vars(found)

    report = write_report([record(0, "recovered", 1), record(1, "stopped", 3), record(2, "missed", 0)], {"date": "d"})
    assert "| disk full | 2 | 1 | 1 | 0 | 2 | 2, 3 | 2.0, 2.0 |" in report
    assert "another 1 rounds were over" in report


def test_kinds_have_names_of_their_own() -> None:
    assert len(KINDS) >= 20 and all(name == kind.name for name, kind in KINDS.items())

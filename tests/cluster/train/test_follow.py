"""What the driver of a run makes of the events of its workers; a Ray that starts is not needed for that."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import ray
import ray.train
from ray.autoscaler._private.autoscaler import AutoscalerSummary
from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeAvailabilityRecord,
    NodeAvailabilitySummary,
    UnavailableNodeInformation,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import state
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from raymem.cluster.train import callbacks
from raymem.cluster.train.callbacks import GroupCallback
from raymem.cluster.train.events import Event, Logged, Resized, Restarted, Rows, Scheduled, Told
from raymem.cluster.train.follow import Follower
from raymem.cluster.train.mailbox import Mailbox, warnings_to_driver
from raymem.cluster.train.waiting import Waiting, scaled, words_of
from raymem.training.reporter import Audience, Row


class Remote:
    """A method of an actor that is called at once."""

    def __init__(self, call: Any) -> None:
        self.remote = call


class Box:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.push = Remote(self.events.append)


class FakeRay(Waiting):
    """A Ray that says what it is told to."""

    says = ""

    def words(self, num_workers: int) -> str:
        return f"{self.says} {num_workers}"


class Notes:
    """An audience that takes notes."""

    def __init__(self) -> None:
        self.statuses: list[str] = []
        self.rows: list[float] = []
        self.new_rows: list[float] = []
        self.waiting = FakeRay({"CPU": 1.0})
        audience = Audience([self._all], [self._new], self.statuses.append)
        self.follower = Follower(audience, self.waiting)

    def _all(self, rows: Sequence[Row]) -> None:
        self.rows += [row["step"] for row in rows]

    def _new(self, rows: Sequence[Row]) -> None:
        self.new_rows += [row["step"] for row in rows]

    def wait(self, says: str) -> None:
        FakeRay.says = says
        self.follower.look()


def rows(*steps: int, replayed: int = 0) -> Rows:
    return Rows([{"step": float(step)} for step in steps], replayed)


def test_what_is_waited_for_is_told_once_until_a_worker_speaks() -> None:
    told = Notes()
    told.wait("nobody has asked for workers")
    told.follower.take([Scheduled(2)])
    told.wait("waiting for")
    told.wait("waiting for")
    told.wait("starting")
    told.follower.take([Told(1, "loading the weights"), Told(0, "loading the weights")])
    told.wait("starting")
    told.follower.take([Told(0, "taking step 1"), rows(1, 2)])
    assert told.statuses == ["waiting for 2", "starting 2", "loading the weights", "taking step 1"]


def test_rows_of_an_earlier_session_are_recorded_and_not_shown() -> None:
    told = Notes()
    told.follower.take([rows(3, 4, 5, replayed=2), rows(6)])
    told.follower.take([rows(4, 5, replayed=2)])
    assert told.rows == [3, 4, 5, 6, 4, 5]
    assert told.new_rows == [5, 6]


def test_a_restart_says_its_reason_and_its_progress_again(caplog: pytest.LogCaptureFixture) -> None:
    told = Notes()
    told.follower.take([Told(0, "loading the weights"), rows(1), Restarted("worker 1 failed: OSError: gone")])
    told.follower.take([Scheduled(2)])
    told.wait("starting")
    told.follower.take([Told(0, "loading the weights")])
    assert told.statuses == ["loading the weights", "starting 2", "loading the weights"]
    assert [record.getMessage() for record in caplog.records] == [
        "worker 1 failed: OSError: gone; the workers start again from the last checkpoint"
    ]


def test_a_workers_words_about_an_outage_reach_the_driver(caplog: pytest.LogCaptureFixture) -> None:
    box, told = Box(), Notes()
    with warnings_to_driver(box, 1):
        logging.getLogger("raymem.storage.retry").warning("storage: %s does not answer", "s3://bucket")
        logging.getLogger("raymem.storage.retry").info("not for people")
    logging.getLogger("raymem.storage.retry").warning("behind the run")
    (logged,) = box.events
    assert logged == Logged(1, "raymem.storage.retry", logging.WARNING, "storage: s3://bucket does not answer")
    caplog.clear()
    told.follower.take([logged, dataclasses.replace(logged, rank=0)])  # both ranks say it
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == (
        "raymem.storage.retry",
        "worker 1: storage: s3://bucket does not answer",
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ray.train.WorkerGroupError(
                "...", {0: RuntimeError("[gloo] closed by peer"), 1: OSError("a\nNo such device")}
            ),
            "worker 1 failed: No such device",
        ),
        (
            ray.train.ControllerError(WorkerGroupStartupTimeoutError(2)),
            "the workers did not start: ",
        ),
    ],
)
def test_the_controller_tells_of_restarts_and_not_of_the_end(error: Exception, reason: str) -> None:
    box = Box()
    callback = GroupCallback(box, saves=True)
    for now in (state.RunningState(), state.RestartingState(error), state.ErroredState(error)):
        callback.after_controller_state_update(state.InitializingState(), now)
    (event,) = box.events
    assert isinstance(event, Restarted) and event.reason.startswith(reason)


def test_events_whose_delivery_failed_are_delivered_again() -> None:
    box = Mailbox.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    box.push(rows(1, 2))
    box.push(Scheduled(1))
    assert box.events(0) == box.events(0) == [rows(1, 2), Scheduled(1)]
    box.push(rows(3))
    assert box.events(2) == [rows(3)]
    assert box.events(3) == []


def test_the_words_for_what_ray_is_doing() -> None:
    waiting = Waiting({"GPU": 1.0, "memory": float(3 << 30)})
    assert waiting.without_room(2, {"GPU": 1.0, "memory": float(1 << 30)}, scaled(2, [])) == (
        "waiting for workers (2 x 1 GPU, 3.00 GiB memory: the cluster has 1 GPU, 1.00 GiB memory free; its autoscaler "
        "is starting 2 nodes)"
    )
    assert Waiting({"CPU": 1.0}).without_room(2, {}, scaled(0, ["no\nquota"])) == (
        "waiting for workers (2 x 1 CPU: the cluster has 0 CPU free; a node could not be started: no quota)"
    )
    assert Waiting({"CPU": 1.0}).starting(2, 1) == "starting workers (1 of 2 up)"
    assert Waiting({"CPU": 1.0}, ("working_dir", "pip")).starting(2, 0) == (
        "starting workers (0 of 2 up, after their nodes have prepared working_dir and pip)"
    )
    assert Waiting({"CPU": 1.0}).starting(2, 2) == "connecting the workers"


def test_the_report_of_an_autoscaler_is_read_as_ray_writes_it() -> None:
    failed = NodeAvailabilityRecord("gpu", False, 0.0, UnavailableNodeInformation("InsufficientCapacity", "no p4d"))
    there = NodeAvailabilityRecord("cpu", True, 0.0, None)
    summary = AutoscalerSummary(
        active_nodes={}, idle_nodes=None, pending_nodes=[("10.0.0.1", "cpu", "setting-up")],
        pending_launches={"cpu": 2}, failed_nodes=[],
        node_availability_summary=NodeAvailabilitySummary({"gpu": failed, "cpu": there}),
    )  # fmt: skip
    report = json.loads(json.dumps(dataclasses.asdict(summary)))
    assert words_of(report) == "; its autoscaler is starting 3 nodes; a node could not be started: no p4d"
    assert words_of({}) == ""


@pytest.mark.parametrize(("answers", "step"), [([None, (12, "there")], 12), ([None] * 9, None)])
def test_a_group_saves_before_it_gets_another_size(
    answers: list[Any], step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    regrouped: list[tuple[int, int | None]] = []
    box, left = Box(), iter(answers)
    box.ask_to_save, box.answer = Remote(lambda: 1), Remote(lambda request: next(left))  # type: ignore[attr-defined]
    box.regrouped = Remote(lambda *what: regrouped.append(what))  # type: ignore[attr-defined]
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(callbacks, "SAVE_FIRST_S", 0.3)
    decision = ResizeDecision(num_workers=2, resources_per_worker={})
    GroupCallback(box, saves=True).after_controller_state_update(state.RunningState(), state.ResizingState(decision))
    assert regrouped == [(2, step)]
    told = Notes()
    told.follower.take([rows(11, 12), Resized(2, step)])
    start = "from step 12, which was saved for that" if step else "from the last checkpoint"
    assert told.statuses == [f"the cluster has room for 2 workers now: the run goes on with so many {start}"]


def test_a_group_that_saves_nothing_is_not_waited_for() -> None:
    regrouped: list[tuple[int, int | None]] = []
    box = Box()
    box.regrouped = Remote(lambda *what: regrouped.append(what))  # type: ignore[attr-defined]
    decision = ResizeDecision(num_workers=3, resources_per_worker={})
    GroupCallback(box, saves=False).after_controller_state_update(state.RunningState(), state.ResizingState(decision))
    assert regrouped == [(3, None)]

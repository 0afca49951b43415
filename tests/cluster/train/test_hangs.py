"""A rank that hangs is named and killed, the group starts again, and the result is that of an undisturbed run.

In the default tier one such run is that of test_installed.py.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymem.cluster.train import watchdog
from raymem.cluster.train.pulse import Beat
from raymem.cluster.train.watchdog import Watchdog, collective_timeout_s, end_process, started_at
from raymem.errors import ClusterError
from raymem.runs.train import launch
from tests.helpers.ray_processes import RayHead
from tests.helpers.run_files import losses, result_bytes
from tests.helpers.runs import ray_recipe, train_here
from tests.helpers.support import in_processes

AT_WORK = Beat(
    rank=0, node_id="n", node="10.0.0.1", pid=7, started="5", number=1, what="step 3", brief=True, progress=3,
    meetings=10, stack="",
)  # fmt: skip


class Group:
    """Ranks that send a beat each second, and a watchdog of ten seconds that looks as often."""

    def __init__(self, ranks: int) -> None:
        self.watchdog = Watchdog(10)
        self.beats = {rank: dataclasses.replace(AT_WORK, rank=rank) for rank in range(ranks)}
        assert self.watchdog.look(self.beats, 1) == []

    def second(self, **changes: Any) -> list[int]:
        """Pass a second: each rank sends a beat, with changes as ``r1={"progress": 9}``; None sends nothing."""
        for rank, beat in self.beats.items():
            change = changes.get(f"r{rank}", {})
            if change is not None:
                self.beats[rank] = dataclasses.replace(beat, number=beat.number + 1, **change)
        return [beat.rank for beat in self.watchdog.look(self.beats, 1)]

    def hung_after(self, seconds: int, **changes: Any) -> list[int]:
        """Pass seconds; what hangs at their end, and nothing did before."""
        for _ in range(seconds - 1):
            assert self.second(**changes) == []
        return self.second(**changes)


def test_a_rank_alone_that_gets_no_further_hangs() -> None:
    assert Group(1).hung_after(10) == [0]


def test_of_ranks_that_stand_still_the_one_that_others_wait_for_hangs() -> None:
    assert Group(3).hung_after(10, r0={"meetings": 11}, r2={"meetings": 11}) == [1]


def test_ranks_that_wait_for_one_at_work_do_not_hang() -> None:
    group = Group(2)
    for step in range(4, 40):
        assert group.second(r0={"meetings": 11}, r1={"progress": step}) == []


def test_a_long_step_with_collectives_is_no_hang() -> None:
    group = Group(1)
    for meetings in range(11, 50):
        assert group.second(r0={"meetings": meetings}) == []


def test_a_process_that_sends_nothing_hangs_in_whatever_it_does() -> None:
    group = Group(2)
    group.second(r0={"what": "the checkpoint", "brief": False}, r1={"what": "the checkpoint", "brief": False})
    assert group.hung_after(10, r0={"meetings": 11}, r1=None) == [1]


def test_what_may_take_long_is_not_watched() -> None:
    group = Group(2)
    for _ in range(40):
        assert group.second(r0={"meetings": 11}, r1={"brief": False}) == []


def test_all_are_named_if_it_cannot_be_known_which() -> None:
    assert Group(2).hung_after(10) == [0, 1]


def test_the_next_process_of_a_rank_begins_anew() -> None:
    group = Group(1)
    assert group.second() == []
    assert group.hung_after(10, r0={"pid": 8}) == []
    assert group.hung_after(1) == [0]


@pytest.mark.parametrize("timeout", [None, 1.0, 600.0, 86400.0])
def test_ranks_wait_for_each_other_longer_than_the_watchdog_does(timeout: float | None) -> None:
    assert collective_timeout_s(timeout) >= max(1800.0, 3 * (timeout or 0.0))


@pytest.fixture
def sleeper() -> Any:
    program = "import time\ndef wait_here():\n    print(1, flush=True)\n    time.sleep(60)\nwait_here()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_stopped_process_is_ended_with_its_state_and_stack(sleeper: subprocess.Popen[bytes]) -> None:
    started = started_at(sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    while watchdog._facts(sleeper.pid)[0] != "T":
        time.sleep(0.01)
    ended = end_process(sleeper.pid, started, spy=True)
    assert ended is not None
    state, stack = ended
    assert state == "is stopped (SIGSTOP)"
    assert "wait_here" in stack
    assert sleeper.wait(10) == -signal.SIGKILL
    assert end_process(sleeper.pid, started, spy=False) is None, "it is gone"


def test_another_process_under_the_same_id_is_left_alone(sleeper: subprocess.Popen[bytes]) -> None:
    assert end_process(sleeper.pid, "1", spy=False) is None
    assert sleeper.poll() is None


STEPS = {"steps": 12, "save_every": 2, "eval_every": 6}


def hang_once(marker: Path, rank: int, hang: Callable[[], None]) -> Any:
    """The worker of a run in which a rank hangs in its sixth step, the first time."""

    def worker(config: dict[str, Any]) -> dict[str, Any] | None:
        from raymem.cluster.train.worker import train_worker
        from raymem.training import loop
        from raymem.training.step import train_step as original

        def train_step(*arguments: Any, **options: Any) -> Any:
            if arguments[4] == 5 and int(os.environ["RANK"]) == rank and not marker.exists():
                marker.touch()
                hang()
            return original(*arguments, **options)

        loop.train_step = train_step  # type: ignore[attr-defined]
        return train_worker(config)

    return worker


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)  # other threads may be stopped first, and this one go on for a moment


def wait_for_what_never_comes() -> None:
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "hang", "state"),
    [(1, stop_this_process, "stopped (SIGSTOP)"), (0, wait_for_what_never_comes, "running")],
    ids=["stopped", "waiting in Python"],
)
def test_one_of_two_is_named_and_the_run_goes_on(
    rank: int, hang: Callable[[], None], state: str, cluster: RayHead, llama: Path, examples: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("raymem.cluster.train.controller.train_worker", hang_once(tmp_path / "marker", rank, hang))
    scaling = {"num_workers": 2, "hang_timeout": "8s"}
    with caplog.at_level(logging.WARNING, logger="raymem"):
        finished = launch(ray_recipe(llama, examples, tmp_path, "hung", scaling=scaling, train=STEPS))
    assert finished.outcome.started_at > 0
    (warning,) = [record.getMessage() for record in caplog.records if "hangs" in record.getMessage()]
    assert warning.startswith(f"rank {rank} on node ")
    assert f"the other ranks wait for it, and its process is {state}; the process is killed" in warning
    assert hang.__name__ in warning, "its stack"
    untouched = ray_recipe(llama, examples, tmp_path, "untouched", train=STEPS)
    expected = in_processes(train_here, 2, tmp_path / "meet", untouched)[0]
    assert losses(tmp_path / "hung") == expected
    assert result_bytes(tmp_path / "hung") == result_bytes(tmp_path / "untouched")


@pytest.mark.slow
def test_a_run_without_restarts_ends_with_what_hung(
    cluster: RayHead, llama: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = hang_once(tmp_path / "marker", 0, wait_for_what_never_comes)
    monkeypatch.setattr("raymem.cluster.train.controller.train_worker", worker)
    scaling = {"num_workers": 1, "hang_timeout": "8s", "max_failures": 0}
    with pytest.raises(ClusterError) as refused:
        launch(ray_recipe(llama, examples, tmp_path, "ended", scaling=scaling, train=STEPS))
    message = str(refused.value)
    assert message.startswith(
        "scaling: the workers failed 1 time, one more than scaling.max_failures=0 allows, at last rank 0 on node "
    )
    assert "hangs: no progress for scaling.hang_timeout=8 s after it began step 6, and its process is run" in message
    assert "; the last checkpoint is kept: run the same command again" in message

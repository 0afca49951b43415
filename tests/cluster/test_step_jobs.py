"""The order in which the steps of a job are given out; a Ray that starts is not needed for that."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import ray

from raymem.cluster import step_jobs
from raymem.cluster.step_jobs import _Left, _Nodes


@dataclass(frozen=True)
class Step:
    name: str
    after: tuple[str, ...] = ()


def names(steps: list[Step]) -> list[str]:
    return [step.name for step in steps]


def test_a_step_is_given_out_once_all_before_it_are_done() -> None:
    steps = [Step("a"), Step("b", ("a",)), Step("c"), Step("d", ("b", "c")), Step("e", ("gone",))]
    left = _Left(steps)
    assert names(left.take(2)) == ["a", "c"], "in their order, no more than asked for"
    assert names(left.take(9)) == ["e"], "what it waits for was done before"
    assert names(left.take(9)) == []
    left.done(steps[2])
    assert names(left.take(9)) == []
    left.done(steps[0])
    assert names(left.take(9)) == ["b"] and left.count == 3
    left.done(steps[1])
    assert names(left.take(9)) == ["d"]
    for step in (steps[3], steps[4]):
        left.done(step)
    assert left.count == 0


def test_those_that_come_first_go_first() -> None:
    steps = [Step("first"), Step("second", ("first",)), *(Step(f"other-{number}") for number in range(3))]
    left = _Left(steps)
    assert names(left.take(2)) == ["first", "other-0"]
    left.done(steps[0])
    assert names(left.take(9)) == ["second", "other-1", "other-2"]


def test_thousands_in_a_row() -> None:
    steps = [Step(str(number), (str(number - 1),) if number else ()) for number in range(20_000)]
    left = _Left(steps)
    for step in steps:
        assert left.take(8) == [step]
        left.done(step)
    assert not left.count


def test_nodes_that_come_are_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cluster = [{"Alive": True, "Resources": {"memory": 5.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: cluster)
    nodes = _Nodes("pruning")
    nodes.look()
    assert (nodes.window, nodes.most_memory) == (2, 5), "enough for an autoscaler to see"
    assert "pruning waits: no node of the cluster has CPU cores for its tasks" in caplog.text
    cluster += [{"Alive": True, "Resources": {"CPU": 8.0, "memory": 9.0}}, {"Alive": False, "Resources": {"CPU": 99.0}}]
    nodes.look()
    assert nodes.window == 2, "not at every step"
    monkeypatch.setattr(step_jobs, "_LOOK_EVERY_S", 0.0)
    nodes.look()
    assert (nodes.window, nodes.most_memory) == (16, 9) and caplog.text.count("waits") == 1

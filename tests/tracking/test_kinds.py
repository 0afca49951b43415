"""Every kind of tracking has an implementation that is one, and is imported only on use."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import TrackingError
from raymem.recipe.axes import TRACKERS
from raymem.tracking import RunStart, Tracker, start_tracking
from raymem.tracking.tracker import TrackingResult
from tests.helpers import toy_kinds


def methods(cls: Any) -> dict[str, list[str]]:
    """Public name -> names of its parameters; none for a property."""
    members = inspect.getmembers(cls, lambda member: inspect.isroutine(member) and not inspect.isbuiltin(member))
    return {name: list(inspect.signature(member).parameters) for name, member in members if not name.startswith("_")}


@pytest.mark.parametrize("name", TRACKERS)
def test_an_implementation_has_what_is_asked_for(name: str) -> None:
    tracker, asked = TRACKERS[name].load(), methods(Tracker)
    assert {"start", "check", "log", "finish"} == set(asked)
    assert {method: parameters for method, parameters in methods(tracker).items() if method in asked} == asked
    result = typing.get_type_hints(tracker.finish)["return"]
    fields = {*dir(result), *getattr(result, "__dataclass_fields__", {})}
    assert {member for member in dir(TrackingResult) if not member.startswith("_")} <= fields


def test_reading_a_recipe_imports_no_tracker() -> None:
    program = (
        "import sys; from raymem.recipe.load import recipe_of\n"
        "recipe_of({'name': 'r', 'model': {'name': 'demo'}, 'data': {'train': 'demo:text'}, 'train': {'steps': 1}})\n"
        "print(sorted({'mlflow', 'torch', 'raymem.tracking.mlflow.tracker'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def lines() -> Iterator[None]:
    """A tracker from outside, which writes lines into a file."""
    TRACKERS.register(toy_kinds.LinesKind)
    yield
    TRACKERS.unregister("toy_lines")


def started(path: Path) -> RunStart:
    return RunStart({"name": "r", "tracking": {"kind": "toy_lines", "file": str(path)}}, "/x", resume=False)


@pytest.mark.usefixtures("lines")
def test_a_tracker_from_outside_that_fails_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start_tracking(started(tmp_path / "lines.jsonl"))
    tracker.log([{"step": 1.0, "loss": 2.0}])
    with monkeypatch.context() as patch:
        patch.setattr(toy_kinds.LinesTracker, "log", lambda self, rows: 1 / 0)
        tracker.log([{"step": 2.0, "loss": 2.0}])
        tracker.log([{"step": 3.0, "loss": 2.0}])
    assert len(caplog.messages) == 1, "said once"
    result = tracker.finish("FINISHED")
    assert result.run_id == tracker.run_id
    assert result.problem == caplog.messages[0]
    assert result.problem.startswith("tracking: toy_lines failed: ZeroDivisionError: division by zero")


@pytest.mark.usefixtures("lines")
def test_a_tracker_from_outside_that_cannot_start_is_an_error_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_kinds.LinesTracker, "start", lambda start: 1 / 0)
    with pytest.raises(TrackingError, match="toy_lines cannot be used: ZeroDivisionError: division by zero; mend it"):
        start_tracking(started(tmp_path / "lines.jsonl"))

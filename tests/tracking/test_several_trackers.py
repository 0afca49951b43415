"""Several tracking systems at once: each gets everything, and one that cannot start ends the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import RecipeError, TrackingError
from raymem.recipe.axes import TRACKERS
from raymem.recipe.load import recipe_of, recipe_schema
from raymem.tracking import RunStart, Tracker, check_tracking, start_tracking
from tests.helpers import toy_kinds

RAW: dict[str, Any] = {
    "name": "r", "model": {"name": "demo"}, "data": {"train": "demo:text"}, "train": {"steps": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _lines() -> Iterator[None]:
    TRACKERS.register(toy_kinds.LinesKind)
    yield
    TRACKERS.unregister("toy_lines")


def start(tmp_path: Path, *kinds: Any, parent: str | None = None) -> Tracker:
    recipe = recipe_of({**RAW, "tracking": list(kinds)})
    return start_tracking(RunStart(recipe.to_dict(), str(tmp_path), resume=False, parent_run_id=parent))


def lines(name: str, tmp_path: Path) -> dict[str, Any]:
    return {"kind": "toy_lines", "file": str(tmp_path / name)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_gets_everything(tmp_path: Path) -> None:
    tracker = start(tmp_path, lines("a", tmp_path), "none", lines("b", tmp_path))
    tracker.log([{"step": 1.0, "loss": 2.0}])
    result = tracker.finish("FINISHED", {"adapter": tmp_path}, model="adapter")
    expected = [{"step": 1.0, "loss": 2.0}, {"status": "FINISHED", "artifacts": ["adapter"]}]
    assert read(tmp_path / "a") == read(tmp_path / "b") == expected
    assert tracker.run_id == result.run_id == f"{tmp_path}/a,,{tmp_path}/b"
    assert result.summary_lines() == [f"tracked in {tmp_path}/a", f"tracked in {tmp_path}/b"]


def test_one_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start(tmp_path, lines("a", tmp_path), lines("gone", tmp_path))
    write = toy_kinds.LinesTracker.log
    monkeypatch.setattr(
        toy_kinds.LinesTracker, "log", lambda self, rows: 1 / 0 if self.run_id.endswith("gone") else write(self, rows)
    )
    tracker.log([{"step": 1.0, "loss": 2.0}])
    problem = tracker.finish("FINISHED").problem
    assert problem is not None and problem.startswith("tracking: toy_lines failed: ZeroDivisionError")
    assert read(tmp_path / "a")[0] == {"step": 1.0, "loss": 2.0}


def test_one_that_cannot_start_ends_those_before_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match=r"tracking\.directory"):
        start(tmp_path, lines("a", tmp_path), {"kind": "tensorboard", "directory": str(tmp_path / "file")})
    assert read(tmp_path / "a") == [{"status": "FAILED", "artifacts": []}]


def test_each_child_knows_its_own_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents: list[str | None] = []
    begin = toy_kinds.LinesTracker.start

    def noting(start: RunStart) -> Any:
        parents.append(start.parent_run_id)
        return begin(start)

    monkeypatch.setattr(toy_kinds.LinesTracker, "start", noting)
    start(tmp_path, lines("a", tmp_path), "none", lines("b", tmp_path), parent="one,,three")
    start(tmp_path, lines("a", tmp_path), lines("b", tmp_path))
    assert parents == ["one", "three", None, None]


def test_doctor_looks_at_each(tmp_path: Path) -> None:
    tracking = recipe_of({**RAW, "tracking": ["none", "tensorboard"]}).to_dict()["tracking"]
    report = check_tracking(tracking, str(tmp_path))
    assert report == f"none: not wanted by this recipe; tensorboard: events in {tmp_path}/tensorboard"


def test_a_list_in_a_recipe(tmp_path: Path) -> None:
    recipe = recipe_of({**RAW, "tracking": ["mlflow", {"kind": "tensorboard", "directory": "logs"}]})
    assert type(recipe).model_validate(recipe.to_dict()) == recipe
    assert recipe.tracking.trackers[1].directory == str(Path.cwd() / "logs")
    changed = recipe_of({**RAW, "tracking": ["mlflow", "tensorboard"]}, ["tracking.1.directory=/x"])
    assert changed.tracking.trackers[1].directory == "/x"
    array = recipe_schema()["$defs"]["Tracking"]["anyOf"][-1]
    assert array["type"] == "array" and {"$ref": "#/$defs/MlflowTracking"} in array["items"]["anyOf"]


@pytest.mark.parametrize(
    ("tracking", "message"),
    [
        ([], r"tracking\.trackers: \[\] is refused: it names no kind, .*; name one or more, or set tracking: none"),
        (["mlflo"], r"tracking\[0\]\.kind: 'mlflo' is not one of .*did you mean 'mlflow'"),
        (["none", {"kind": "wandb", "mode": "on"}], r"tracking\[1\]\.mode: 'on' is not one of online, offline"),
        ([["none"]], "tracking: a list within a list; write one list"),
        ({"kind": "several", "trackers": [{"uri": 5}]}, r"tracking\.trackers\[0\]\.uri: 5: input should be a valid"),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_list_is_said_with_its_place(tracking: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of({**RAW, "tracking": tracking})

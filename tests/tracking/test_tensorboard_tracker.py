"""TensorBoard event files, as TensorBoard itself reads them where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import TrackingError
from raymem.tracking import RunStart, Tracker, check_tracking, start_tracking
from tests.helpers.tracking import written


def start(storage: Path | str, *, resume: bool = False, directory: str | None = None) -> Tracker:
    tracking = {"kind": "tensorboard", "directory": directory}
    recipe = {"name": "run1", "train": {"steps": 30}, "tracking": tracking}
    return start_tracking(RunStart(recipe, str(storage), resume))


def rows(*steps: int, value: float = 1.0) -> list[dict[str, Any]]:
    return [{"step": step, "loss": value * step} for step in steps]


def test_a_killed_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.log(rows(1, 2, 3))
    (events,) = (tmp_path / "tensorboard" / "run1").glob("events*")
    events.write_bytes(events.read_bytes()[:-5])  # the kill has cut what was being written
    second = start(tmp_path, resume=True)
    second.log(rows(1, 2))  # the history so far, and what is trained again
    second.log([*rows(3, 4), {"step": 4, "lr": 0.5}])
    second.log(rows(1, 2, 3, 4))
    result = second.finish("FINISHED")
    assert written(events.parent) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert result.problem is None and result.hint == f"look at the curves: tensorboard --logdir {tmp_path}/tensorboard"
    assert result.summary_lines() == [f"TensorBoard run run1 in {tmp_path}/tensorboard"]


def test_tensorboard_shows_each_step_once_and_drops_what_was_begun_anew(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install 'raymem[tensorboard]'"
    )
    for resume, steps, value in ((False, (1, 2, 3), 9.0), (False, (1, 2), 1.0), (True, (2, 3), 1.0)):
        tracker = start(tmp_path, resume=resume)
        tracker.log(rows(*steps, value=value))
        tracker.finish("FINISHED")
    shown = accumulators.EventAccumulator(str(tmp_path / "tensorboard" / "run1"))
    shown.Reload()
    assert [(point.step, point.value) for point in shown.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    text = shown.Tensors("recipe/text_summary")[-1]
    assert b"steps: 30" in text.tensor_proto.string_val[0]


def test_what_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match=r"tracking\.directory: .*mend that, or set tracking\.directory"):
        start(tmp_path, directory=str(tmp_path / "file" / "below"))
    with pytest.raises(TrackingError, match=r"event files grow step by step, which storage\.path s3://b/c\S* does not"):
        start("s3://b/c?region=us-east-1", directory=None)
    with pytest.raises(TrackingError, match=r"tracking\.directory: s3://b/c is no directory of this machine"):
        start(tmp_path, directory="s3://b/c")


def test_a_missing_library_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(TrackingError, match=r"needs tensorboardX, .*pip install 'raymem\[tensorboard\]'"):
        start(tmp_path)


def test_a_disk_that_fails_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboardX import SummaryWriter

    tracker = start(tmp_path)
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *args: 1 / 0)
    tracker.log(rows(1))
    monkeypatch.undo()
    problem = tracker.finish("FINISHED").problem
    assert problem is not None and problem.startswith("tracking: tensorboard failed: ZeroDivisionError")


def test_doctor_says_where_events_will_be(tmp_path: Path) -> None:
    options = {"kind": "tensorboard", "directory": None}
    assert check_tracking(options, str(tmp_path)) == f"events in {tmp_path}/tensorboard"
    assert not list(tmp_path.iterdir())

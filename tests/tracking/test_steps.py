"""Each step of a metric passes once."""

from __future__ import annotations

from raymem.tracking.steps import NewSteps


def test_a_step_passes_once_and_values_that_are_no_numbers_never() -> None:
    steps = NewSteps({"loss": 3})
    rows = [{"step": s, "loss": 1.0, "lr": 2, "note": "text", "flag": True} for s in (3, 4)]
    assert list(steps.of(rows)) == [(3, {"lr": 2.0}), (4, {"loss": 1.0, "lr": 2.0})]
    assert not list(steps.of(rows))
    assert list(steps.of([{"step": 4.0, "late": 1}])) == [(4, {"late": 1.0})]


def test_a_system_that_only_knows_its_next_step() -> None:
    assert list(NewSteps(below=5).of([{"step": s, "loss": 1.0} for s in (4, 5)])) == [(5, {"loss": 1.0})]

"""The gate of a sweep: what is refused, why, and at what cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raymem.errors import RecipeError
from raymem.memory import Tracer
from raymem.planner import prediction_error
from raymem.planner.admission import AdmissionController, Admit, Reject
from raymem.planner.analytic import closed_form
from raymem.planner.process import Planner
from raymem.planner.subprocess_main import answer
from raymem.planner.tracing.step_trace import planned_model
from raymem.planner.types import Plan, Target
from raymem.recipe.schema import Recipe
from tests.helpers.planner_cases import case
from tests.helpers.support import make_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planned_here: None) -> None:
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))


def changed(**sections: Any) -> Recipe:
    return make_recipe(case("lora").to_dict(), sections)


@pytest.fixture
def peak() -> int:
    with Planner() as planner:
        return planner.plan(case("lora")).peak_bytes


def test_the_budget_decides_to_the_byte(peak: int) -> None:
    with AdmissionController(peak) as gate:
        assert gate.judge(case("lora")) == Admit(gate.planner.plan(case("lora")).step_peak_bytes, peak)
    with AdmissionController(peak - 1) as gate:
        refused = gate.judge(case("lora"))
    assert isinstance(refused, Reject) and refused.needed_bytes == peak
    assert refused.excess == pytest.approx(1 / (peak - 1)) and "a step is predicted to take" in refused.reason


def test_what_is_larger_in_every_way_needs_no_plan(peak: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with AdmissionController(peak - 1) as gate:
        gate.judge(case("lora"))

        def refuse(*arguments: Any) -> None:
            raise AssertionError("planned")

        monkeypatch.setattr(gate.planner, "plan_within", refuse)
        rank = case("lora").to_dict()["adapter"]["rank"]
        larger = gate.judge(changed(adapter={"rank": 2 * rank}, optimizer={"lr": 0.3}))
        assert isinstance(larger, Reject) and larger.reason.startswith("as large as another")
        for other in (changed(adapter={"rank": rank - 1}), changed(activations="checkpoint")):
            with pytest.raises(AssertionError, match="planned"):
                gate.judge(other)


def test_what_was_planned_before_needs_no_process(peak: int) -> None:
    with AdmissionController(peak) as first:
        judged = first.judge(case("lora"))
    with AdmissionController(peak) as second:
        assert second.judge(changed(optimizer={"lr": 0.3})) == judged
        assert not second.planner.is_running


def test_it_can_be_made_ready_before_it_judges(peak: int) -> None:
    with AdmissionController(peak) as gate:
        gate.warm_up(case("lora"))
        assert gate.planner.is_running, "although the plan was known"
        gate.warm_up(make_recipe(model="nobody/nothing"))


def test_the_closed_forms_of_an_unknown_optimizer_are_nobody_elses() -> None:
    """The gate refuses on them before anything is traced."""
    recipe = case("lora")
    unknown = recipe.model_copy(update={"optimizer": SimpleNamespace(kind="new")})
    with pytest.raises(RecipeError, match="'new' is not registered"):
        closed_form(unknown, Target.of(recipe), planned_model(recipe))


def test_closed_forms_refuse_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracer, "__enter__", None)  # what would begin one
    with AdmissionController(1000) as gate:
        refused = gate.judge(case("lora"))
    assert isinstance(refused, Reject) and "alone take" in refused.reason


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lora", {}),
        ("loract layer", {}),
        ("moram fast", {"adapter": {"criterion": "gradient"}}),
        ("mlorc in backward", {}),
        ("lora", {"scaling": {"num_workers": 2, "strategy": "ddp"}}),
        ("lora", {"scaling": {"num_workers": 2, "strategy": "fsdp2"}}),
        ("lora", {"scaling": {"use_gpu": True}}),
    ],
    ids=str,
)
def test_a_trace_ends_with_the_phase_that_is_above(name: str, changes: dict[str, Any]) -> None:
    """A plan is refused early exactly if it is above the limit, by the figure that it would have had."""
    recipe = make_recipe(case(name).to_dict(), {"train": {"global_batch": 2}}, changes)
    job = {"recipe": recipe.to_dict(), "gpu": None, "rows": None, "problem": None}
    plan = Plan(**answer(job)["plan"])
    least = plan.peak_bytes + plan.outside_bytes
    above = answer({**job, "limit_bytes": least - 1})["above"]
    assert above == {"at_least_bytes": least, "phase": max(plan.phases, key=lambda p: plan.phases[p]["peak_bytes"])}
    within = Plan(**answer({**job, "limit_bytes": least})["plan"])
    assert dataclasses.replace(within, seconds=plan.seconds) == plan


def test_a_run_above_its_prediction_makes_the_gate_narrower(peak: int) -> None:
    prediction_error.record(case("lora"), 1000, 900)
    with AdmissionController(peak) as gate:
        assert isinstance(gate.judge(case("lora")), Admit), "a run below its prediction is no reason to admit less"
    prediction_error.record(case("lora"), 1000, 1100)
    with AdmissionController(peak) as gate:
        refused = gate.judge(case("lora"))
        assert isinstance(refused, Reject) and refused.needed_bytes == int(peak * 1.1)
        assert isinstance(gate.judge(changed(activations="checkpoint")), Admit), "another method, another record"


def test_what_cannot_be_planned_is_refused_with_its_reason() -> None:
    with AdmissionController(1 << 40) as gate:
        refused = gate.judge(make_recipe(model="nobody/nothing"))
    assert isinstance(refused, Reject) and refused.needed_bytes is None and "nobody/nothing" in refused.reason

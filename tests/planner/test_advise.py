"""What is proposed where a recipe does not fit: nothing that is set, what keeps the result first, costs beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from raymem.errors import RecipeError
from raymem.memory.trace import CATEGORIES
from raymem.planner import advise, process
from raymem.planner.advise import Tried
from raymem.planner.help import changes, would_help
from raymem.planner.process import Planner
from raymem.planner.types import Above, Plan
from raymem.recipe.axes import all_kinds
from raymem.recipe.load import recipe_of
from raymem.recipe.schema import Recipe
from tests.helpers.planner_cases import CHECKPOINT, FULL, case
from tests.helpers.support import make_recipe

BF16: dict[str, Any] = {"train": {"precision": "bf16"}}


def overrides_of(recipe: Recipe) -> list[str]:
    return [change.override for change in changes(recipe)]


def test_changes_that_are_set_already_are_not_proposed() -> None:
    plain = make_recipe(FULL, {"optimizer": {"implementation": "foreach"}}, {"loss": "full"})
    proposed = overrides_of(plain)
    for override in ("train.micro_batch=1", "activations=checkpoint", "optimizer.implementation=fused", "loss=auto"):
        assert override in proposed
        followed = recipe_of(plain.to_dict(), [override], resolve=False)
        assert override not in overrides_of(followed)
        for term in CATEGORIES:
            assert override not in would_help(term, followed)
    assert "optimizer.implementation=fused" not in would_help("workspace", make_recipe(FULL)), "it is the default"


def test_changes_that_a_rule_refuses_are_not_proposed() -> None:
    assert "optimizer=mlorc_adamw" in overrides_of(make_recipe(FULL))
    assert not any("mlorc" in override for override in overrides_of(make_recipe()))
    assert not any("adapter" in override for override in overrides_of(make_recipe()))


def test_half_the_row_length_is_proposed_as_a_number() -> None:
    assert "data.sequence_length=256" in would_help("activations", make_recipe({"data": {"sequence_length": 512}}))
    assert not any("sequence_length" in one for one in would_help("activations", make_recipe()))


def test_what_keeps_the_result_comes_first() -> None:
    exactness = [change.exact for change in changes(make_recipe(FULL, {"data": {"sequence_length": 512}}))]
    assert exactness == sorted(exactness, reverse=True) and {True, False} == set(exactness)


def test_every_kind_says_what_its_advice_costs_in_time() -> None:
    advice = [item for kind in all_kinds() for item in kind.advice()]
    assert advice and all(item.time != "not known" for item in advice)


def plan_of(capacity_bytes: int, terms: dict[str, int]) -> Plan:
    whole = dict.fromkeys(CATEGORIES, 0) | terms
    return Plan(
        device="cpu", gpu=None, num_workers=1, traced=True, note=None, peak_bytes=capacity_bytes,
        step_peak_bytes=capacity_bytes, terms=whole, term_peaks=whole, phases={}, state={},
        reserved_bytes=capacity_bytes, capacity_bytes=capacity_bytes, expandable_bytes=capacity_bytes, outside_bytes=0,
        top=[], timeline=[],
    )  # fmt: skip


class Bench:
    """A recipe to be made smaller, where planning is a formula instead of a process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: Recipe, needed: Callable[[Recipe], int]) -> None:
        self.base, self.planned, self.lines = base, set[str](), list[str]()
        lock = threading.Lock()
        bench = self

        class Formula:
            def __init__(self, gpu: str | None) -> None: ...

            def __exit__(self) -> None: ...

            def abandon(self) -> None: ...

            def plan_within(self, recipe: Recipe, limit_bytes: int) -> Plan | Above:
                with lock:
                    bench.planned.add(recipe.activations.kind)
                size = needed(recipe)
                return Above(size, "forward") if size > limit_bytes else plan_of(size, {"activations": size})

        monkeypatch.setattr(advise, "Planner", Formula)

    def load(self, more: Sequence[str]) -> Recipe:
        return recipe_of(self.base.to_dict(), more, resolve=False)

    def advise(self, budget_bytes: int, plan: Plan) -> list[Tried]:
        return advise.advise(self.load, plan, budget_bytes, report=self.lines.append)


def small(recipe: Recipe) -> int:
    """80 bytes a row; a half with checkpointing, a third with LoRAct."""
    return 80 * recipe.train.rows_per_pass // {"none": 1, "checkpoint": 2, "loract": 3}[recipe.activations.kind]


def test_advice_has_exact_changes_first_and_reports_all(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, make_recipe(BF16, {"train": {"micro_batch": 2}}), small)
    found = bench.advise(80, plan_of(160, {"activations": 160}))
    assert {one.overrides for one in found[:2]} == {("train.micro_batch=1",), ("activations=checkpoint",)}
    assert [(one.is_exact, one.needed_bytes) for one in found] == [(True, 80), (True, 80), (False, 53)]
    assert found[2].overrides == ("activations=loract",)
    assert sorted(bench.lines) == [
        "activations=checkpoint: needs 80 B, fits", "activations=loract: needs 53 B, fits",
        "train.micro_batch=1: needs 80 B, fits",
    ]  # fmt: skip


def test_exact_changes_are_combined_before_the_result_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, make_recipe(BF16, {"train": {"micro_batch": 2}}), small)
    found = bench.advise(55, plan_of(160, {"activations": 160}))
    assert {frozenset(one.overrides) for one in found if one.is_exact} == {
        frozenset({"activations=checkpoint", "train.micro_batch=1"})
    }
    assert [one.is_exact for one in found] == [True, False]
    assert any(line.endswith("does not fit") for line in bench.lines)


def test_approximate_changes_are_combined_where_nothing_else_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, make_recipe(BF16, {"train": {"micro_batch": 2}}), small)
    found = bench.advise(30, plan_of(160, {"activations": 160}))
    assert [(set(one.overrides), one.is_exact) for one in found] == [
        ({"activations=loract", "train.micro_batch=1"}, False)
    ]
    assert bench.advise(1, plan_of(160, {"activations": 160})) == []


def test_what_cannot_be_enough_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, make_recipe(BF16, {"train": {"micro_batch": 1}}), small)
    found = bench.advise(100, plan_of(160, {"activations": 10, "weights": 150}))
    assert [one.overrides for one in found] == [("base.quantize=nf4",)]
    assert bench.planned == {"none"}


def test_changes_none_of_which_can_be_enough_alone_are_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, make_recipe(BF16, {"train": {"micro_batch": 2}}), small)
    found = bench.advise(55, plan_of(160, {"activations": 80, "weights": 80}))
    assert any(set(one.overrides) == {"activations=checkpoint", "train.micro_batch=1"} for one in found)


def test_an_interrupted_search_ends_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that waits for a plan gets an error, and no second process is started for it."""
    started: list[Any] = []

    class Waiting:
        def __init__(self) -> None:
            self.ended = threading.Event()
            started.append(self)

        def ask(self, job: Any, timeout_s: float) -> None:
            assert self.ended.wait(30)

        def kill(self) -> None:
            self.ended.set()

        def close(self) -> int:
            return -9

    monkeypatch.setattr(process, "PlannerProcess", Waiting)
    monkeypatch.setattr(process, "_known", lambda file: None)

    planner = Planner()
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            planner.plan(case("lora"))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not started:
        time.sleep(0.01)
    planner.abandon()
    thread.join(30)
    assert len(started) == 1 and "given up" in str(outcome[0])


def test_a_refused_combination_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, make_recipe(BF16, {"train": {"micro_batch": 2}}), small)
    read = bench.load

    def load(more: Sequence[str]) -> Recipe:
        if "activations=checkpoint" in more:
            raise RecipeError("not here")
        return read(more)

    bench.load = load  # type: ignore[method-assign]
    assert not any("checkpoint" in one for tried in bench.advise(80, plan_of(160, {"activations": 160}))
                   for one in tried.overrides)  # fmt: skip


def test_checkpointing_costs_more_where_backward_is_shorter() -> None:
    times = [
        next(change.time for change in changes(recipe) if change.override == "activations=checkpoint")
        for recipe in (make_recipe(), make_recipe(FULL))
    ]
    assert "1/2" in times[0] and "1/3" in times[1]
    assert "activations=checkpoint" not in overrides_of(make_recipe(CHECKPOINT))

"""``train.micro_batch: auto``."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymem.errors import RecipeError
from raymem.planner import Planner, choose_micro_batch
from raymem.planner.admission import AdmissionController, Reject
from raymem.planner.micro_batch import with_micro_batch
from tests.helpers.planner_cases import case
from tests.helpers.support import make_recipe

pytestmark = pytest.mark.usefixtures("planned_here")
ROWS = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_it_is_the_largest_that_fits(name: str) -> None:
    auto = make_recipe(case(name).to_dict(), {"train": {"micro_batch": "auto", "global_batch": ROWS}})
    told: list[str] = []
    with Planner() as planner:
        needs = {rows: planner.plan(with_micro_batch(auto, rows)).capacity_bytes for rows in (1, 2, 3, 4, 6, 12)}
    assert needs[1] < needs[2] < needs[3] < needs[4] < needs[6]
    for rows in (1, 3, 6):
        settled = choose_micro_batch(auto, budget_bytes=needs[rows], status=told.append)
        fitting = max(other for other, needed in needs.items() if needed <= needs[rows])
        assert settled.train.micro_batch == fitting and f"auto is {fitting} of {ROWS} rows" in told[-1]
        assert settled == with_micro_batch(auto, fitting)
    assert choose_micro_batch(auto, budget_bytes=1 << 40).train.micro_batch == ROWS
    assert choose_micro_batch(auto, budget_bytes=1).train.micro_batch == 1, "the verdict on that says what is wrong"


def test_the_recipes_budget_and_the_number_of_workers_count() -> None:
    several = {"scaling": {"num_workers": 3}, "train": {"micro_batch": "auto", "global_batch": ROWS}}
    auto = make_recipe(case("lora").to_dict(), several, {"budget": "1TiB"})
    assert choose_micro_batch(auto).train.micro_batch == ROWS // 3
    assert choose_micro_batch(case("lora")) == case("lora"), "a number stays"


def test_without_a_budget_there_is_nothing_to_fit_into() -> None:
    auto = make_recipe(case("lora").to_dict(), {"train": {"micro_batch": "auto"}})
    with pytest.raises(RecipeError, match=r"train.micro_batch: auto needs to know how much there is: set budget"):
        choose_micro_batch(auto)
    with AdmissionController(1 << 40) as gate:
        gate.warm_up(auto)  # sweeps may search over it
        refused = gate.judge(auto)
    assert isinstance(refused, Reject) and "search over it" in refused.reason
    with pytest.raises(RecipeError, match="'autoo'"):
        make_recipe({"train": {"micro_batch": "autoo"}})

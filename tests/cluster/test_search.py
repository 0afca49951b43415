"""The sampler of a sweep, without Ray: trials are answered by a formula."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray import cloudpickle
from ray.tune.search import Searcher
from support import make_recipe

from raymem.cluster import search as search_module
from raymem.cluster.search import BudgetedSearch, Objective, open_study, started
from raymem.cluster.sweep_report import best_of, best_recipe, pareto, rows_of, write_report
from raymem.planner.gate import Admitted, Judged, Refused
from raymem.training.recipe import Recipe
from raymem.training.recipe_io import load_recipe
from raymem.training.space_io import load_space

SPACE = {
    "adapter.rank": {"type": "int", "low": 1, "high": 64, "log": True},
    "optimizer.lr": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
}
BUDGET = 8000
RECIPE = make_recipe({"name": "search", "space": SPACE})


class RankGate:
    """A rank of 1 takes 1000 bytes."""

    budget_bytes = BUDGET

    def __init__(self) -> None:
        self.asked = 0

    def judge(self, recipe: Recipe) -> Judged:
        self.asked += 1
        needed = 1000 * recipe.adapter.rank  # type: ignore[union-attr]
        if needed > BUDGET:
            return Refused(f"takes {needed}", needed, needed / BUDGET - 1)
        return Admitted(needed, needed)


def loss(config: dict[str, Any]) -> float:
    """Best at rank 3 and a learning rate of 1e-3."""
    return 3 + abs(math.log(config["rank"] / 3)) + (math.log10(config["lr"]) + 3) ** 2


def begin(
    folder: Path, *, samples: int = 20, algorithm: str = "tpe", metrics: tuple[str, ...] = ("eval_loss",),
    recipe: Recipe = RECIPE,
) -> BudgetedSearch:  # fmt: skip
    def configure(number: int, recipe: Recipe, predicted: int, needed: int) -> dict[str, Any]:
        assert predicted == needed <= BUDGET
        return {"number": number, "rank": recipe.adapter.rank, "lr": recipe.optimizer.lr, "predicted": predicted}  # type: ignore[union-attr]

    objective = Objective(metrics)
    folder.mkdir(exist_ok=True)
    study = open_study(folder / "journal", objective, "search")
    space = load_space(None, recipe)
    gate: Any = RankGate()
    return BudgetedSearch(
        study, space, recipe, gate, objective, algorithm=algorithm, samples=samples, configure=configure
    )


def next_config(search: BudgetedSearch, trial_id: str) -> dict[str, Any] | None:
    while (found := search.suggest(trial_id)) is None:
        pass
    return None if found == Searcher.FINISHED else found  # type: ignore[return-value]


def finished(config: dict[str, Any]) -> dict[str, Any]:
    return {"status": "finished", "step": 10, "eval_loss": loss(config), "peak_bytes": config["predicted"]}


def run_all(search: BudgetedSearch, prefix: str = "t", most: int = 1000) -> list[dict[str, Any]]:
    configs = []
    while len(configs) < most and (config := next_config(search, f"{prefix}{len(configs)}")) is not None:
        search.on_trial_complete(f"{prefix}{len(configs)}", finished(config))
        configs.append(config)
    return configs


def test_nothing_that_does_not_fit_is_started_and_the_sampler_learns_where_that_is(tmp_path: Path) -> None:
    search, blind = begin(tmp_path / "tpe", samples=40), begin(tmp_path / "random", samples=40, algorithm="random")
    configs = run_all(search)
    run_all(blind)
    assert len(configs) == 40 and all(1000 * config["rank"] <= BUDGET for config in configs)
    trials = search.study.get_trials()
    refused = [trial for trial in trials if trial.user_attrs.get("status") == "refused"]
    assert refused and all(trial.constraints["budget"] > 0 for trial in refused)
    assert {trial.state for trial in refused} == {TrialState.PRUNED}
    refused_blindly = len(blind.study.get_trials()) - 40
    assert len(refused) < 0.7 * refused_blindly, "it asks for less that is refused than one that does not learn"
    best = min(configs, key=loss)
    assert 2 <= best["rank"] <= 4 and abs(math.log10(best["lr"]) + 3) < 0.5


@pytest.mark.parametrize("cut", [0, 3, 11])
def test_a_sweep_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path, cut: int) -> None:
    whole = run_all(begin(tmp_path / "whole"))
    parts = run_all(begin(tmp_path / "parts"), most=cut)
    interrupted = begin(tmp_path / "parts")
    under_way = next_config(interrupted, "dead")
    assert under_way is not None
    del interrupted  # nobody told it the end of "dead"
    search = begin(tmp_path / "parts")
    rest = run_all(search)
    assert rest[0] == under_way, "what was under way comes first, under its own number"
    assert parts + rest == whole
    assert all(trial.state.is_finished() for trial in search.study.get_trials())


def test_every_end_of_a_trial_is_told(tmp_path: Path) -> None:
    search = begin(tmp_path, samples=6)
    ends: list[tuple[dict[str, Any], bool]] = [
        ({"status": "infeasible", "measured_bytes": 9000, "problem": "out of memory"}, False),
        ({"status": "failed", "problem": "loss is not finite"}, False),
        ({"eval_loss": 5.0, "step": 5}, False),
        ({}, True),
    ]
    search.problems["3"] = "the process died"
    for index, (result, error) in enumerate(ends):
        assert next_config(search, str(index))
        if "step" in result:
            search.on_trial_result(str(index), result)
        search.on_trial_complete(str(index), result, error=error)
    assert next_config(search, "left")
    search.close()
    trials = [trial for trial in search.study.get_trials() if started(trial)]
    states = [trial.state for trial in trials]
    assert states == [TrialState.PRUNED, TrialState.FAIL, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert trials[0].constraints["budget"] == pytest.approx(9000 / BUDGET - 1)
    assert trials[2].intermediate_values == {5: 5.0} and not trials[2].constraints
    rows = [row for row in rows_of(search.study.get_trials()) if row.status != "refused"]
    assert [row.status for row in rows] == ["infeasible", "failed", "stopped", "crashed", "crashed"]
    assert rows[0].measured_bytes == 9000 and rows[1].problem == "loss is not finite"
    assert rows[3].problem == "the process died"


def test_a_point_is_not_trained_twice(tmp_path: Path) -> None:
    few = {"adapter.rank": {"type": "choice", "choices": [2, 4, 100]}}
    recipe = make_recipe({"name": "search", "space": few})
    search = begin(tmp_path, recipe=recipe)
    configs = run_all(search)
    assert sorted(config["rank"] for config in configs) == [2, 4]
    assert search.gave_up is not None and "had been trained before" in search.gave_up
    repeated = [trial for trial in search.study.get_trials() if "same_as" in trial.user_attrs]
    assert repeated and all(trial.state == TrialState.COMPLETE for trial in repeated)
    assert {row.point["adapter.rank"] for row in rows_of(search.study.get_trials())} == {2, 4, 100}


def test_a_grid_is_walked_once_also_over_a_kill(tmp_path: Path) -> None:
    few = {"adapter.rank": {"type": "choice", "choices": [2, 4, 100]}, "seed": {"type": "choice", "choices": [0, 1]}}
    recipe = make_recipe({"name": "search", "space": few})
    first = run_all(begin(tmp_path, recipe=recipe, algorithm="grid"), most=2)
    search = begin(tmp_path, recipe=recipe, algorithm="grid")
    configs = first + run_all(search)
    assert [config["rank"] for config in configs] == [2, 2, 4, 4] or sorted(c["rank"] for c in configs) == [2, 2, 4, 4]
    assert search.gave_up == "every point of the grid was tried"


def test_ray_tune_may_pickle_it_while_the_planner_runs(tmp_path: Path) -> None:
    search = begin(tmp_path)
    search._gate.process = threading.Lock()  # type: ignore[attr-defined]
    assert cloudpickle.loads(cloudpickle.dumps(search)).__dict__ == {}


def test_a_space_in_which_nothing_fits_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "PATIENCE", 20)
    recipe = make_recipe({"name": "search", "space": {"adapter.rank": {"type": "int", "low": 100, "high": 10**6}}})
    search = begin(tmp_path, recipe=recipe)
    assert run_all(search) == []
    assert search.gave_up == "20 proposals in a row were refused, or had been trained before"


@pytest.mark.parametrize("algorithm", ["tpe", "nsga2", "random"])
def test_several_objectives_give_a_front(tmp_path: Path, algorithm: str) -> None:
    search = begin(tmp_path, samples=25, algorithm=algorithm, metrics=("eval_loss", "peak_bytes"))
    run_all(search)
    rows = rows_of(search.study.get_trials())
    front = pareto(rows, ("eval_loss", "peak_bytes"))
    assert len({row.measured_bytes for row in front}) > 1, "more memory, less loss"
    assert [row.metrics["eval_loss"] for row in front] == sorted(row.metrics["eval_loss"] for row in front)
    for row in rows:
        if row.status == "finished" and row not in front:
            assert any(
                other.metrics["eval_loss"] <= row.metrics["eval_loss"]
                and (other.measured_bytes or 0) <= (row.measured_bytes or 0)
                for other in front
            )


def test_the_report_has_table_figure_and_a_recipe_to_train(tmp_path: Path) -> None:
    search = begin(tmp_path, samples=12)
    run_all(search)
    objective = Objective(("eval_loss",))
    rows = write_report(tmp_path / "report", search.study.get_trials(), RECIPE, objective, BUDGET)
    best = best_of(rows, objective)
    assert best is not None
    page = (tmp_path / "report" / "pareto.md").read_text()
    assert f"| {best.number} | {best.metrics['eval_loss']:.4f} |" in page and "12 finished" in page
    assert (tmp_path / "report" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    loaded = load_recipe(tmp_path / "report" / "best.yaml")
    assert loaded.adapter.rank == best.point["adapter.rank"] and loaded.name == "best"  # type: ignore[union-attr]
    assert loaded.optimizer.lr == best.point["optimizer.lr"] and loaded.space is None
    assert loaded.budget == f"{BUDGET}B"
    assert best_recipe(RECIPE, best, "eval_loss", BUDGET).startswith(
        f"# Trial {best.number} of sweep search: eval_loss"
    )

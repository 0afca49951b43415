"""The sampler of a sweep, without Ray: trials are answered by a formula."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray import cloudpickle
from ray.tune.search import Searcher

from raymem.memory.budget import bytes_text
from raymem.planner.admission import Admit, Decision, Reject
from raymem.recipe.load import load_recipe
from raymem.recipe.schema import Recipe
from raymem.recipe.space_load import load_space
from raymem.storage.storage import Storage
from raymem.sweeps import search as search_module
from raymem.sweeps.journal import open_study
from raymem.sweeps.options import Objective
from raymem.sweeps.report import best_of, best_recipe, pareto, rows_of, write_report
from raymem.sweeps.search import BudgetedSearch, started
from tests.helpers.support import make_recipe

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

    def judge(self, recipe: Recipe) -> Decision:
        self.asked += 1
        needed = 1000 * recipe.adapter.rank
        if needed > BUDGET:
            return Reject(f"takes {needed}", needed, needed / BUDGET - 1)
        return Admit(needed, needed)


def loss(config: dict[str, Any]) -> float:
    """Best at rank 3 and a learning rate of 1e-3."""
    return 3 + abs(math.log(config["rank"] / 3)) + (math.log10(config["lr"]) + 3) ** 2


def begin(
    folder: Path, *, samples: int = 20, algorithm: str = "tpe", metrics: tuple[str, ...] = ("eval_loss",),
    recipe: Recipe = RECIPE,
) -> BudgetedSearch:  # fmt: skip
    def configure(number: int, recipe: Recipe, predicted: int, needed: int) -> dict[str, Any]:
        assert predicted == needed <= BUDGET
        return {"number": number, "rank": recipe.adapter.rank, "lr": recipe.optimizer.lr, "predicted": predicted}

    objective = Objective(metrics)
    folder.mkdir(exist_ok=True)
    study = open_study(Storage.open(str(folder)), objective, "search")
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
    configs: list[dict[str, Any]] = []
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
    pruned, fail = TrialState.PRUNED, TrialState.FAIL
    assert states == [pruned, pruned, pruned, fail, fail], "TPE learns from all but those whose process died"
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
    by_number = {trial.number: trial for trial in search.study.get_trials()}
    assert all(trial.values == by_number[trial.user_attrs["same_as"]].values for trial in repeated)
    assert {row.point["adapter.rank"] for row in rows_of(search.study.get_trials())} == {2, 4, 100}


def test_a_point_that_is_being_trained_is_not_started_beside_itself(tmp_path: Path) -> None:
    few = {"adapter.rank": {"type": "choice", "choices": [2, 4]}}
    search = begin(tmp_path, recipe=make_recipe({"name": "search", "space": few}))
    one, two = next_config(search, "one"), next_config(search, "two")
    assert one is not None and two is not None and {one["rank"], two["rank"]} == {2, 4}
    assert next_config(search, "three") is None and search.gave_up
    search.on_trial_complete("one", finished(one))
    search.on_trial_complete("two", finished(two))
    assert sorted(row.status for row in rows_of(search.study.get_trials())) == ["finished", "finished"]


@pytest.mark.parametrize(
    ("result", "error", "again"),
    [
        ({"status": "infeasible", "measured_bytes": 9000}, False, False),
        ({"status": "failed"}, False, False),
        ({"eval_loss": 5.0, "step": 5}, False, False),
        ({}, True, True),
    ],
)
def test_only_a_trial_that_crashed_is_started_again(
    tmp_path: Path, result: dict[str, Any], error: bool, again: bool
) -> None:
    one = {"adapter.rank": {"type": "choice", "choices": [2]}}
    search = begin(tmp_path, samples=2, recipe=make_recipe({"name": "search", "space": one}))
    assert next_config(search, "first")
    if "step" in result:
        search.on_trial_result("first", result)
    search.on_trial_complete("first", result, error=error)
    assert (next_config(search, "second") is not None) == again
    first, *repeated = search.study.get_trials()
    assert bool(repeated) and again == ("same_as" not in repeated[0].user_attrs)
    if not again:
        assert {trial.state for trial in repeated} == {TrialState.PRUNED}
        assert repeated[0].constraints == first.constraints
        assert repeated[0].intermediate_values == first.intermediate_values


def test_what_was_interrupted_ends_even_if_fewer_samples_are_wanted_now(tmp_path: Path) -> None:
    search = begin(tmp_path, samples=3)
    begun = [next_config(search, str(index)) for index in range(3)]
    search = begin(tmp_path, samples=1)
    assert run_all(search) == begun
    assert all(trial.state.is_finished() for trial in search.study.get_trials())


def test_while_nothing_runs_one_call_is_enough(tmp_path: Path) -> None:
    """Ray Tune sleeps a second between two of them."""
    rare = {"adapter.rank": {"type": "int", "low": 1, "high": 100}}
    search = begin(tmp_path, algorithm="random", recipe=make_recipe({"name": "search", "space": rare}))
    assert isinstance(search.suggest("first"), dict)
    asked = len(search.study.get_trials())
    assert asked > 2, "the first ones were refused"
    search.suggest("second")
    assert len(search.study.get_trials()) <= asked + search_module.TRIES_PER_CALL, "the first one wants to be heard"


def test_a_grid_is_walked_once_also_over_a_kill(tmp_path: Path) -> None:
    few = {"adapter.rank": {"type": "choice", "choices": [2, 4, 100]}, "seed": {"type": "choice", "choices": [0, 1]}}
    recipe = make_recipe({"name": "search", "space": few})
    first = run_all(begin(tmp_path, recipe=recipe, algorithm="grid"), most=2)
    search = begin(tmp_path, recipe=recipe, algorithm="grid")
    configs = first + run_all(search)
    assert [config["rank"] for config in configs] == [2, 2, 4, 4] or sorted(c["rank"] for c in configs) == [2, 2, 4, 4]
    assert search.gave_up == "every point of the grid was tried"


@pytest.mark.parametrize("cut", ["while points are queued", "before a point is judged"])
def test_a_kill_loses_no_point_of_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    few = {"adapter.rank": {"type": "choice", "choices": [1, 2, 4]}, "optimizer.lr": SPACE["optimizer.lr"]}
    recipe = make_recipe({"name": "search", "space": few})
    queued = iter(range(4))
    enqueue = optuna.Study.enqueue_trial

    def dies(*given: Any) -> Any:
        if cut == "while points are queued" and next(queued, None) is not None:
            return enqueue(*given)
        raise KeyboardInterrupt

    def killed() -> None:
        owner, name = (optuna.Study, "enqueue_trial") if "queued" in cut else (BudgetedSearch, "_admit")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            run_all(begin(tmp_path, recipe=recipe, algorithm="grid"))

    with pytest.raises(KeyboardInterrupt):
        killed()
    search = begin(tmp_path, recipe=recipe, algorithm="grid")
    configs = run_all(search)
    assert len(configs) == 9 == len({(config["rank"], config["lr"]) for config in configs})
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
    assert "| trial | eval_loss | peak_bytes | predicted peak |" in page and "12 finished" in page
    assert f"| {best.number} | {best.metrics['eval_loss']:.4f} | {bytes_text(best.measured_bytes or 0)} |" in page
    assert (tmp_path / "report" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    loaded = load_recipe(tmp_path / "report" / "best.yaml")
    assert loaded.adapter.rank == best.point["adapter.rank"] and loaded.name == "best"
    assert loaded.optimizer.lr == best.point["optimizer.lr"] and loaded.space is None
    assert loaded.budget == f"{BUDGET}B"
    assert best_recipe(RECIPE, best, "eval_loss", BUDGET).startswith(
        f"# Trial {best.number} of sweep search: eval_loss"
    )


def test_the_front_is_that_of_all_objectives_and_of_memory(tmp_path: Path) -> None:
    """Neither the slowest nor the largest one is beaten by the best loss."""
    search = begin(tmp_path, samples=3, metrics=("eval_loss", "tokens_per_s"))
    for index, (value, speed, size) in enumerate([(1.0, 5.0, 3000), (2.0, 9.0, 4000), (3.0, 4.0, 2000)]):
        assert next_config(search, str(index))
        result = {"status": "finished", "eval_loss": value, "tokens_per_s": speed, "peak_bytes": size}
        search.on_trial_complete(str(index), result)
    write_report(tmp_path / "report", search.study.get_trials(), RECIPE, search.objective, BUDGET)
    page = (tmp_path / "report" / "pareto.md").read_text()
    assert "| trial | eval_loss | tokens_per_s | peak_bytes |" in page
    assert [line.split(" | ")[1] for line in page.splitlines()[4:]] == ["1.0000", "2.0000", "3.0000"]


def test_a_run_too_short_to_be_metered_has_a_best_recipe(tmp_path: Path) -> None:
    search = begin(tmp_path, samples=2)
    for index in range(2):
        assert next_config(search, str(index))
        search.on_trial_complete(str(index), {"status": "finished", "eval_loss": 2.0 - index})
    rows = write_report(tmp_path / "report", search.study.get_trials(), RECIPE, search.objective, BUDGET)
    best = best_of(rows, search.objective)
    assert best is not None and best.metrics == {"eval_loss": 1.0}
    assert (tmp_path / "report" / "best.yaml").read_text().startswith(f"# Trial {best.number} of sweep search: eval")

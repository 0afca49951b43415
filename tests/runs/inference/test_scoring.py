"""``train.score_every``: answers are judged beside the training, which is the same with it and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import ClusterError
from raymem.metrics import Score
from raymem.recipe.schema import Recipe
from raymem.runs.evaluate import evaluate_recipe
from raymem.runs.inference.scoring import Scoring
from raymem.runs.prepare import prepare_split
from raymem.runs.record import SCORES
from raymem.runs.resolve import resolve
from raymem.runs.train import launch
from raymem.storage.publish import seal
from raymem.training.artifacts.export import COPIES, copy_name
from raymem.training.evaluate import Evaluation
from tests.helpers.ray_processes import RayHead
from tests.helpers.support import make_recipe

NAME = "data.eval.sums/f1"


@pytest.fixture
def recipe(sums: Path, llama: Path, tmp_path: Path) -> Recipe:
    return make_recipe(
        {
            "data": {"train": str(sums), "eval": {"sums": {"path": str(sums), "metric": "f1"}}},
            "storage": {"path": str(tmp_path / "runs")},
            "train": {"steps": 4, "micro_batch": 2, "global_batch": 4, "score_every": 2, "save_every": 2},
            "scaling": {"num_workers": 1, "resources_per_worker": {"CPU": 1}},
        },
        model=llama,
    )


def losses(recipe: Recipe) -> list[float]:
    """Losses of a run, of each step once."""
    lines = Path(recipe.storage.path, recipe.name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_copies_are_judged_beside_the_training_and_the_result_at_its_end(cluster: RayHead, recipe: Recipe) -> None:
    said: list[str] = []
    finished = launch(recipe, status=said.append)
    folder = Path(recipe.storage.path, recipe.name)
    stored = json.loads((folder / SCORES).read_text())
    assert {"2", "4"} <= stored.keys() and finished.scores == stored["4"]
    assert finished.scores == {NAME: evaluate_recipe(recipe).result.judged[NAME]}
    assert not list((folder / COPIES).iterdir()), "copies are deleted when they are judged"
    assert any(text.startswith(f"step 2: {NAME} ") for text in said)
    plain = recipe.model_copy(update={"name": "plain", "train": recipe.train.model_copy(update={"score_every": None})})
    assert launch(plain).scores == {}
    assert losses(plain) == losses(recipe)


@dataclass
class Pending:
    """A task that ends when the test says so."""

    config: dict[str, Any]
    answer: Callable[[], Any] | None = None
    cancelled: bool = False

    def is_done(self) -> bool:
        return self.answer is not None

    def result(self) -> Any:
        assert self.answer is not None
        return self.answer()

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Beside:
    """A backend of which only the tasks beside a training are asked for."""

    tasks: list[Pending] = field(default_factory=list)

    def start(self, function: Any, config: dict[str, Any]) -> Pending:
        self.tasks.append(Pending(config))
        return self.tasks[-1]


def judged(value: float) -> Callable[[], Any]:
    where, metric = NAME.split("/")
    return lambda: (Evaluation(1.0, 1, scores=(Score(where, metric, value, 7),)), [])


def lost() -> Any:
    raise ClusterError("the work of one worker was lost")


def broken() -> Any:
    raise ValueError("code of a model\nwith more lines")


@pytest.fixture
def beside() -> Beside:
    return Beside()


@pytest.fixture
def logged() -> list[dict[str, float]]:
    return []


@pytest.fixture
def scoring(recipe: Recipe, beside: Beside, logged: list[dict[str, float]]) -> Scoring:
    run = resolve(recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update={"num_workers": 0})}))
    data = prepare_split(run, "eval")
    backend: Any = beside
    return Scoring(replace(run, recipe=recipe, backend=backend), data, logged.extend, lambda text: None)


def copy_at(recipe: Recipe, step: int) -> Path:
    """Write what a worker leaves after a step."""
    folder = Path(recipe.storage.path, recipe.name, copy_name(step))
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "raymem.json").write_text("{}")
    return folder


def test_a_task_that_is_lost_costs_a_warning(
    recipe: Recipe, scoring: Scoring, beside: Beside, logged: list[dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    copies = [copy_at(recipe, step) for step in (2, 4, 6)]
    scoring.listen([{"step": 1.0}, {"step": 2.0}])
    scoring.listen([{"step": 2.0}, {"step": 3.0}, {"step": 4.0}])  # a worker that began again tells a step twice
    assert [task.config["artifact"] for task in beside.tasks] == [str(copy / "adapter") for copy in copies[:2]]
    beside.tasks[0].answer = lost
    beside.tasks[1].answer = judged(0.25)
    scoring.listen([{"step": 6.0}])
    beside.tasks[2].answer = broken
    scoring.listen([])
    assert logged == [{"step": 4.0, NAME: 0.25}] and not any(copy.exists() for copy in copies)
    assert "the answers of step 2 could not be judged: the work of one worker was lost" in caplog.text
    assert "the answers of step 6 could not be judged: code of a model\n" in caplog.text


def test_a_run_that_goes_on_judges_what_was_left(
    recipe: Recipe, scoring: Scoring, beside: Beside, logged: list[dict[str, float]]
) -> None:
    left, kept, later = (copy_at(recipe, step) for step in (2, 4, 8))
    scores = {"4": {NAME: 0.5}, "6": {NAME: 0.75}}
    Path(recipe.storage.path, recipe.name, SCORES).write_text(json.dumps(seal(scores)))
    assert scoring.resume(5) == [{"step": 4.0, NAME: 0.5}]  # step 6 is taken again
    assert left.exists() and not kept.exists() and not later.exists()
    assert [task.config["artifact"] for task in beside.tasks] == [str(left / "adapter")]
    scoring.stop()
    assert beside.tasks[0].cancelled and left.exists(), "the next session judges it"


def test_a_run_that_starts_over_knows_no_scores(recipe: Recipe, scoring: Scoring) -> None:
    old = copy_at(recipe, 2)
    Path(recipe.storage.path, recipe.name, SCORES).write_text(json.dumps(seal({"2": {NAME: 0.5}})))
    assert scoring.resume(0) == [] and not old.exists()

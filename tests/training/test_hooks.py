"""A hook of anyone changes training by its own state, reports, survives a resume bit for bit, and is planned."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.hooks import Hook, RunView
from raymem.memory.meter import PeakMeter, resident_tensors
from raymem.planner.plan import make_plan
from raymem.planner.tracing import step_trace
from raymem.planner.types import Plan, Target
from raymem.recipe.schema import Recipe
from raymem.training import loop
from raymem.training.checkpoint import latest_manifest
from raymem.training.hooks import metrics_of, resume_hooks, states_of, view_of
from raymem.training.loop import Outcome
from raymem.training.model.build import build_model
from raymem.training.reporter import Row
from tests.helpers.planner_cases import case
from tests.helpers.support import column, make_recipe, random_batch, run_fragment, run_storage, train

WIDTH = 1024


class Pull(Hook):
    """Pulls trained weights towards zero, by more the higher the loss was before the steps so far."""

    name = "pull"

    def __init__(self, model: nn.Module) -> None:
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.total = 0.0

    def before_step(self, step: int, run: RunView) -> None:
        square = torch.ones(WIDTH, WIDTH)
        with torch.no_grad():
            losses = [run.loss(run.model, batch) for batch in run.batches(step)]
            noise = torch.rand(()) * (square @ square).mean() / WIDTH
            pull = 1 - 0.01 * (self.total + noise)
            for parameter in self.trained:
                parameter.mul_(pull)
        if not run.planned:
            self.total += float(sum(losses))

    def metrics(self, step: int) -> dict[str, float]:
        return {"pull": self.total}

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


@pytest.fixture
def pulling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe has the hook."""
    for module in (loop, step_trace):
        monkeypatch.setattr(module, "hooks_of", lambda recipe, model: [Pull(model)])
    monkeypatch.setattr(loop, "METERED_STEPS", ())


@pytest.fixture
def recipe_for(llama: Path, examples: Path, tmp_path: Path) -> Any:
    def make(run: str) -> Recipe:
        steps = {"train": {"steps": 5, "save_every": 2}, "adapter": {"dropout": 0.2}}
        return make_recipe(run_fragment(examples, tmp_path), {"name": run}, steps, model=llama)

    return make


def stopped_and_resumed(recipe: Recipe) -> tuple[Outcome | None, list[Row]]:
    _, first = train(recipe, stop_after=3)
    outcome, second = train(recipe)
    return outcome, first + second


def test_its_state_survives_a_resume_bit_for_bit(recipe_for: Any, pulling: None) -> None:
    _, rows = train(recipe_for("straight"))
    outcome, again = stopped_and_resumed(recipe_for("stopped"))
    assert outcome is not None and outcome.started_at == 2
    for name in ("loss", "grad_norm", "pull"):
        assert column(again, name) == column(rows, name)
    assert len(set(column(rows, "pull"))) == 5
    manifest = latest_manifest(run_storage(recipe_for("stopped")))
    assert manifest is not None and manifest.hooks == {"pull": {"total": rows[-1]["pull"]}}


def test_it_changes_training(recipe_for: Any, pulling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rows = train(recipe_for("with"))
    monkeypatch.setattr(Pull, "load_state_dict", lambda self, state: None)
    _, forgetful = stopped_and_resumed(recipe_for("forgetful"))
    assert column(forgetful)[:2] == column(rows)[:2]
    assert column(forgetful)[2:] != column(rows)[2:]
    monkeypatch.setattr(loop, "hooks_of", lambda recipe, model: [])
    _, without = train(recipe_for("without"))
    assert column(without)[1:] != column(rows)[1:]


def plan_of(recipe: Recipe) -> Plan:
    return make_plan(step_trace.trace_step(recipe, Target.of(recipe)), Target.of(recipe), None)


def test_the_planner_sees_its_memory(pulling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = case("lora")
    planned = plan_of(recipe)
    model = build_model(recipe)
    batch = random_batch(recipe.train.rows_per_pass, recipe.data.sequence_length)
    view = view_of(model, lambda _: [(batch, 100), (batch, 100)], mixed=False)
    hook = Pull(model)
    hook.before_step(0, view)  # first uses are not what is measured
    tokens = [t for t in (batch.input_ids, batch.labels, batch.position_ids, batch.target_positions) if t is not None]
    moments = [torch.zeros_like(p) for _ in range(2) for p in model.parameters() if p.requires_grad]
    with PeakMeter(torch.device("cpu"), lambda: resident_tensors(model, [*tokens, *tokens, *moments])) as meter:
        hook.before_step(1, view)
    assert meter.peak is not None
    assert planned.phases["before_step"]["peak_bytes"] == pytest.approx(meter.peak.allocated_bytes, rel=0.01)
    monkeypatch.setattr(step_trace, "hooks_of", lambda recipe, model: [])
    without = plan_of(recipe)
    assert "before_step" not in without.phases
    assert without.step_peak_bytes == planned.step_peak_bytes
    assert planned.peak_bytes == max(planned.step_peak_bytes, planned.phases["before_step"]["peak_bytes"])


def test_other_hooks_than_those_of_the_checkpoint_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    view = view_of(model, lambda _: [], mixed=False)
    hook = Pull(model)
    with caplog.at_level(logging.WARNING):
        resume_hooks([hook], {"pull": {"total": 3.0}}, view, "run/checkpoints")
        assert hook.total == 3.0 and not caplog.messages
        resume_hooks([hook], {"push": {"total": 1.0}}, view, "run/checkpoints")
    assert caplog.messages == [
        "run/checkpoints holds no state of pull, which begins anew",
        "run/checkpoints holds state of push, which this recipe does not use; it is dropped",
    ]


def test_what_json_would_change_is_refused() -> None:
    hook = Pull(nn.Linear(2, 2))
    assert states_of([hook, Hook()]) == {"pull": {"total": 0.0}}
    for state in ({1: 2}, {"pair": (1, 2)}, {"total": float("nan")}):
        hook.state_dict = lambda state=state: state  # type: ignore[method-assign,misc]
        with pytest.raises(ValueError, match="the state of hook 'pull' would come back from a checkpoint as something"):
            states_of([hook])


def test_names_are_given_once() -> None:
    one, other = Pull(nn.Linear(2, 2)), Pull(nn.Linear(2, 2))
    assert metrics_of([one], 0, taken={"loss"}) == {"pull": 0.0}
    with pytest.raises(ValueError, match="two hooks of this recipe are named 'pull'"):
        states_of([one, other])
    for hooks, taken in (([one], {"pull"}), ([one, other], {"loss"})):
        with pytest.raises(ValueError, match="hook 'pull' reports 'pull', which is reported already"):
            metrics_of(hooks, 0, taken)

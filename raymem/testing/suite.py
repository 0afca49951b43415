"""The tests that every combination of axes has to pass.

A method joins with a subclass in a test file of its own, which pytest then collects::

    from raymem.testing import ConformanceSuite

    class TestMine(ConformanceSuite):
        fragment = {"adapter": {"kind": "mine", "rank": 4}}

The suite brings the model, the tokenizer and the data: a two-layer Llama and texts of a few dozen words. It needs
neither a GPU nor a network, and takes some ten seconds on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from raymem.errors import RecipeError
from raymem.planner.analytic import closed_form
from raymem.planner.plan import make_plan
from raymem.planner.tracing.step_trace import planned_model, trace_step
from raymem.planner.types import Target
from raymem.recipe.axes import LOSSES, register_again, registered
from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.testing.measure import measure_step
from raymem.testing.processes import in_processes, start_server
from raymem.testing.tensors import assert_same, frozen, snapshot
from raymem.testing.tiny import TINY_LLAMA, num_targets, random_batch, save_tiny_model, write_examples
from raymem.training import loss
from raymem.training.artifacts.load import load_artifact
from raymem.training.checkpoint import Checkpoints, latest_manifest
from raymem.training.data.batches import Batch
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import Prepared, prepare
from raymem.training.dist_env import DistEnv, replicate
from raymem.training.evaluate import evaluate
from raymem.training.hooks import hooks_of, resume_hooks, states_of, view_of
from raymem.training.loop import Outcome, run
from raymem.training.manifest import Manifest
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.reporter import LocalReporter, Row
from raymem.training.step import StepResult, train_step

AXES = ("base", "adapter", "activations", "loss", "optimizer")
LENGTH = 16

PLAIN: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": "train.jsonl", "sequence_length": 32},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8.0},
    "optimizer": {"lr": 1e-2},
    "train": {"steps": 6, "global_batch": 4, "micro_batch": 2, "save_every": 2, "schedule": "constant", "warmup": 0},
    "scaling": {"num_workers": 0},
    "storage": {"path": "/nowhere"},
    "tracking": "none",
}
"""The recipe that a fragment is laid over, but for model and paths."""
_LARGER = {"data": {"sequence_length": 256}, "train": {"global_batch": 4, "micro_batch": 2}}
"""Rows so long that what libraries keep beside the tensors is a small part of the peak."""


class ConformanceSuite:
    """Tests of one combination of axes."""

    fragment: ClassVar[Mapping[str, Any]] = {}
    """The part of a recipe that chooses the combination."""
    model_config: ClassVar[Mapping[str, Any]] = TINY_LLAMA
    """The transformers config of the model, for methods that need another architecture."""
    peak_tolerance: ClassVar[float] = 0.02
    """Largest relative distance of the planned peak from the measured one."""

    def make_fragment(self, model: Path, folder: Path) -> Mapping[str, Any]:
        """Return ``fragment``; override where it names files that have to be made from the model first, below
        ``folder``.
        """
        return self.fragment

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
        """Return the recipe on the suite's own model and data, made once per class."""
        start_server()
        folder = tmp_path_factory.mktemp("conformance")
        model = save_tiny_model(folder / "model", cls.model_config)
        write_examples(folder / "train.jsonl", 40, seed=0)
        write_examples(folder / "eval.jsonl", 8, seed=1)
        data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")}
        fragment = cls().make_fragment(model, folder)
        return merged(PLAIN, {"model": {"name": str(model)}, "data": data}, fragment)

    @pytest.fixture
    def recipe(self, plain: Mapping[str, Any], tmp_path: Path) -> Recipe:
        """Return the recipe under test, whose runs lie in a folder of this test."""
        return parse_recipe(merged(plain, {"storage": {"path": str(tmp_path / "runs")}}))

    def test_training_lowers_the_loss(self, recipe: Recipe) -> None:
        worker = Worker(recipe, same_rows=True)
        losses = [float(worker.step(number).loss) for number in range(5)]
        assert losses[-1] < losses[0]

    def test_what_is_frozen_stays_and_what_is_trained_moves(self, recipe: Recipe) -> None:
        worker = Worker(recipe)
        worker.step(0)  # before which a method may choose something for good
        before, weights = snapshot(frozen(worker.model)), snapshot(worker.updater.parameters)
        for number in range(1, 4):
            worker.step(number)
        assert_same(frozen(worker.model), before)
        still = [name for name, value in worker.updater.parameters.items() if torch.equal(value, weights[name])]
        assert not still

    def test_save_and_load_continue_bitwise(self, recipe: Recipe, tmp_path: Path) -> None:
        worker, other = Worker(recipe), Worker(recipe)
        for number in range(2):
            worker.step(number)
        checkpoints = Checkpoints(Storage.open(str(tmp_path)), DistEnv())
        manifest = Manifest(2, {}, recipe.to_dict(), None, hooks=states_of(worker.hooks))
        checkpoints.save(manifest, worker.updater.state(), "last", 1)
        other.updater.allocate_state()
        saved = checkpoints.latest()
        assert saved is not None
        checkpoints.load(saved, other.updater.state())
        resume_hooks(other.hooks, saved.hooks, other.view, str(tmp_path))
        assert_same(other.updater.state(), worker.updater.state())
        for number in range(2, 5):
            worker.step(number)
            other.step(number)
        assert_same(other.updater.state(), worker.updater.state())

    def test_a_stopped_run_resumes_bitwise(self, recipe: Recipe) -> None:
        stopped, straight = (recipe.model_copy(update={"name": name}) for name in ("stopped", "straight"))
        _, rows = train(straight)
        with pytest.raises(Stopped):
            train(stopped, stop_after=3)
        outcome, resumed = train(stopped)
        assert outcome.started_at == 2, "the checkpoint before the step at which it was stopped"
        assert losses(resumed)[-4:] == losses(rows)[-4:]
        assert_same(final_state(stopped), final_state(straight))

    def test_the_artifact_is_the_trained_model(self, recipe: Recipe) -> None:
        longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 12})})
        outcome, rows = train(longer)
        assert outcome.eval_loss is not None
        evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
        model, _ = load_artifact(outcome.artifact)
        loss.prepare(model, LOSSES.of(longer), longer.loss)
        eval_data = prepare_split(longer, "eval")
        mixed = longer.train.is_mixed
        loaded = evaluate(model, PackedRows(eval_data.directories), DistEnv(), micro_batch=2, mixed=mixed).loss
        distance = abs(loaded - outcome.eval_loss)
        assert distance < (1e-4 if longer.train.precision == "fp32" else 1e-2) * outcome.eval_loss
        assert distance < 0.1 * abs(evaluated[0] - evaluated[-1]), "far less than what training changed"

    def test_two_ranks_agree(self, recipe: Recipe, tmp_path: Path) -> None:
        raw = merged(recipe.to_dict(), {"scaling": {"num_workers": 2}})
        (first, losses), (second, other_losses) = in_processes(train_on_a_rank, 2, tmp_path, raw, registered())
        assert losses == other_losses
        assert_same(first, second)

    def test_the_planned_peak_is_the_measured_one(self, recipe: Recipe) -> None:
        larger = parse_recipe(merged(recipe.to_dict(), _LARGER))
        target = Target.of(larger)
        session = trace_step(larger, target)
        planned = make_plan(session, target, None).step_peak_bytes
        measured = measure_step(larger).allocated_bytes
        # The kernels of products in bf16 take buffers of their own, which depend on the processor.
        tolerance = self.peak_tolerance if larger.train.precision == "fp32" else max(0.15, self.peak_tolerance)
        assert planned == pytest.approx(measured, rel=tolerance)
        known = closed_form(larger, target, planned_model(larger))  # without an optimizer that has no closed form
        assert known == {term: session.state[term] for term in known}, "sweeps refuse by the closed form"

    def test_the_planned_model_has_the_geometry_of_the_real_one(self, recipe: Recipe) -> None:
        def geometry(model: nn.Module) -> dict[str, Any]:
            return {n: (p.shape, p.stride(), p.dtype, p.requires_grad) for n, p in model.named_parameters()}

        assert geometry(build_model(recipe, meta=True)) == geometry(build_model(recipe))

    def test_an_unknown_option_is_an_error(self, recipe: Recipe) -> None:
        for axis in AXES:
            with pytest.raises(RecipeError, match=rf"{axis}\.rnak: unknown key"):
                parse_recipe(merged(copy.deepcopy(recipe.to_dict()), {axis: {"rnak": 3}}))

    def test_an_unknown_target_is_an_error(self, recipe: Recipe) -> None:
        if not hasattr(recipe.adapter, "targets"):
            pytest.skip("this combination has no targets")
        wrong = parse_recipe(merged(recipe.to_dict(), {"adapter": {"targets": ["q_porj"]}}))
        with pytest.raises(RecipeError, match=r"adapter\.targets: 'q_porj' matches no .*near names: .*q_proj"):
            build_model(wrong, meta=True)


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts laid over each other; a later value wins, and another ``kind`` drops the options of the
    former.
    """
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            below = result.get(key)
            if isinstance(below, Mapping) and isinstance(value, Mapping):
                same_kind = value.get("kind", below.get("kind")) == below.get("kind")
                value = merged(below, value) if same_kind else value
            result[key] = value
    return result


class Worker:
    """One worker with its model, optimizer and hooks.

    Args:
        same_rows: every step has the rows of the first.
    """

    def __init__(self, recipe: Recipe, dist_env: DistEnv | None = None, *, same_rows: bool = False) -> None:
        self.dist_env = dist_env or DistEnv()
        self.clip_norm, self.mixed = recipe.train.clip_norm, recipe.train.is_mixed
        self.same_rows = same_rows
        self.model = build_model(recipe, self.dist_env)
        self.updater = build_updater(self.model, recipe)
        self.hooks = hooks_of(recipe, self.model)
        self.view = view_of(self.model, self.batches, mixed=self.mixed)
        self.trained = replicate(self.model, self.dist_env)

    def batches(self, number: int) -> list[tuple[Batch, int]]:
        """Random rows, other ones for every step and rank."""
        world = self.dist_env.world_size
        shares = [random_batch(2, LENGTH, (0 if self.same_rows else number) * world + rank) for rank in range(world)]
        return [(shares[self.dist_env.rank], num_targets(*shares))]

    def step(self, number: int) -> StepResult:
        """Call the hooks, and take one optimizer step."""
        for hook in self.hooks:
            hook.before_step(number, self.view)
        [(batch, targets)] = self.batches(number)
        return train_step(
            self.trained, [batch], targets, self.updater, number, 1e-2, clip_norm=self.clip_norm, mixed=self.mixed
        )


class Stopped(Exception):
    """Ends a run between two checkpoints."""


def train(recipe: Recipe, *, stop_after: int = 0) -> tuple[Outcome, list[Row]]:
    """Run a recipe in this process; returns its outcome and every row that was reported.

    Raises:
        Stopped: step ``stop_after`` was reported.
    """
    rows: list[Row] = []

    def stop(new: Sequence[Row]) -> None:
        if new[-1]["step"] == stop_after:
            raise Stopped

    train_data, eval_data = prepare_split(recipe, "train"), prepare_split(recipe, "eval")
    storage, reporter = run_storage(recipe), LocalReporter(rows.extend, stop)
    return run(recipe, DistEnv(), storage, train_data, eval_data, reporter, metered_steps=()), rows


def prepare_split(recipe: Recipe, split: Literal["train", "eval"]) -> Prepared:
    """Return the rows of a split that the recipe has, cached beside their file."""
    tokenizer = recipe.model.tokenizer or recipe.model.name or ""
    return prepare(recipe.data, split, tokenizer, Path(recipe.data.train[0].path).parent / "cache")


def run_storage(recipe: Recipe) -> Storage:
    """Storage of the run's directory, which exists afterwards."""
    storage = recipe.storage.open().child(recipe.name)
    Path(storage.root).mkdir(parents=True, exist_ok=True)
    return storage


def losses(rows: Sequence[Row]) -> list[float]:
    """Return the training loss of each step."""
    return [row["loss"] for row in rows]


def final_state(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return every tensor of a run's last checkpoint."""
    manifest = latest_manifest(run_storage(recipe))
    assert manifest is not None and manifest.step == recipe.train.steps
    updater = build_updater(build_model(recipe), recipe)
    updater.allocate_state()
    Checkpoints(run_storage(recipe), DistEnv()).load(manifest, updater.state())
    return updater.state()


def train_on_a_rank(
    raw: dict[str, Any], kinds: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Two steps, every rank with rows of its own; returns the whole state afterwards and the losses."""
    register_again(kinds)
    recipe = Recipe.model_validate(raw)
    dist_env = DistEnv.current(recipe)
    torch.manual_seed(dist_env.rank)  # nothing may depend on the global stream
    worker = Worker(recipe, dist_env)
    losses = [float(worker.step(number).loss) for number in range(2)]
    return {name: tensor.contiguous() for name, tensor in worker.updater.state().items()}, losses

"""What every method must keep to. A method joins with a subclass::

class TestMine(MethodSuite):
    fragment = {"adapter": {"kind": "mine", "rank": 4}}
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from raymem.errors import RecipeError
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.training.checkpoint import Checkpoints, Manifest
from raymem.training.data.batches import Batch
from raymem.training.dist_env import Layout, replicate
from raymem.training.hooks import hooks_of, resume_hooks, states_of, view_of
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater
from raymem.training.step import StepResult, train_step
from tests.helpers.support import (
    assert_same,
    frozen,
    in_processes,
    make_recipe,
    merged,
    num_targets,
    random_batch,
    snapshot,
)

AXES = ("base", "adapter", "activations", "optimizer")
LENGTH = 16


class MethodSuite:
    """Tests of one combination of axes; ``fragment`` is the part of the recipe that chooses it."""

    fragment: dict[str, Any] = {}

    @pytest.fixture
    def recipe(self, llama: Path) -> Recipe:
        return make_recipe(self.fragment, model=llama)

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
        checkpoints = Checkpoints(Storage.open(str(tmp_path)), Layout())
        manifest = Manifest(2, {}, recipe.to_dict(), None, hooks=states_of(worker.hooks))
        checkpoints.save(manifest, worker.updater.state(), "last", 1)
        other.updater.allocate_state()
        found = checkpoints.latest()
        assert found is not None
        checkpoints.load(found, other.updater.state())
        resume_hooks(other.hooks, found.hooks, other.view, str(tmp_path))
        assert_same(other.updater.state(), worker.updater.state())
        for number in range(2, 5):
            worker.step(number)
            other.step(number)
        assert_same(other.updater.state(), worker.updater.state())

    def test_two_ranks_agree(self, recipe: Recipe, tmp_path: Path) -> None:
        raw = merged(recipe.to_dict(), {"scaling": {"num_workers": 2}})
        (first, losses), (second, other_losses) = in_processes(train_on_a_rank, 2, tmp_path, raw)
        assert losses == other_losses
        assert_same(first, second)

    def test_two_steps_run_on_fake_tensors(self, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import masking_utils

        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *args, **kwargs: None)
        model = build_model(recipe, meta=True)
        real = random_batch(2, LENGTH)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakeify(model)
            updater = build_updater(model, recipe)
            batches = [fake_batch(mode, real)]
            mixed = recipe.train.precision == "bf16_mixed"
            view = view_of(model, lambda _: [(batch, 30) for batch in batches], mixed=mixed, planned=True)
            hooks = hooks_of(recipe, model)
            for number in range(2):
                for hook in hooks:
                    hook.before_step(number, view)
                result = train_step(
                    model, batches, 30, updater, number, 1e-3,
                    clip_norm=recipe.train.clip_norm, mixed=mixed,
                    guard=lambda loss, grad_norm: None,
                )  # fmt: skip
        assert isinstance(result.loss, FakeTensor)
        assert all(isinstance(tensor, FakeTensor) for tensor in updater.state().values())

    def test_the_planned_model_has_the_geometry_of_the_real_one(self, recipe: Recipe) -> None:
        def geometry(model: nn.Module) -> dict[str, Any]:
            return {n: (p.shape, p.stride(), p.dtype, p.requires_grad) for n, p in model.named_parameters()}

        assert geometry(build_model(recipe, meta=True)) == geometry(build_model(recipe))

    def test_an_unknown_option_is_an_error(self, recipe: Recipe) -> None:
        for axis in AXES:
            with pytest.raises(RecipeError, match=rf"{axis}\.rnak: unknown key"):
                make_recipe(merged(copy.deepcopy(recipe.to_dict()), {axis: {"rnak": 3}}))

    def test_an_unknown_target_is_an_error(self, recipe: Recipe, llama: Path) -> None:
        if not hasattr(recipe.adapter, "targets"):
            pytest.skip("this combination has no targets")
        wrong = make_recipe(self.fragment, {"adapter": {"targets": ["q_porj"]}}, model=llama)
        with pytest.raises(RecipeError, match=r"adapter\.targets: 'q_porj' matches no .*near names: .*q_proj"):
            build_model(wrong, meta=True)


class Worker:
    """One worker with its model, optimizer and hooks.

    Args:
        same_rows: every step has the rows of the first.
    """

    def __init__(self, recipe: Recipe, layout: Layout | None = None, *, same_rows: bool = False) -> None:
        self.layout = layout or Layout()
        self.clip_norm, self.mixed = recipe.train.clip_norm, recipe.train.precision == "bf16_mixed"
        self.same_rows = same_rows
        self.model = build_model(recipe, self.layout)
        self.updater = build_updater(self.model, recipe)
        self.hooks = hooks_of(recipe, self.model)
        self.view = view_of(self.model, self.batches, mixed=self.mixed)
        self.trained = replicate(self.model, self.layout)

    def batches(self, number: int) -> list[tuple[Batch, int]]:
        """Random rows, other ones for every step and rank."""
        world = self.layout.world_size
        shares = [random_batch(2, LENGTH, (0 if self.same_rows else number) * world + rank) for rank in range(world)]
        return [(shares[self.layout.rank], num_targets(*shares))]

    def step(self, number: int) -> StepResult:
        for hook in self.hooks:
            hook.before_step(number, self.view)
        [(batch, targets)] = self.batches(number)
        return train_step(
            self.trained, [batch], targets, self.updater, number, 1e-2, clip_norm=self.clip_norm, mixed=self.mixed
        )


def train_on_a_rank(raw: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Two steps, every rank with rows of its own; the whole state afterwards."""
    recipe = Recipe.model_validate(raw)
    layout = Layout.current(recipe)
    torch.manual_seed(layout.rank)  # nothing may depend on the global stream
    worker = Worker(recipe, layout)
    losses = [float(worker.step(number).loss) for number in range(2)]
    return {name: tensor.contiguous() for name, tensor in worker.updater.state().items()}, losses


def fakeify(model: nn.Module) -> None:
    """Put fake CPU tensors of the same geometry in the place of meta ones; tied ones stay tied. Call in fake mode."""
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fresh:
                fake = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype)
                fresh[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = fresh[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype)


def fake_batch(mode: FakeTensorMode, real: Batch) -> Batch:
    assert real.position_ids is not None and real.target_positions is not None
    given = (real.input_ids, real.labels, real.position_ids, real.target_positions)
    ids, labels, positions, targets = map(mode.from_tensor, given)
    return Batch(ids, labels, positions, None, targets)

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
from raymem.training.model.build import build_model
from raymem.training.optim import Updater, build_updater
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
        model, updater = build(recipe)
        losses = [float(step(model, updater, recipe, number, seed=0).loss) for number in range(5)]
        assert losses[-1] < losses[0]

    def test_what_is_frozen_stays_and_what_is_trained_moves(self, recipe: Recipe) -> None:
        model, updater = build(recipe)
        before, weights = snapshot(frozen(model)), snapshot(updater.parameters)
        for number in range(3):
            step(model, updater, recipe, number)
        assert_same(frozen(model), before)
        still = [name for name, value in updater.parameters.items() if torch.equal(value, weights[name])]
        assert not still

    def test_save_and_load_continue_bitwise(self, recipe: Recipe, tmp_path: Path) -> None:
        model, updater = build(recipe)
        for number in range(2):
            step(model, updater, recipe, number)
        checkpoints = Checkpoints(Storage.open(str(tmp_path)), Layout())
        checkpoints.save(Manifest(2, {}, recipe.to_dict(), None), updater.state(), "last", 1)
        other_model, other = build(recipe)
        other.allocate_state()
        found = checkpoints.latest()
        assert found is not None
        checkpoints.load(found, other.state())
        assert_same(other.state(), updater.state())
        for number in range(2, 5):
            step(model, updater, recipe, number)
            step(other_model, other, recipe, number)
        assert_same(other.state(), updater.state())

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
            for number in range(2):
                result = train_step(
                    model, batches, 30, updater, number, 1e-3,
                    clip_norm=recipe.train.clip_norm, mixed=recipe.train.precision == "bf16_mixed",
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


def build(recipe: Recipe) -> tuple[nn.Module, Updater]:
    model = build_model(recipe)
    return model, build_updater(model, recipe)


def step(model: nn.Module, updater: Updater, recipe: Recipe, number: int, seed: int | None = None) -> StepResult:
    """One step on random rows that ``number`` (or ``seed``) chooses."""
    batch = random_batch(2, LENGTH, number if seed is None else seed)
    mixed = recipe.train.precision == "bf16_mixed"
    clip_norm = recipe.train.clip_norm
    return train_step(model, [batch], num_targets(batch), updater, number, 1e-2, clip_norm=clip_norm, mixed=mixed)


def train_on_a_rank(raw: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Two steps, every rank with rows of its own; the whole state afterwards."""
    recipe = Recipe.model_validate(raw)
    layout = Layout.current(recipe)
    torch.manual_seed(layout.rank)  # nothing may depend on the global stream
    bare = build_model(recipe, layout)
    updater = build_updater(bare, recipe)
    model = replicate(bare, layout)
    losses = []
    for number in range(2):
        shares = [random_batch(2, LENGTH, 10 * number + rank) for rank in range(layout.world_size)]
        result = train_step(model, [shares[layout.rank]], num_targets(*shares), updater, number, 1e-2, clip_norm=1.0)
        losses.append(float(result.loss))
    return {name: tensor.contiguous() for name, tensor in updater.state().items()}, losses


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

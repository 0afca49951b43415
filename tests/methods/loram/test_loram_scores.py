"""Streamed scores and kept sets against straight-line ones of the whole model in memory, and the masks."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from raymem.methods.loram import PruneOptions
from raymem.methods.loram.coupling import Group, Member, couple
from raymem.methods.loram.pruning import layer_passes
from raymem.methods.loram.pruning.job import PruneJob, open_job, read_shard, shard_name
from raymem.methods.loram.pruning.masks import magnitude_mask, sparsegpt, wanda_mask
from raymem.methods.loram.pruning.scores import best, magnitude_scores, random_scores
from raymem.methods.loram.pruning.steps import run_step, steps
from tests.helpers.loram_families import config_of, random_model, save, token_ids

STREAMED = ["llama", "qwen3", "gemma3", "granite", "phi3", "gpt_neox", "opt"]
IDS = token_ids(3, 16)


def run_all(folder: Path, family: str, criterion: Any, calibration: torch.Tensor | None = None) -> PruneJob:
    """Every step but the commit, at 4 layers of which the second and third are pruned by half."""
    options = PruneOptions(criterion=criterion, keep_first=1, keep_last=1)
    job = open_job(save(folder / "full", family, shard="30KB"), folder / "pruned", options, calibration)
    for step in steps(job):
        run_step(job, step)
    return job


def owners(coupling: Any, model: Any, layer: int, group: Group) -> list[tuple[Member, torch.nn.Linear]]:
    prefix = coupling.prefix(layer)
    return [(member, model.get_submodule(prefix + member.module)) for member in group.members]


def unit_sum(member: Member, values_OI: torch.Tensor, unit: int) -> float:
    """Everything in the rows (columns) that a unit owns, one by one."""
    index = member.indices(torch.tensor([unit]))
    return float((values_OI[index] if member.side == "out" else values_OI[:, index]).detach().double().sum())


def whole_model_scores(family: str, criterion: str) -> dict[tuple[int, str], torch.Tensor]:
    """The definition: one backward (forward) pass of the whole model over the whole set."""
    model, coupling = random_model(family), couple(config_of(family))
    squares: dict[torch.nn.Module, torch.Tensor] = {}
    if criterion == "taylor":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    if criterion == "wanda":
        for module in model.modules():
            module.register_forward_pre_hook(
                lambda module, args: (
                    squares.update({module: args[0].flatten(0, -2).square().sum(0).sqrt()})
                    if isinstance(module, torch.nn.Linear)
                    else None
                )
            )
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
    value = {
        "magnitude": lambda linear: linear.weight.square(),
        "taylor": lambda linear: (linear.weight * linear.weight.grad).abs(),
        "wanda": lambda linear: linear.weight.abs() * squares[linear],
    }[criterion]
    found = {}
    for layer in (1, 2):
        for group in coupling.groups:
            units = range(group.num_units)
            values = [(member, value(linear)) for member, linear in owners(coupling, model, layer, group)]
            totals = [sum(unit_sum(member, matrix, unit) for member, matrix in values) for unit in units]
            found[layer, group.name] = torch.tensor(totals, dtype=torch.float64)
    return found


@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
@pytest.mark.parametrize("family", STREAMED)
def test_streamed_scores_are_those_of_the_whole_model(family: str, criterion: str, tmp_path: Path) -> None:
    job = run_all(tmp_path, family, criterion, IDS)
    for (layer, group), expected in whole_model_scores(family, criterion).items():
        found = layer_passes.scores(job, layer)[group]
        torch.testing.assert_close(found, expected, rtol=3e-5, atol=1e-7)
        kept = read_shard(job, shard_name(job, layer))[0][group]  # type: ignore[index]
        assert kept == sorted(expected.topk(len(expected) // 2).indices.tolist())


@pytest.mark.parametrize("family", STREAMED)
def test_streamed_magnitude_keeps_the_largest_units(family: str, tmp_path: Path) -> None:
    job = run_all(tmp_path, family, "magnitude")
    for (layer, group), expected in whole_model_scores(family, "magnitude").items():
        kept = read_shard(job, shard_name(job, layer))[0][group]  # type: ignore[index]
        assert kept == sorted(expected.topk(len(expected) // 2).indices.tolist())


@pytest.mark.parametrize("criterion", ["taylor", "wanda"])
def test_scores_do_not_depend_on_how_texts_are_batched(
    criterion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run_all(tmp_path / "together", "gemma3", criterion, IDS)
    monkeypatch.setattr(layer_passes, "_BATCH_TOKENS", 32)  # two texts, then the third
    apart = run_all(tmp_path / "apart", "gemma3", criterion, IDS)
    for layer in (1, 2):
        for group, expected in layer_passes.scores(together, layer).items():
            torch.testing.assert_close(layer_passes.scores(apart, layer)[group], expected, rtol=1e-5, atol=1e-8)


def test_magnitude_scores_sum_squares_of_everything_that_goes() -> None:
    group = Group("mlp", 3, (Member("up", "out", ((0, 2),)), Member("down", "in", ((0, 1),))))
    up, down = torch.randn(6, 5000), torch.randn(700, 3)
    expected = up.double().square().sum(1).view(3, 2).sum(1) + down.double().square().sum(0)
    torch.testing.assert_close(magnitude_scores(group, {"up": up, "down": down}), expected, rtol=1e-6, atol=0)


def test_random_scores_depend_on_seed_layer_and_group_only() -> None:
    group = Group("attn", 8, ())
    first = random_scores(group, 3, 0)
    torch.manual_seed(5)
    assert torch.equal(first, random_scores(group, 3, 0))
    others = [random_scores(group, 4, 0), random_scores(group, 3, 1)]
    others.append(random_scores(dataclasses.replace(group, name="mlp"), 3, 0))
    assert not any(torch.equal(first, other) for other in others)


def test_of_equal_units_the_first_stay() -> None:
    assert best(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3) == [0, 1, 3]


@pytest.mark.parametrize(("structure", "kept", "size"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_each_block_keeps_its_largest(structure: Any, kept: int, size: int) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    mask = magnitude_mask(weight, structure, Fraction(1, 2))
    for block, stays in zip(weight.abs().view(-1, size), mask.view(-1, size), strict=True):
        assert set(block[stays].tolist()) == set(block.topk(kept).values.tolist())


def test_wanda_weighs_by_the_inputs() -> None:
    weight, squares = torch.tensor([[3.0, -2.0, 1.0, 0.5]]), torch.tensor([0.0, 1.0, 9.0, 100.0])
    assert wanda_mask(weight, squares, "2:4", Fraction(1, 2)).tolist() == [[False, False, True, True]]
    assert wanda_mask(weight, squares, "unstructured", Fraction(3, 4)).tolist() == [[False, False, False, True]]


def straight_sparsegpt(weight: torch.Tensor, gram: torch.Tensor, kept: int, size: int) -> torch.Tensor:
    """OBS column by column: after each column the inverse of the remaining Gram matrix, computed anew in fp64."""
    weight, gram = weight.double().clone(), gram.double()
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for column in range(weight.shape[1]):
        if column % size == 0:
            # The criterion looks ahead with the diagonals that the columns of the block will meet in their turn.
            pivots = torch.stack([torch.linalg.inv(gram[c:, c:])[0, 0] for c in range(column, column + size)])
            order = (weight[:, column : column + size] ** 2 / pivots).argsort(1, descending=True)
            mask[:, column : column + size] = False
            mask[:, column : column + size].scatter_(1, order[:, :kept], True)
        inverse = torch.linalg.inv(gram[column:, column:])
        error = torch.where(mask[:, column], 0.0, weight[:, column]) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0][None]
        weight[:, column] = torch.where(mask[:, column], weight[:, column], 0.0)
    return weight


@pytest.mark.parametrize("inputs", [32, 144])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(inputs: int) -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(8, inputs, generator=source)
    x = torch.randn(4 * inputs, inputs, generator=source) @ torch.randn(inputs, inputs, generator=source)
    gram = x.T @ x
    expected = straight_sparsegpt(weight, gram, 4, 8)
    found = sparsegpt(weight, gram.clone(), "4:8", Fraction(1, 2))
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)
    plain = weight * magnitude_mask(weight, "4:8", Fraction(1, 2))
    assert (x @ (found - weight).T).norm() < 0.8 * (x @ (plain - weight).T).norm()


def test_sparsegpt_drops_inputs_that_never_fire() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    found = sparsegpt(torch.ones(2, 8), x.T @ x, "unstructured", Fraction(1, 4))
    assert (found[:, 3] == 0).all() and (found == 0).sum() == 4

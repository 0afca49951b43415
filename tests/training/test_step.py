"""One optimizer step against a straight-line derivation: plain loop, mean loss, torch's AdamW and clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raymem.errors import NonFiniteError
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import Batch
from raymem.training.loss import forward_loss_sum
from raymem.training.model.build import build_model
from raymem.training.optim import Updater, build_updater
from raymem.training.step import finite_guard, train_step
from tests.helpers.support import assert_same, make_recipe, num_targets, random_batch, snapshot

pytestmark = pytest.mark.numerics

FULL = {"adapter": {"kind": "none"}, "train": {"clip_norm": None}}


def build(llama: Path, *fragments: dict[str, Any]) -> tuple[Recipe, Any, Updater]:
    recipe = make_recipe(FULL, *fragments, model=llama)
    model = build_model(recipe)
    return recipe, model, build_updater(model, recipe)


def straight_line(model: Any, batches: list[Batch], lr: float, clip_norm: float | None) -> list[float]:
    """Training as one would write it down: per step one forward over all rows, logits shifted by hand."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for batch in batches:
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        predicted, wanted = logits[:, :-1].reshape(-1, logits.shape[-1]), batch.labels[:, 1:].reshape(-1)
        kept = wanted != -100
        loss = nn.functional.cross_entropy(predicted[kept], wanted[kept])
        optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_step_is_the_one_written_down(llama: Path, clip_norm: float | None) -> None:
    _, model, updater = build(llama)
    _, reference, _ = build(llama)
    batches = [random_batch(4, 24, seed) for seed in range(4)]
    losses = [
        float(train_step(model, [batch], num_targets(batch), updater, step, 1e-3, clip_norm=clip_norm).loss)
        for step, batch in enumerate(batches)
    ]
    assert losses == pytest.approx(straight_line(reference, batches, 1e-3, clip_norm), rel=1e-5)
    for name, expected in reference.named_parameters():
        torch.testing.assert_close(updater.parameters[name], expected, rtol=1e-4, atol=2e-5)


def test_accumulation_equals_the_large_batch(llama: Path) -> None:
    """Also where micro-batches have different numbers of targets: the mean is over tokens, not over micro-batches."""
    drawn = random_batch(4, 24)
    drawn.labels[0, 4:] = -100
    whole = Batch(drawn.input_ids, drawn.labels, drawn.position_ids, None)
    assert whole.position_ids is not None
    rows = zip(whole.input_ids.split(1), whole.labels.split(1), whole.position_ids.split(1), strict=True)
    parts = [Batch(ids, labels, positions, None) for ids, labels, positions in rows]
    _, model, updater = build(llama)
    _, split_model, split = build(llama)
    for step in range(2):
        one = train_step(model, [whole], num_targets(whole), updater, step, 1e-3)
        many = train_step(split_model, parts, num_targets(whole), split, step, 1e-3)
        torch.testing.assert_close(many.loss, one.loss)
        torch.testing.assert_close(many.grad_norm, one.grad_norm)
    for name, expected in updater.parameters.items():
        torch.testing.assert_close(split.parameters[name], expected, rtol=1e-4, atol=2e-5)


def test_rows_without_a_target_change_nothing(llama: Path) -> None:
    batch = random_batch(2, 16)
    empty = Batch(batch.input_ids, torch.full_like(batch.labels, -100), batch.position_ids, None)
    _, model, updater = build(llama)
    _, other_model, other = build(llama)
    alone = train_step(model, [batch], num_targets(batch), updater, 0, 1e-3)
    padded = train_step(other_model, [batch, empty], num_targets(batch), other, 0, 1e-3)
    assert float(alone.loss) == float(padded.loss)
    assert_same(other.state(), updater.state())


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
def test_clipping_limits_the_gradient_and_reports_the_norm_before(llama: Path, clip_norm: float) -> None:
    batch = random_batch(2, 16)
    _, model, updater = build(llama)
    seen: list[torch.Tensor] = []
    original = updater.step

    def spy() -> None:
        seen.extend(parameter.grad.clone() for parameter in updater.parameters.values() if parameter.grad is not None)
        original()

    updater.step = spy  # type: ignore[method-assign]
    result = train_step(model, [batch], num_targets(batch), updater, 0, 1e-3, clip_norm=clip_norm)
    applied = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in seen]))
    expected = min(clip_norm, float(result.grad_norm))
    assert float(applied) == pytest.approx(expected, rel=1e-3)
    assert float(result.grad_norm) > 1e-3


@pytest.mark.parametrize(
    "fragment",
    [
        {},
        {"train": {"precision": "bf16", "master": "fp32"}},
        {"train": {"precision": "bf16", "master": "stochastic_rounding"}},
    ],
    ids=["fp32", "master", "rounding"],
)
@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_writes_nothing(llama: Path, fragment: dict[str, Any], where: str) -> None:
    _, model, updater = build(llama, fragment)
    batch = random_batch(2, 16)
    train_step(model, [batch], num_targets(batch), updater, 0, 1e-3, clip_norm=1.0)
    before = snapshot(updater.state())
    bad = 1.0 if where == "loss" else 0.0
    hook: Any
    if where == "loss":
        hook = model.lm_head.register_forward_hook(lambda module, args, out: out * (bad * float("nan")))
    else:
        hook = model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=f"{where} is (nan|inf)"):
        train_step(model, [batch], num_targets(batch), updater, 1, 1e-3, clip_norm=1.0)
    assert_same(updater.state(), before)
    hook.remove()
    updater.drop_gradients()
    train_step(model, [batch], num_targets(batch), updater, 1, 1e-3, clip_norm=1.0)


def test_the_guard_sees_what_is_reported_before_the_optimizer_runs(llama: Path) -> None:
    _, model, updater = build(llama)
    batch = random_batch(2, 16)
    before = snapshot(updater.state())
    seen: list[tuple[float, float]] = []

    def guard(loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        assert_same(updater.state(), before)
        seen.append((float(loss), float(grad_norm)))

    result = train_step(model, [batch], num_targets(batch), updater, 0, 1e-3, guard=guard)
    assert seen == [(float(result.loss), float(result.grad_norm))]


@pytest.mark.parametrize(("loss", "norm", "named"), [(float("nan"), 1.0, "loss is nan"), (1.0, float("inf"), "norm")])
def test_the_guard_names_what_is_not_finite(loss: float, norm: float, named: str) -> None:
    finite_guard(torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(NonFiniteError, match=named):
        finite_guard(torch.tensor(loss), torch.tensor(norm))


def test_packed_examples_do_not_see_each_other(llama: Path) -> None:
    """The loss of a row of two segments is that of the two rows that hold one segment each."""
    recipe = make_recipe(FULL, model=llama)
    model = build_model(recipe)
    packed = random_batch(1, 24)
    halves = Batch(packed.input_ids.view(2, 12), packed.labels.view(2, 12), None, None)
    with torch.no_grad():
        joint = forward_loss_sum(model, packed, mixed=False)
        apart = forward_loss_sum(model, halves, mixed=False)
    torch.testing.assert_close(joint, apart)

"""Shared parts of MoRAM's benchmarks on the demo task: the base, the data, and one run of any PEFT method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from raymem.recipe.axes import no_adapter
from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.recipe.schema import Recipe
from raymem.runs.prepare import prepare_split
from raymem.runs.resolve import resolve
from raymem.training.data.batches import Batch, global_targets, rank_batches
from raymem.training.data.packed.dataset import PackedRows, Row
from raymem.training.data.packed.sampler import Sampler
from raymem.training.dist_env import DistEnv
from raymem.training.evaluate import evaluate
from raymem.training.hooks import hooks_of, view_of
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater, lr_factor
from raymem.training.step import train_step


def recipe_for(model: str, storage: Path, *overrides: str) -> Recipe:
    """The demo recipe on a base that was built before (benchmarks/make_base.py)."""
    fixed = [f"model.name={model}", f"storage.path={storage.resolve()}", "scaling.num_workers=0", "tracking=none"]
    return resolve(load_recipe(packaged_recipe("demo"), [*fixed, *overrides])).recipe


def rows_of(recipe: Recipe, split: Any) -> PackedRows:
    return PackedRows(prepare_split(resolve(recipe), split).directories)


def sampler_of(recipe: Recipe, rows: PackedRows) -> Sampler:
    return Sampler(recipe.seed, rows.sizes_and_weights, recipe.train.global_batch)


def shira(recipe: Recipe) -> nn.Module:
    """The recipe's base with PEFT's SHiRA of the recipe's rank, on the layers that ``all-linear`` means."""
    from peft import ShiraConfig, get_peft_model

    base: Any = build_model(recipe.model_copy(update={"adapter": no_adapter()}))
    config = ShiraConfig(r=recipe.adapter.rank, target_modules="all-linear", random_seed=recipe.seed)  # type: ignore[union-attr]
    return get_peft_model(base, config).train()  # type: ignore[no-any-return]


class EverySecond(PackedRows):
    """Half of some rows, from the first or from the second on."""

    def __init__(self, whole: PackedRows, first: int) -> None:
        self._whole, self._first = whole, first
        self.sequence_length, self.packing = whole.sequence_length, whole.packing
        self.num_targets, self.lengths = whole.num_targets[first::2], whole.lengths[first::2]

    def row(self, index: int) -> Row:
        return self._whole.row(self._first + 2 * index)


def finetuned_loss(recipe: Recipe, rows: PackedRows, eval_rows: PackedRows, *, as_shira: bool = False) -> float:
    """Evaluation loss after the recipe's steps."""
    steps = recipe.train.steps
    assert steps is not None
    model = shira(recipe) if as_shira else build_model(recipe)
    updater = build_updater(model, recipe)
    sampler, hooks = sampler_of(recipe, rows), [] if as_shira else hooks_of(recipe, model)

    def batches(step: int) -> list[tuple[Batch, int]]:
        ids = sampler.ids(step)
        share = rank_batches(rows, ids, 0, 1, recipe.train.rows_per_pass)
        return [(batch, global_targets(rows, ids)) for batch in share]

    view = view_of(model, batches, mixed=False)
    for step in range(steps):
        for hook in hooks:
            hook.before_step(step, view)
        share, targets = [batch for batch, _ in batches(step)], global_targets(rows, sampler.ids(step))
        lr = recipe.optimizer.lr * lr_factor(step, steps, recipe.train.schedule, recipe.train.warmup)
        train_step(model, share, targets, updater, step, lr, clip_norm=recipe.train.clip_norm)
    return evaluate(model, eval_rows, DistEnv(), micro_batch=recipe.train.micro_batch, mixed=False).loss

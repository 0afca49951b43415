"""What the benchmarks of MoRAM on the demo task share: the base, the data, and one run of any PEFT method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.recipe.schema import NoAdapter, Recipe
from raymem.runs.prepare import prepare_split
from raymem.runs.resolve import resolve
from raymem.training.data.batches import global_targets, rank_batches
from raymem.training.data.dataset import PackedRows, Row
from raymem.training.data.sampler import Sampler
from raymem.training.dist_env import Layout
from raymem.training.evaluate import evaluate
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater, lr_factor
from raymem.training.selection import by_gradient, is_due
from raymem.training.step import train_step


def recipe_for(model: str, storage: Path, *overrides: str) -> Recipe:
    """The quickstart recipe on a base that was built before (benchmarks/make_base.py)."""
    fixed = [f"model.name={model}", f"storage.path={storage.resolve()}", "scaling.num_workers=0", "tracking=none"]
    return resolve(load_recipe(packaged_recipe("quickstart"), [*fixed, *overrides])).recipe


def rows_of(recipe: Recipe, split: Any) -> PackedRows:
    return PackedRows(prepare_split(resolve(recipe), split).directories)


def sampler_of(recipe: Recipe, rows: PackedRows) -> Sampler:
    return Sampler(recipe.seed, rows.sizes_and_weights, recipe.train.global_batch)


def shira(recipe: Recipe) -> nn.Module:
    """The recipe's base with PEFT's SHiRA of the recipe's rank, on the layers that ``all-linear`` means."""
    from peft import ShiraConfig, get_peft_model

    base: Any = build_model(recipe.model_copy(update={"adapter": NoAdapter()}))
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
    sampler, layout = sampler_of(recipe, rows), Layout()
    for step in range(steps):
        if is_due(recipe, step) and not as_shira:
            by_gradient(model, recipe, layout, rows, sampler, step)
        ids = sampler.ids(step)
        batches = rank_batches(rows, ids, 0, 1, recipe.train.micro_batch)
        lr = recipe.optimizer.lr * lr_factor(step, steps, recipe.train.schedule, recipe.train.warmup)
        train_step(model, batches, global_targets(rows, ids), updater, step, lr, clip_norm=recipe.train.clip_norm)
    return evaluate(model, eval_rows, layout, micro_batch=recipe.train.micro_batch, mixed=False).loss

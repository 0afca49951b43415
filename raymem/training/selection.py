"""What of the base an adapter trains, where it chooses that: before the first step, and again where that is asked.

The choice is a function of the recipe and the data: it is stored with every checkpoint, and the same for any number of
workers up to the rounding of a sum over them.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from raymem.errors import AdapterError, ModelError
from raymem.methods.moram.config import MoRAMOptions
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import Batch, global_targets, rank_batches
from raymem.training.data.dataset import PackedRows
from raymem.training.data.sampler import Sampler
from raymem.training.dist_env import Layout
from raymem.training.loss import forward_loss_sum

log = logging.getLogger(__name__)


def without_training_data(model: nn.Module, recipe: Recipe) -> None:
    """For a materialised model: take up the choice of a continued adapter, or choose by the weights or at random.

    Collective. Choices by gradients come later (:func:`is_due`).
    """
    adapter = recipe.adapter
    if not isinstance(adapter, MoRAMOptions):
        return
    from raymem.methods.moram import mark_selected, select_indices

    if adapter.init_from is not None:
        mark_selected(model)
    elif not adapter.needs_data:
        select_indices(model, criterion=adapter.criterion, seed=recipe.seed)


def is_due(recipe: Recipe, step: int) -> bool:
    """Whether connections are chosen by gradients before ``step`` (from 0)."""
    adapter = recipe.adapter
    if not isinstance(adapter, MoRAMOptions) or not adapter.needs_data:
        return False
    if step == 0:
        return adapter.init_from is None
    return adapter.refresh_every is not None and step % adapter.refresh_every == 0


def by_gradient(
    model: nn.Module, recipe: Recipe, layout: Layout, rows: PackedRows, sampler: Sampler, step: int
) -> None:  # fmt: skip
    """Choose by the gradients of the global batches from ``step`` on; every rank passes its share of them. Collective.

    Raises:
        ModelError: a layer whose gradient is zero or not finite (named).
    """
    adapter = recipe.adapter
    assert isinstance(adapter, MoRAMOptions)
    from raymem.methods.moram import select_indices

    batches: list[tuple[Batch, int]] = []
    for ahead in range(adapter.selection_batches):
        ids = sampler.ids(step + ahead)
        share = rank_batches(rows, ids, layout.rank, layout.world_size, recipe.train.rows_per_pass)
        batches += [(batch.to(layout.device), global_targets(rows, ids)) for batch in share]

    def loss(of: nn.Module, batch: tuple[Batch, int]) -> torch.Tensor:
        return forward_loss_sum(of, batch[0], mixed=recipe.train.precision == "bf16_mixed") / batch[1]

    log.info("choosing connections by the gradients of %d global batches", adapter.selection_batches)
    try:
        select_indices(model, batches, criterion=adapter.criterion, loss=loss, seed=recipe.seed)
    except AdapterError as error:
        raise ModelError(f"adapter: {error}") from None


def resumed(model: nn.Module, recipe: Recipe) -> None:
    """Take up the choice that a checkpoint brought. Collective.

    Raises:
        ModelError: the base is not the one that it was made for.
    """
    if not isinstance(recipe.adapter, MoRAMOptions):
        return
    from raymem.methods.moram import check_base, mark_selected

    mark_selected(model)
    try:
        check_base(model)
    except AdapterError as error:
        raise ModelError(f"model.name: {error}") from None

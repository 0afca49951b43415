"""Collects the hooks of a recipe, gives them their view of a run, and stores their part of a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raymem.hooks import Hook, RunView
from raymem.recipe.axes import MEMORY_AXES
from raymem.recipe.schema import Recipe
from raymem.training.data.batches import Batch
from raymem.training.loss import forward_loss_sum
from raymem.training.reporter import Row, unheard

log = logging.getLogger(__name__)


def hooks_of(recipe: Recipe, model: nn.Module) -> list[Hook]:
    """Return the hooks of a recipe's kinds, in the order in which they are called.

    Args:
        model: as ``build_model`` made it.
    """
    return [
        hook
        for name, axis in MEMORY_AXES.items()
        for hook in axis.of(recipe).hooks(getattr(recipe, name), model, recipe.seed)
    ]


def view_of(
    model: nn.Module, batches: Callable[[int], list[tuple[Batch, int]]], *, mixed: bool, planned: bool = False,
    doing: Callable[[str], None] = unheard,
) -> RunView:  # fmt: skip
    """Build the view of a run that hooks get.

    Args:
        batches: step -> micro-batches of this worker, each with the target tokens of its global batch.
    """

    def loss(of: nn.Module, batch: tuple[Batch, int]) -> torch.Tensor:
        return forward_loss_sum(of, batch[0], mixed=mixed) / batch[1]

    return RunView(model, batches, loss, planned, doing)


def metrics_of(hooks: Sequence[Hook], step: int, taken: Collection[str]) -> Row:
    """Collect the metrics that hooks report of a step.

    Raises:
        ValueError: a name that is in ``taken``, or that two of them use.
    """
    row: Row = {}
    for hook in hooks:
        figures = hook.metrics(step)
        for key in figures:
            if key in taken or key in row:
                raise ValueError(f"hook {hook.name!r} reports {key!r}, which is reported already; name it otherwise")
        row |= figures
    return row


def states_of(hooks: Sequence[Hook]) -> dict[str, dict[str, Any]]:
    """Collect the states of hooks by name, for a checkpoint.

    Raises:
        ValueError: two hooks of one name, or a state that JSON would give back as something else.
    """
    states: dict[str, dict[str, Any]] = {}
    for hook in hooks:
        if not (state := hook.state_dict()):
            continue
        if hook.name in states:
            raise ValueError(f"two hooks of this recipe are named {hook.name!r}; give each a name of its own")
        if json.loads(json.dumps(state)) != state:
            raise ValueError(
                f"the state of hook {hook.name!r} would come back from a checkpoint as something else: "
                f"{str(state)[:120]}; give dicts with text as keys, lists, texts, finite numbers, booleans and None"
            )
        states[hook.name] = state
    return states


def resume_hooks(
    hooks: Sequence[Hook], states: Mapping[str, dict[str, Any]], run: RunView, checkpoint: str
) -> None:  # fmt: skip
    """Give hooks the state that a checkpoint holds, once its tensors are loaded. Collective.

    A recipe may go on with other hooks than its checkpoint was written with (resume_rules.py says where); what that
    means for their state is said in a warning.

    Args:
        states: what :func:`states_of` gave.
        checkpoint: where it lies.
    """
    for hook in hooks:
        if hook.name in states:
            hook.load_state_dict(states[hook.name])
        elif hook.state_dict():
            log.warning("%s holds no state of %s, which begins anew", checkpoint, hook.name)
        hook.resumed(run)
    for name in sorted(set(states) - {hook.name for hook in hooks}):
        log.warning("%s holds state of %s, which this recipe does not use; it is dropped", checkpoint, name)

"""The activations axis: what is kept for the backward pass, where a method has to know about steps and runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raymem.errors import ModelError, RecipeError
from raymem.methods.loract import Compression, compress_activations
from raymem.methods.loract.config import LoRActOptions
from raymem.recipe.schema import Recipe

log = logging.getLogger(__name__)

_ATTRIBUTE = "raymem_activations"


def compress(model: nn.Module, recipe: Recipe) -> None:
    """Apply the recipe's compression, if it names one, to a complete model (wrapped, sharded, loaded or on meta).

    Raises:
        RecipeError: options that do not fit the model.
    """
    if not isinstance(recipe.activations, LoRActOptions):
        return
    try:
        handle = compress_activations(model, recipe.activations, seed=recipe.seed)
    except ModelError as error:
        raise RecipeError(f"activations.{error}") from None
    object.__setattr__(model, _ATTRIBUTE, handle)


def begin_step(model: nn.Module, step: int) -> None:
    """Tell a compressed model which step it is in; its sketches are seeded by that."""
    handle = _handle(model)
    if handle is not None:
        handle.begin_step(step)


def settle(model: nn.Module, decided: Mapping[str, int], forward: Callable[[], None]) -> dict[str, int]:
    """Fix what a method decides by looking at data before the first step. Collective.

    Args:
        decided: what a checkpoint of this run says.
        forward: runs the first step's batches through the model, without a backward pass.

    Returns:
        Site -> rank, for the checkpoints of this run; empty where nothing is to be decided.
    """
    handle = _handle(model)
    if handle is None or handle.options.rank != "auto":
        return {}
    if set(decided) != set(handle.ranks):
        if decided:
            log.warning("activations: the checkpoint holds ranks of other sites; they are chosen anew")
        with handle.calibration():
            forward()
    else:
        handle.set_ranks(decided)
    return handle.ranks


def metrics(model: nn.Module, step: int) -> dict[str, float]:
    """Mean relative error of the compressed activations, in the steps in which it is measured."""
    handle = _handle(model)
    every = 0 if handle is None else handle.options.report_every
    if handle is None or not every or step % every:
        return {}
    errors = handle.errors().values()
    return {"activation_error": sum(errors) / len(errors)} if errors else {}


def _handle(model: nn.Module) -> Compression | None:
    found: Any = model.module if isinstance(model, DistributedDataParallel) else model
    return found.__dict__.get(_ATTRIBUTE)  # type: ignore[no-any-return]

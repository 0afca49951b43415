"""Asks a model for the loss of a micro-batch; nothing else asks for loss or logits in training.

A model is prepared once (:func:`prepare`); from then on its forward pass answers a call that brings ``targets`` with
the summed loss. It does so inside its own ``forward``, so that whatever wraps the model (PEFT, DDP, FSDP2) works as
ever and sees the loss as the model's output.
"""

from __future__ import annotations

import functools
import logging
import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raymem.kinds import IGNORED, LossFunction, LossKind
from raymem.training.data.batches import Batch

log = logging.getLogger(__name__)

_ATTRIBUTE = "raymem_loss"

# B rows of a micro-batch, S tokens of a row, N = B * S positions, T positions with a target, V vocabulary


class Targets(NamedTuple):
    """The targets of a micro-batch, as a forward pass gets them."""

    ids_N: torch.Tensor
    """int64[N], the token that each position of the flattened rows predicts; -100 where there is none."""
    positions_T: torch.Tensor
    """int64[T], the positions that have a target; the host knows their number, so nothing waits for the device."""


def forward_loss_sum(model: nn.Module, batch: Batch, *, mixed: bool) -> torch.Tensor:
    """Run the forward pass of one micro-batch; return its summed cross-entropy in nats, 0-dim fp32.

    Args:
        model: prepared (:func:`prepare`), and wrapped by whatever trains it.
        mixed: run it under bf16 autocast.
    """
    if batch.position_ids is not None and _attention(model) == "flash_attention_2":
        batch = batch.flattened()  # it keeps packed examples apart only within a single row
    assert batch.target_positions is not None
    # Other models would take `targets` for an argument to be passed on, and answer with logits.
    assert _ATTRIBUTE in _base_model(_unwrapped(model)).__dict__, "prepare() comes first"
    targets = Targets(F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten(), batch.target_positions)
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=mixed):
        loss: torch.Tensor = model(**batch.model_inputs(), targets=targets)
    return loss


def prepare(model: nn.Module, kind: LossKind[Any], options: Any) -> None:
    """Make a complete model (with its adapter, loaded or on meta) answer calls with ``targets`` by the summed loss.

    Raises:
        RecipeError: the loss is not right for this model.
    """
    base = _base_model(model)
    base.__dict__[_ATTRIBUTE] = kind.prepare(base, options)
    if (note := loss_of(model).note) is not None:
        log.warning(note)

    @functools.wraps(type(base).forward)  # libraries look at the signature
    def forward(self: Any, *args: Any, targets: Targets | None = None, **inputs: Any) -> Any:
        if targets is None:
            return type(self).forward(self, *args, **inputs)
        assert not args, "a batch comes by name"
        return self.__dict__[_ATTRIBUTE](self, inputs, *targets)

    base.__dict__["forward"] = types.MethodType(forward, base)  # bound, so that a copy of the model gets its own


def loss_of(model: nn.Module) -> LossFunction:
    """Return the loss of a prepared model."""
    loss: LossFunction = _base_model(model).__dict__[_ATTRIBUTE]
    return loss


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attention(model: Any) -> str | None:
    return getattr(_unwrapped(model).config, "_attn_implementation", None)


def _unwrapped(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model

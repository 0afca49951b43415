"""Lets a causal language model answer a trainer's ``labels`` by raymem's loss, without the logits of whole rows."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F

from raymem.errors import RecipeError
from raymem.kinds import IGNORED, LossKind
from raymem.training.loss import Targets, loss_of, prepare


def targets_of(labels: torch.Tensor, *, shifted: bool = False) -> Targets:
    """Return the targets of rows; waits for the device.

    Args:
        labels: int64[B, S], -100 where there is no loss.
        shifted: position i holds the token that it predicts, rather than its own.
    """
    ids_N = (labels if shifted else F.pad(labels[:, 1:], (0, 1), value=IGNORED)).flatten()
    return Targets(ids_N, (ids_N != IGNORED).nonzero()[:, 0])


def answer_labels(model: Any, base: Any, kind: LossKind[Any], options: Any) -> list[int]:
    """Make the forward pass of a model return the loss alone, where it is given labels.

    ``num_items_in_batch`` divides the sum, as transformers has it; without it the loss is the mean over the targets.
    In the place of labels a plan gives ``targets``. Calls with neither, such as those of ``generate``, stay as they
    are.

    Args:
        model: complete, perhaps wrapped by PEFT.
        base: the transformers model in it.

    Returns:
        A list that gets a 1 with each call that brings labels.

    Raises:
        RecipeError: the loss is not right for this model.
    """
    _refuse_other_losses(base)
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        raise RecipeError(
            "loss: this model's own loss has a part for its router (output_router_logits), which raymem's has not; set "
            "model.config.output_router_logits = False, or leave loss out"
        )
    prepare(model, kind, options)
    calls: list[int] = []
    names = list(inspect.signature(type(base).forward).parameters)[1:]

    @functools.wraps(type(base).forward)  # trainers look at the signature
    def forward(
        self: Any, *args: Any, labels: Any = None, shift_labels: Any = None, targets: Targets | None = None,
        num_items_in_batch: Any = None, return_dict: bool | None = None, **inputs: Any,
    ) -> Any:  # fmt: skip
        inputs |= dict(zip(names, args, strict=False))
        labels = inputs.pop("labels", labels)
        if labels is None and shift_labels is None and targets is None:
            if return_dict is not None:
                inputs["return_dict"] = return_dict
            return type(self).forward(self, **inputs)
        if targets is None:
            calls.append(1)
            targets = targets_of(labels) if shift_labels is None else targets_of(shift_labels, shifted=True)
        inputs["use_cache"] = False
        loss = loss_of(self)(self, inputs, *targets)
        loss = loss / (max(1, len(targets.positions_T)) if num_items_in_batch is None else num_items_in_batch)
        return (loss,) if return_dict is False else _output(loss)

    base.__dict__["forward"] = types.MethodType(forward, base)  # bound, so that a copy of the model gets its own
    return calls


def _refuse_other_losses(base: Any) -> None:
    """Refuse a model whose own loss is not the cross-entropy of the next token.

    Raises:
        RecipeError: it is not.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    if LOSS_MAPPING.get(getattr(base, "loss_type", None)) is not ForCausalLMLoss:
        raise RecipeError(
            f"loss: {type(base).__name__} is no causal language model of transformers, whose loss raymem's stands for; "
            "leave loss out"
        )


def _output(loss: torch.Tensor) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(loss=loss)

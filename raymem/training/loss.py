"""The loss axis: the one place where a model is asked for the loss of a micro-batch, and the only one for its logits.

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

from raymem.errors import RecipeError
from raymem.memory.trace import attribute, attribute_backward
from raymem.methods import chunked_loss
from raymem.methods.chunked_loss import Choice
from raymem.training.data.batches import IGNORED, Batch

log = logging.getLogger(__name__)

_ATTRIBUTE = "raymem_loss"

# B rows of a micro-batch, S tokens of a row, N = B * S positions, T positions with a target, V vocabulary


class Targets(NamedTuple):
    """What a micro-batch is to predict, as a forward pass gets it."""

    ids_N: torch.Tensor
    """int64[N], the token that each position of the flattened rows predicts; -100 where there is none."""
    positions_T: torch.Tensor
    """int64[T], where there is one; their number is known to the host, so nothing waits for the device."""


def forward_loss_sum(model: nn.Module, batch: Batch, *, mixed: bool) -> torch.Tensor:
    """Forward pass of one micro-batch and its summed cross-entropy in nats, 0-dim fp32.

    Args:
        model: prepared (:func:`prepare`), and wrapped by whatever trains it.
        mixed: run it under bf16 autocast.
    """
    if batch.position_ids is not None and _attention(model) == "flash_attention_2":
        batch = batch.flattened()  # it keeps packed examples apart only within a single row
    assert batch.target_positions is not None
    # Other models would take `targets` for an argument to be passed on, and answer with logits.
    assert _ATTRIBUTE in _bare(_unwrapped(model)).__dict__, "prepare() comes first"
    targets = Targets(F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten(), batch.target_positions)
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=mixed):
        loss: torch.Tensor = model(**batch.model_inputs(), targets=targets)
    return loss


def prepare(model: nn.Module, kind: str) -> None:
    """Make a complete model (with its adapter, loaded or on meta) answer calls with ``targets`` by the summed loss.

    Args:
        kind: ``auto``, ``chunked`` or ``full``.

    Raises:
        RecipeError: ``loss: chunked`` for a model whose loss cannot be taken in chunks.
    """
    bare = _bare(model)
    bare.__dict__[_ATTRIBUTE] = _choose(bare, kind)
    if (note := why_full(model)) is not None:
        log.warning(note)

    @functools.wraps(type(bare).forward)  # libraries look at the signature
    def forward(self: Any, *args: Any, targets: Targets | None = None, **inputs: Any) -> Any:
        if targets is None:
            return type(self).forward(self, *args, **inputs)
        assert not args, "a batch comes by name"
        return _loss_sum(self, inputs, targets)

    bare.__dict__["forward"] = types.MethodType(forward, bare)  # bound, so that a copy of the model gets its own


def is_chunked(model: nn.Module) -> bool:
    """Whether a prepared model takes its loss in chunks."""
    choice: Choice = _bare(model).__dict__[_ATTRIBUTE]
    return choice.chunked


def why_full(model: nn.Module) -> str | None:
    """In a sentence, why a prepared model of ``loss: auto`` does not take its loss in chunks; None if it does."""
    bare = _bare(model)
    choice: Choice = bare.__dict__[_ATTRIBUTE]
    if choice.reason is None:
        return None
    return (
        f"loss: auto is full for {type(bare).__name__}, because the chunked loss is not right for it: {choice.reason}"
    )


def _bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _loss_sum(model: Any, inputs: dict[str, Any], targets: Targets) -> torch.Tensor:
    choice: Choice = model.__dict__[_ATTRIBUTE]
    if choice.chunked:
        return chunked_loss.chunked_loss_sum(model, inputs, *targets, replay=choice.replay)
    return _full_loss_sum(model, inputs, targets)


def _full_loss_sum(model: Any, inputs: dict[str, Any], targets: Targets) -> torch.Tensor:
    """Cross-entropy of the logits of all positions, in fp32."""
    hidden: list[torch.Tensor] = []

    def enter(head: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        hidden.append(given[0])
        attribute("loss")

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(enter)
    try:
        logits_NV = type(model).forward(model, **inputs).logits.flatten(0, -2)
    finally:
        if handle is not None:
            handle.remove()
    loss = F.cross_entropy(logits_NV.float(), targets.ids_N, ignore_index=IGNORED, reduction="sum")
    attribute(None)
    if hidden:
        attribute_backward("loss", since=loss, until=hidden[-1])
    return loss


def _choose(bare: Any, kind: str) -> Choice:
    if kind == "full":
        return Choice(chunked=False, replay=False, reason=None)
    choice = chunked_loss.choose(bare)
    name = type(bare).__name__
    if not choice.chunked and kind == "chunked":
        raise RecipeError(
            f"loss: chunked is not right for {name}: {choice.reason}; use loss: full, or auto, which takes it by itself"
        )
    return choice


def _attention(model: Any) -> str | None:
    return getattr(_unwrapped(model).config, "_attn_implementation", None)


def _unwrapped(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model

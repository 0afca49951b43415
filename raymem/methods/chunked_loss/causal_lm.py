"""Takes the chunked loss of a transformers causal language model, through the model's own code.

A forward pass is run with a stand-in for the output head, which keeps what it is given and returns next to nothing; so
everything up to the head, with whatever wraps it, is the model's own. Then one of two ways:

* ``product``: the head is a plain matrix and its products are the logits. :mod:`..product` does the rest.
* ``replay``: the head has a bias, a LoRA, 4-bit weights, or something follows it (soft-capping, scaling). The model's
  own forward is run again for each chunk with a stand-in for all that comes before the head, recomputed in backward.

Whether a way is right for an architecture is no matter of its name: :mod:`..probe` tries it on a small clone.

Shapes: B rows of S tokens, N = B * S positions, T with a target, C of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from raymem.kinds import IGNORED
from raymem.memory.target import worth_visiting
from raymem.memory.trace import attribute_backward, attributed
from raymem.methods.chunked_loss.product import cross_entropy_sum
from raymem.methods.chunked_loss.rows import rows_per_chunk

_REPLAY_BYTES_PER_LOGIT = 16
"""Logits in their own dtype and in fp32, log-probabilities, and the gradients of both."""


def is_plain_product(head: Any) -> bool:
    """Say whether a head does nothing but multiply by its weight, here and now."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and not isinstance(head.weight, DTensor)  # sharded on its own: only calling it gathers it
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__)
    )


def chunked_loss_sum(
    model: Any, inputs: dict[str, Any], targets_N: torch.Tensor, positions_T: torch.Tensor, *, replay: bool = False
) -> torch.Tensor:
    """Compute the summed cross-entropy of one micro-batch, in nats; 0-dim fp32.

    Args:
        model: a causal language model of transformers, the bare one (not what wraps it).
        inputs: keyword arguments of its forward pass, without labels.
        targets_N: int64, the token that each position of the flattened rows predicts.
        positions_T: int64, the positions whose prediction counts, without repetition.
        replay: go through the model's own head also where it is a plain product; other heads always do.

    Raises:
        RuntimeError: the model does not call its head, or what comes before it, as a causal language model does.
    """
    if replay or not is_plain_product(model.get_output_embeddings()):
        return _by_replay(model, inputs, targets_N, positions_T)
    hidden = head_input(model, inputs)
    head = model.get_output_embeddings()
    with attributed("loss"):
        loss = cross_entropy_sum(hidden.flatten(0, -2), head.weight, targets_N, positions_T)
    attribute_backward("loss", since=loss, until=hidden)
    return loss


def head_input(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states that the model's forward pass gives to its output head [B, S, H].

    Raises:
        RuntimeError: it does not call the head exactly once.
    """
    with _stand_in_head(model) as head_inputs:
        type(model).forward(model, **inputs)
    if len(head_inputs) != 1:
        raise RuntimeError(f"{type(model).__name__} calls its output head {len(head_inputs)} times in a forward pass")
    return head_inputs[0]


def _by_replay(
    model: Any, inputs: dict[str, Any], targets_N: torch.Tensor, positions_T: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    backbone, output = _run_backbone(model, inputs)
    hidden = output[0]

    def chunk_loss(hidden_CH: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return type(output)(last_hidden_state=hidden_CH[None])

        with _replaced_forward(backbone, stand_in):
            logits_CV = type(model).forward(model, **inputs).logits[0]
        return F.cross_entropy(logits_CV.float(), targets_C, ignore_index=IGNORED, reduction="sum")

    head = model.get_output_embeddings()
    vocabulary = getattr(head, "out_features", None) or model.config.get_text_config().vocab_size
    rows = rows_per_chunk(vocabulary, _REPLAY_BYTES_PER_LOGIT, hidden.device)
    with attributed("loss"):
        if len(positions_T):
            targets_T = targets_N.index_select(0, positions_T)
        else:  # whatever is trained of the head gets its gradient, zeros: other workers wait for it
            positions_T = positions_T.new_zeros(1)
            targets_T = positions_T.new_full((1,), IGNORED)
        hidden_TH = hidden.flatten(0, -2).index_select(0, positions_T)
        parts = list(zip(torch.split(hidden_TH, rows), torch.split(targets_T, rows), strict=True))
        loss = torch.zeros((), device=hidden.device)
        for index in worth_visiting(range(len(parts))):
            if torch.is_grad_enabled():
                loss = loss + checkpoint(chunk_loss, *parts[index], use_reentrant=False)
            else:
                loss = loss + chunk_loss(*parts[index])
    attribute_backward("loss", since=loss, until=hidden)
    return loss


def _run_backbone(model: Any, inputs: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Return the module before the head, and its output, of which the hidden states are the first part.

    Raises:
        RuntimeError: the model's forward pass calls none of the modules that transformers names for it.
    """
    entered: list[nn.Module] = []
    outputs: dict[nn.Module, Any] = {}

    def watching(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            entered.append(module)
            outputs[module] = forward(*args, **kwargs)
            return outputs[module]

        return watched

    candidates = {module for module in (model.base_model, model.get_decoder()) if module is not model}
    with _stand_in_head(model), contextlib.ExitStack() as stack:
        for module in candidates:
            stack.enter_context(_replaced_forward(module, watching(module, module.forward)))
        type(model).forward(model, **inputs)
    if not entered:
        raise RuntimeError(f"{type(model).__name__} has no module of its own for all that comes before the head")
    return entered[0], outputs[entered[0]]  # the outermost one is entered first


@contextlib.contextmanager
def _stand_in_head(model: Any) -> Iterator[list[torch.Tensor]]:
    """Let the head in the block keep its input in the list and return one column of it instead of logits."""
    head_inputs: list[torch.Tensor] = []

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        head_inputs.append(hidden)
        return hidden[..., :1].detach()

    with _replaced_forward(model.get_output_embeddings(), keep):
        yield head_inputs


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

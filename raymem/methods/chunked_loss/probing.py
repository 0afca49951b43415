"""Whether the chunked loss is right for an architecture: asked of a small clone with random weights, not of a list.

The clone has the class and every option of the model but its sizes. Its whole logits are compared with what its head
makes of its input, and the loss and all gradients of both ways (:mod:`..causal_lm`) with those of the whole logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from raymem.methods.chunked_loss.causal_lm import chunked_loss_sum, head_input, is_plain_product
from raymem.methods.probe import first_line, why_not
from raymem.methods.tiny_model import VOCABULARY, random_clone
from raymem.seeds import generator

_ROWS, _LENGTH = 2, 12
_TOLERANCE = 1e-4
"""Largest difference of gradients (relative, in norm) and losses. All is fp32: rounding gives 1e-6, and a scaling or
soft-capping that is left out is off by 0.01 and more on logits of this size."""
_LOGITS_SIZE = 20.0
"""Standard deviation that the logits of the clone get, so that soft-capping counts."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on both ways."""

    product: bool
    """The logits are the product of the head's input and weight."""
    replay: bool
    """The model's own forward gives the right logits for a chunk of positions alone."""
    reason: str | None
    """The reason why not both are right."""


def probe(config: Any, kind: Any = None) -> Verdict:
    """Try both ways on a clone of a model; a clone that cannot be built or run proves neither.

    Args:
        config: the transformers config of a causal language model.
        kind: its class, where transformers has another one for such a config.
    """
    try:
        model = random_clone(config, kind=kind)
        if model.get_output_embeddings() is None:
            return Verdict(False, False, "it has no output head that transformers knows")
        return _compare(model)
    except Exception as error:  # model code may raise anything
        return Verdict(False, False, why_not(error))


def _compare(model: Any) -> Verdict:
    source = generator(0, "loss", "probe")
    ids = torch.randint(3, VOCABULARY, (_ROWS, _LENGTH), generator=source)
    targets_N = torch.randint(3, VOCABULARY, (_ROWS * _LENGTH,), generator=source)
    positions_T = torch.randperm(_ROWS * _LENGTH, generator=source)[: _ROWS * _LENGTH // 3]  # not as many as a row
    inputs = {"input_ids": ids, "use_cache": False}
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(_LOGITS_SIZE / head(head_input(model, inputs)).std())

    def whole() -> torch.Tensor:
        logits = model(**inputs).logits.flatten(0, 1)
        return F.cross_entropy(logits[positions_T].float(), targets_N[positions_T], reduction="sum")

    expected = _loss_and_gradients(model, whole)
    differences: dict[str, str | None] = {}
    for way in ("product", "replay"):

        def chunked(way: str = way) -> torch.Tensor:
            return chunked_loss_sum(model, inputs, targets_N, positions_T, replay=way == "replay")

        try:
            differences[way] = _difference(expected, _loss_and_gradients(model, chunked))
        except Exception as error:  # as above
            differences[way] = f"{type(error).__name__}: {first_line(error)}"
    if differences["product"] is None:
        differences["product"] = _not_the_product(model, inputs)
    reasons = [f"{way}: {text}" for way, text in differences.items() if text is not None]
    return Verdict(differences["product"] is None, differences["replay"] is None, "; ".join(reasons) or None)


def _not_the_product(model: Any, inputs: dict[str, Any]) -> str | None:
    """Describe how the logits are made if a plain product does not make them; None if it does."""
    head = model.get_output_embeddings()
    if not is_plain_product(head):
        return f"its head is a {type(head).__name__} with more than a weight"
    with torch.no_grad():
        is_same = torch.equal(model(**inputs).logits, head(head_input(model, inputs)))
    return None if is_same else "something follows its head"


def _loss_and_gradients(model: Any, run: Any) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = run()
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [loss.detach(), *gradients]


def _difference(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> str | None:
    for what, theirs, ours in zip(("loss", *["gradients"] * len(expected)), expected, actual, strict=False):
        if not float((ours - theirs).norm()) <= _TOLERANCE * float(theirs.norm()) + 1e-6:
            return f"{what} differ: {float((ours - theirs).norm()):.1e} of {float(theirs.norm()):.1e}"
    return None

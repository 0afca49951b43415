"""Chooses the way of the chunked loss for a model, if any, by the probe of its architecture and by its head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.methods.chunked_loss.causal_lm import is_plain_product
from raymem.methods.chunked_loss.probing import Verdict, probe
from raymem.methods.probe import asked_once, class_of


@dataclass(frozen=True)
class Choice:
    """The way to compute the loss of a model."""

    chunked: bool
    """False where no way of taking it in chunks is right."""
    replay: bool
    """Through the model's own head (:func:`raymem.methods.chunked_loss.chunked_loss_sum`)."""
    reason: str | None
    """The reason why the loss cannot be chunked."""


def choose(model: Any) -> Choice:
    """Choose for a causal language model of transformers: the bare one, with whatever an adapter made of its head."""
    verdict = verdict_of(model)
    if verdict.product and is_plain_product(model.get_output_embeddings()):
        return Choice(chunked=True, replay=False, reason=None)
    if verdict.replay:
        return Choice(chunked=True, replay=True, reason=None)
    return Choice(chunked=False, replay=False, reason=verdict.reason)


def verdict_of(model: Any) -> Verdict:
    """Return the verdict of :func:`probe` on an architecture; asked once per class, options and versions here."""
    sources = (Path(__file__).parent,)
    return Verdict(**asked_once("loss", model, sources, lambda: vars(probe(model.config, class_of(model)))))

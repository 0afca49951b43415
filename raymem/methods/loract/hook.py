"""Serves LoRAct in a run of a recipe: names every step to it, and settles ``rank: auto`` before the first one."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from raymem.hooks import Hook, RunView
from raymem.methods.loract.compression import compression_of

log = logging.getLogger(__name__)


class LoRActHook(Hook):
    """Serves a compressed model. Its state is what ``rank: auto`` chose: a resumed run goes on with the same ranks."""

    name = "loract"

    def __init__(self, model: nn.Module) -> None:
        self._handle = compression_of(model)
        self._options = self._handle.options
        self._settled = self._options.rank != "auto"

    def before_step(self, step: int, run: RunView) -> None:
        if not self._settled:
            with self._handle.calibration():
                for batch in run.batches(step)[: 1 if run.planned else None]:  # none holds more than the first
                    run.loss(run.model, batch)
            self._settled = True
        # Of the steps that a plan stands for, those hold the most in which errors are measured, and 0 is such a step.
        self._handle.begin_step(0 if run.planned else step)

    def metrics(self, step: int) -> dict[str, float]:
        """Mean relative error of the compressed activations, in the steps in which it is measured."""
        every = self._options.report_every
        errors = self._handle.errors().values() if every and step % every == 0 else ()
        return {"activation_error": sum(errors) / len(errors)} if errors else {}

    def state_dict(self) -> dict[str, Any]:
        if self._options.rank != "auto":
            return {}
        return {"ranks": self._handle.ranks if self._settled else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ranks: dict[str, int] = state["ranks"]
        if self._options.rank != "auto":
            log.warning("activations.rank: %s takes the place of the ranks in the checkpoint", self._options.rank)
        elif set(ranks) == set(self._handle.ranks):
            self._handle.set_ranks(ranks)
            self._settled = True
        else:
            log.warning("activations: the checkpoint holds ranks of other sites; they are chosen anew")

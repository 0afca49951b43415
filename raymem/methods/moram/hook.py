"""Chooses MoRAM's connections in a run of a recipe: before the first step, and again where that is asked.

The choice is a function of the recipe and the data. It lies in buffers that every checkpoint holds, and is the same for
any number of workers up to the rounding of a sum over them.
"""

from __future__ import annotations

import math
import time

from raymem.errors import AdapterError, ModelError
from raymem.hooks import Hook, RunView
from raymem.methods.moram.config import MoRAMOptions
from raymem.methods.moram.selection import check_base, mark_selected, rehearse_selection, select_indices

_SAY_EVERY_S = 10.0


class MoRAMHook(Hook):
    """Chooses by the gradients of global batches; every rank passes its share of them."""

    name = "moram"

    def __init__(self, options: MoRAMOptions, seed: int) -> None:
        self._options = options
        self._seed = seed

    def before_step(self, step: int, run: RunView) -> None:
        """Choose, if that is due.

        Raises:
            ModelError: a layer whose gradient is zero or not finite (named).
        """
        if not self._is_due(step, run):
            return
        if run.planned:
            rehearse_selection(run.model, run.batches(step)[0], loss=run.loss, seed=self._seed)
            return
        count = self._options.selection_batches
        batches = [batch for ahead in range(count) for batch in run.batches(step + ahead)]
        said = -math.inf

        def progress(number: int, groups: int) -> None:
            nonlocal said
            if time.monotonic() - said < _SAY_EVERY_S:
                return
            said = time.monotonic()
            run.doing(f"choosing connections by {count} global batches, layers {number}/{groups}")

        criterion = self._options.criterion
        try:
            select_indices(run.model, batches, criterion=criterion, loss=run.loss, seed=self._seed, progress=progress)
        except AdapterError as error:
            raise ModelError(f"adapter: {error}") from None

    def resumed(self, run: RunView) -> None:
        """Take up the choice that the checkpoint brought.

        Raises:
            ModelError: the base is not the one that it was made for.
        """
        mark_selected(run.model)
        try:
            check_base(run.model)
        except AdapterError as error:
            raise ModelError(f"model.name: {error}") from None

    def _is_due(self, step: int, run: RunView) -> bool:
        if not self._options.needs_data:
            return False
        if step == 0:
            return self._options.init_from is None
        every = self._options.refresh_every
        return every is not None and (run.planned or step % every == 0)

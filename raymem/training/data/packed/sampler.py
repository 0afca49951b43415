"""Samples the rows that an optimizer step sees, as a pure function of (seed, step, global batch).

The order of rows is one endless sequence, epoch after epoch. Position p belongs to epoch ``p // epoch_size`` and step s
takes positions ``[s * global_batch, (s + 1) * global_batch)``, so a batch may straddle epochs. The number of workers
does not occur, and any step can be asked for directly: resuming, and growing or shrinking the worker group, repeat and
skip nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raymem.errors import DataError

RowIds = npt.NDArray[np.int64]


class Sampler:
    """Gives shuffled, weighted row ids by step.

    One epoch takes ``round(weight * rows)`` rows of each source: whole repeats, and a random subset for the rest that
    is drawn afresh in every epoch.

    Args:
        seed: of the run.
        sizes_and_weights: rows and weight of each source, in the numbering of :class:`PackedRows`.
        global_batch: rows per step over all workers.

    Raises:
        DataError: a weight is so small that a source gives no row at all.
    """

    def __init__(self, seed: int, sizes_and_weights: Sequence[tuple[int, float]], global_batch: int) -> None:
        self._seed = seed
        self._sizes = [size for size, _ in sizes_and_weights]
        self._counts = [round(weight * size) for size, weight in sizes_and_weights]
        self._global_batch = global_batch
        self._orders: dict[int, RowIds] = {}
        for index, (size, weight) in enumerate(sizes_and_weights):
            if self._counts[index] == 0:
                raise DataError(
                    f"data.train[{index}].weight={weight:g} takes none of its {size} rows per epoch: "
                    f"raise it to at least {1 / max(size, 1):.3g} or remove the source."
                )

    @property
    def epoch_size(self) -> int:
        """Rows per epoch."""
        return sum(self._counts)

    def steps_for(self, epochs: float) -> int:
        """Count the steps that see at least ``epochs`` epochs; at least 1."""
        rows = max(1, round(epochs * self.epoch_size))
        return -(-rows // self._global_batch)

    def ids(self, step: int) -> RowIds:
        """Return int64[global_batch]: row ids of optimizer step ``step`` >= 0."""
        positions = np.arange(step * self._global_batch, (step + 1) * self._global_batch, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.epoch_size)
        needed = range(int(epochs[0]), int(epochs[-1]) + 1)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in needed}
        return np.concatenate([self._orders[epoch][offsets[epochs == epoch]] for epoch in needed])

    def _order(self, epoch: int) -> RowIds:
        """Return int64[epoch_size]: the rows of one epoch in order."""
        generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        parts: list[RowIds] = []
        first = 0
        for size, count in zip(self._sizes, self._counts, strict=True):
            repeats, rest = divmod(count, size)
            parts += [np.arange(first, first + size)] * repeats
            parts.append(first + generator.permutation(size)[:rest])
            first += size
        return generator.permutation(np.concatenate(parts).astype(np.int64))

"""Gives what comes before a step its look at a trainer's batches: those of the steps ahead, and the largest one.

Batches are collated once more, apart from the trainer's own iteration: nothing is taken from it, and the streams of
random numbers are left as they are.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

_ROWS_AT_ONCE = 10_000


class Upcoming:
    """The micro-batches that a data loader gives this process.

    Args:
        loader: of torch, or what accelerate or Lightning made of one.
        accumulation: micro-batches per step.
        device: where the batches are put.
    """

    def __init__(self, loader: Any, accumulation: int, device: torch.device) -> None:
        self._loader: DataLoader[Any] = getattr(loader, "base_dataloader", loader)
        self._accumulation, self._device = accumulation, device
        self._is_stream = isinstance(self._loader.dataset, IterableDataset)

    def of_step(self, step: int) -> list[Any]:
        """Return the micro-batches of an optimizer step (from 0), in its epoch's order.

        A stream is read from its beginning. Where the loader's order is drawn from the global stream of random
        numbers, these are batches of the same data, but not the very ones of that step.
        """
        per_epoch = None if self._is_stream else -(-len(self._loader) // self._accumulation)
        epoch, position = (0, step) if per_epoch is None else divmod(step, per_epoch)
        first = position * self._accumulation
        with _streams_kept():
            batches = itertools.islice(self._batches(epoch, first), self._accumulation)
            return [_moved(batch, self._device) for batch in batches]

    def largest(self, looked_at: int = 8) -> Any:
        """Return a micro-batch as large as any: the longest rows of the data together.

        Of a stream, and of rows whose length only the collator decides, the largest of the first ``looked_at`` ones.
        """
        lengths = None if self._is_stream else _row_lengths(self._loader.dataset)
        with _streams_kept():
            # accelerate's loaders have the size in their sampler alone
            rows = self._loader.batch_size or getattr(self._loader.batch_sampler, "batch_size", None)
            if lengths is not None and rows is not None:
                longest = np.argsort(-lengths, kind="stable")[:rows]
                return _moved(self._collated([int(index) for index in longest]), self._device)
            batches = list(itertools.islice(self._batches(0, 0), looked_at))
        return _moved(max(batches, key=_size), self._device)

    def _batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Yield an epoch's batches from number ``first`` on."""
        if self._is_stream:
            yield from itertools.islice(iter(self._loader), first, None)
            return
        sampler = _copied(self._loader.batch_sampler, self._loader.dataset)
        for part in _chain(sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for indices in itertools.islice(iter(sampler), first, None):
            yield self._collated(indices)

    def _collated(self, indices: list[int]) -> Any:
        dataset: Any = self._loader.dataset
        rows = dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[i] for i in indices]
        return self._loader.collate_fn(rows)


def _chain(sampler: Any) -> Iterator[Any]:
    """Yield a batch sampler and the samplers inside of it."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def _copied(sampler: Any, dataset: Any) -> Any:
    """Copy a sampler with its generators, but not the data that it looks at."""
    kept = [dataset, *(getattr(part, name, None) for part in _chain(sampler) for name in ("data_source", "dataset"))]
    return copy.deepcopy(sampler, {id(data): data for data in kept if data is not None})


def _row_lengths(dataset: Any) -> Any:
    """Return the number of tokens of each row, int64[N]; None where rows hold no ``input_ids``."""
    if "input_ids" in (getattr(dataset, "column_names", None) or ()):
        import pyarrow.compute as pc

        tables = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
        parts = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
        return np.concatenate(parts).astype(np.int64)
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]:
        return np.array([len(row["input_ids"]) for row in dataset], np.int64)
    return None


def _size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor))


def _moved(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


@contextlib.contextmanager
def _streams_kept() -> Iterator[None]:
    """Leave the global streams of random numbers as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

"""Makes micro-batches of torch tensors of rows, equal in number and shape on every worker.

Shapes: B rows per micro-batch, S tokens per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from raymem.kinds import IGNORED
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.sampler import RowIds


@dataclass(frozen=True)
class Batch:
    """A micro-batch. ``labels`` are not shifted: the model's loss predicts ``labels[:, 1:]`` from ``[:, :-1]``."""

    input_ids: torch.Tensor
    """int64[B, S]"""
    labels: torch.Tensor
    """int64[B, S]; -100 where there is no loss, which includes the first token of every segment."""
    position_ids: torch.Tensor | None
    """int64[B, S], restarting at 0 with every segment (packing bfd; the padding is one more segment); otherwise None:
    positions are 0 .. S-1."""
    attention_mask: torch.Tensor | None
    """int64[B, S], 0 on padding (packing none); otherwise None."""
    target_positions: torch.Tensor | None = None
    """int64[T], ascending: the positions of the flattened rows whose next token has a label. By default found in
    ``labels``, which the host must have then: a step that asked a device for them would wait for it."""

    def __post_init__(self) -> None:
        if self.target_positions is None:
            is_target_BS = torch.zeros_like(self.labels, dtype=torch.bool)
            is_target_BS[:, :-1] = self.labels[:, 1:] != IGNORED
            object.__setattr__(self, "target_positions", is_target_BS.flatten().nonzero()[:, 0])

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on ``device``."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=moved(self.position_ids),
            attention_mask=moved(self.attention_mask),
            target_positions=moved(self.target_positions),
        )

    def model_inputs(self) -> dict[str, torch.Tensor | bool]:
        """Return the keyword arguments of a transformers model, without the labels.

        ``use_cache`` is always false: given a key-value cache, transformers does not look at the position ids for
        packed segments, and examples of one row would silently attend to each other.
        """
        inputs: dict[str, torch.Tensor | bool] = {"input_ids": self.input_ids, "use_cache": False}
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        return inputs

    def flattened(self) -> Batch:
        """Return the same loss terms as one row [1, B * S]; needs position ids.

        FlashAttention in transformers keeps segments apart only where the batch has a single row.
        """
        assert self.position_ids is not None and self.attention_mask is None
        return replace(
            self,
            input_ids=self.input_ids.view(1, -1),
            labels=self.labels.view(1, -1),
            position_ids=self.position_ids.view(1, -1),
        )


def global_targets(rows: PackedRows, ids: RowIds) -> int:
    """Count the loss terms of a global batch, without communication."""
    return int(rows.num_targets[ids].sum(dtype=np.int64))


def rank_batches(rows: PackedRows, ids: RowIds, rank: int, world: int, micro_batch: int) -> list[Batch]:
    """Return the micro-batches of worker ``rank``, which takes ``ids[rank::world]``.

    Every rank gets the same number of micro-batches of the same shape, at most ``micro_batch`` rows each, because
    collectives must match; rows that are missing for that are filled up with rows without loss.
    """
    assert 0 <= rank < world
    mine, size = _split(ids, rank, world, micro_batch)
    return [_batch(rows, ids, size) for ids in mine]


def most_targets(rows: PackedRows, ids: RowIds, world: int, micro_batch: int) -> int:
    """Return the largest number of loss terms in a micro-batch of a global batch, over all ranks."""
    split = (part for rank in range(world) for part in _split(ids, rank, world, micro_batch)[0])
    return max(int(rows.num_targets[part].sum(dtype=np.int64)) for part in split)


def _split(ids: RowIds, rank: int, world: int, micro_batch: int) -> tuple[list[RowIds], int]:
    """Return the rows of each micro-batch of a rank, and the number that each is filled up to."""
    assert len(ids) > 0 and micro_batch > 0
    per_rank = -(-len(ids) // world)
    count = -(-per_rank // micro_batch)
    size = -(-per_rank // count)
    mine = ids[rank::world]
    return [mine[at * size : (at + 1) * size] for at in range(count)], size


def eval_batches(rows: PackedRows, rank: int, world: int, micro_batch: int) -> Iterator[Batch]:
    """Yield batches of worker ``rank`` that, over all ranks, hold every row exactly once, in a fixed order.

    Weights do not matter here. Number and shapes are the same on every rank, as in :func:`rank_batches`.
    """
    for first in range(0, len(rows), world * micro_batch):
        ids = np.arange(first, min(first + world * micro_batch, len(rows)), dtype=np.int64)
        yield from rank_batches(rows, ids, rank, world, micro_batch)


def _batch(rows: PackedRows, ids: RowIds, size: int) -> Batch:
    """Build a batch of ``size`` rows: those of ``ids``, then rows without loss."""
    input_ids_BS = np.zeros((size, rows.sequence_length), np.int64)
    labels_BS = np.full((size, rows.sequence_length), IGNORED, np.int64)
    starts_BS = np.zeros((size, rows.sequence_length), np.bool_)
    starts_BS[:, 0] = True
    # Rows that fill up the batch count as real tokens: a row that is all padding has nothing to attend to.
    lengths_B = np.full(size, rows.sequence_length, np.int64)
    for index, row_id in enumerate(ids):
        row = rows.row(int(row_id))
        input_ids_BS[index] = row.input_ids
        labels_BS[index] = np.where(row.targets, row.input_ids, IGNORED)
        starts_BS[index] = row.starts
        lengths_B[index] = row.length
    columns_S = np.arange(rows.sequence_length, dtype=np.int64)
    position_ids = attention_mask = None
    if rows.packing == "bfd":
        segment_start_BS = np.maximum.accumulate(np.where(starts_BS, columns_S, 0), axis=1)
        position_ids = torch.from_numpy(columns_S - segment_start_BS)
    elif rows.packing == "none":
        attention_mask = torch.from_numpy((columns_S < lengths_B[:, None]).astype(np.int64))
    return Batch(torch.from_numpy(input_ids_BS), torch.from_numpy(labels_BS), position_ids, attention_mask)

"""Reads packed rows back from memory-mapped shards; nothing is copied until a batch is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raymem.errors import DataError
from raymem.storage.publish import read_manifest
from raymem.training.data.packed.pack import Ids, Mask, Packing


@dataclass(frozen=True)
class Row:
    """A row of S tokens; the arrays are read-only views into the shard."""

    input_ids: Ids
    """int32[S]"""
    targets: Mask
    """bool[S]: token t is to be predicted. Already false at segment starts."""
    starts: Mask
    """bool[S]: first token of a segment."""
    length: int
    """The number of tokens that are not padding."""


class PackedRows:
    """All rows of several prepared directories, numbered through in the order given.

    Args:
        directories_with_weights: prepared directories and the weight of each (see :class:`Sampler`).

    Raises:
        DataError: a directory is unfinished, or directories differ in row length or packing.
    """

    sequence_length: int
    packing: Packing
    sizes_and_weights: list[tuple[int, float]]
    """Rows and weight of each directory, as :class:`Sampler` takes them."""
    num_targets: npt.NDArray[np.int32]
    """int32[N]: loss terms of each row. Every worker has all of them, so that the global count of a batch needs no
    communication."""
    lengths: npt.NDArray[np.int32]
    """int32[N]: tokens of each row that are not padding."""

    def __init__(self, directories_with_weights: Sequence[tuple[Path, float]]) -> None:
        assert directories_with_weights
        self.sizes_and_weights = []
        self._shards: list[_Shard] = []
        kinds: dict[tuple[int, Packing], Path] = {}
        for directory, weight in directories_with_weights:
            manifest = read_manifest(Path(directory))
            if manifest is None:
                raise DataError(f"{directory} is no finished data directory: run the preparation of the data again.")
            facts = manifest["facts"]
            kinds.setdefault((facts["sequence_length"], facts["packing"]), Path(directory))
            shards = [_Shard(Path(directory) / name) for name in facts["shards"]]
            self._shards += shards
            self.sizes_and_weights.append((sum(len(shard) for shard in shards), weight))
        if len(kinds) > 1:
            differences = "; ".join(f"{path} has {length}, {packing}" for (length, packing), path in kinds.items())
            raise DataError(f"sources of one run need one sequence_length and packing, but {differences}.")
        ((self.sequence_length, self.packing),) = kinds
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.num_targets = np.concatenate([shard.num_targets for shard in self._shards])
        self.lengths = np.concatenate([shard.lengths for shard in self._shards])

    def __len__(self) -> int:
        return len(self.num_targets)

    def row(self, index: int) -> Row:
        """Return row ``index`` of all, 0 <= index < len(self)."""
        assert 0 <= index < len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        at = index - (int(self._ends[number]) - len(shard))
        return Row(shard.input_ids[at], shard.targets[at], shard.starts[at], int(shard.lengths[at]))

    def needs_mask(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> bool:
        """Say whether attention needs a mask for one of these rows: it holds several examples, or padding."""
        if self.packing == "bfd":  # padding is a segment too
            return any(int(self.row(int(one)).starts.sum()) > 1 for one in ids)
        return self.packing == "none" and bool((self.lengths[np.asarray(ids)] < self.sequence_length).any())


class _Shard:
    """An Arrow IPC file with a single record batch."""

    def __init__(self, path: Path) -> None:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        self.lengths = cast(Ids, _flat(batch, "length"))
        self.num_targets = cast(Ids, _flat(batch, "num_targets"))
        rows = len(self.lengths)
        self.input_ids = cast(Ids, _flat(batch, "input_ids").reshape(rows, -1))
        self.targets = _flat(batch, "targets").view(np.bool_).reshape(rows, -1)
        self.starts = _flat(batch, "starts").view(np.bool_).reshape(rows, -1)

    def __len__(self) -> int:
        return len(self.lengths)


def _flat(batch: Any, name: str) -> npt.NDArray[Any]:
    column = batch.column(name)
    values = column.values if pa.types.is_fixed_size_list(column.type) else column
    return cast(npt.NDArray[Any], values.to_numpy(zero_copy_only=True))

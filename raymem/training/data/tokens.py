"""Reads rows that are token ids already: ``input_ids``, ``labels`` and ``attention_mask``, as in transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raymem.errors import DataError
from raymem.training.data.packed.pack import Encoded, Ids, Mask
from raymem.training.data.turns import described

IGNORED = -100
"""The label of a token that is no target."""
_LEAST, _MOST = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class Tokens:
    """Token ids without padding, with marks of those that are to be predicted."""

    input_ids: Ids
    """int32[T]"""
    targets: Mask
    """bool[T]"""

    def encoded(self, vocabulary: int, where: str) -> Encoded:
        """Return the example for packing; nothing is added. It may go on in another row if all of it is a target.

        Args:
            vocabulary: ids of the tokenizer are below this.

        Raises:
            DataError: an id is not one of them.
        """
        outside = np.flatnonzero((self.input_ids < 0) | (self.input_ids >= vocabulary))
        if len(outside):
            raise DataError(
                f"{where} input_ids has {self.input_ids[outside[0]]}, but the ids of the tokenizer are 0 to "
                f"{vocabulary - 1}: set model.tokenizer to the one that the rows were made with."
            )
        return Encoded(self.input_ids, self.targets, splittable=bool(self.targets.all()))


def tokens(row: dict[str, Any], where: str) -> Tokens:
    """Read a row in our names.

    ``labels[i]`` is the target of position i, which the model predicts from the tokens before it; without labels every
    token is a target. Positions where ``attention_mask`` is 0 are padding and left out.

    Raises:
        DataError: a value is of another type or length, or contradicts the others; begins with ``where``.
    """
    input_ids = _integers(row, "input_ids", where)
    labels = _beside(row, "labels", len(input_ids), where)
    mask = _beside(row, "attention_mask", len(input_ids), where)
    if mask is not None:
        input_ids, labels = _without_padding(mask, input_ids, labels, where)
    if labels is None:
        return Tokens(input_ids, np.ones(len(input_ids), np.bool_))
    targets = labels != IGNORED
    other = np.flatnonzero(targets & (labels != input_ids))
    if len(other):
        raise DataError(
            f"{where} has label {labels[other[0]]} at position {other[0]}, where input_ids has {input_ids[other[0]]}: "
            f"a label is the id of its own position (labels are not shifted), or {IGNORED}."
        )
    return Tokens(input_ids, targets)


def _beside(row: dict[str, Any], column: str, length: int, where: str) -> Ids | None:
    if row.get(column) is None:
        return None
    values = _integers(row, column, where, booleans=column == "attention_mask")
    if len(values) != length:
        raise DataError(
            f"{where} has {len(values)} {column} for {length} input_ids: write one for each, or leave the column out."
        )
    return values


def _integers(row: dict[str, Any], column: str, where: str, *, booleans: bool = False) -> Ids:
    """Return int32[T] of a list of integers."""
    values = row.get(column)
    if column not in row or not isinstance(values, list):
        raise DataError(f"{where} column {column!r} is {described(values)}, not a list of integers: write token ids.")
    allowed = {int, bool} if booleans else {int}
    if not set(map(type, values)) <= allowed or (values and not (min(values) >= _LEAST and max(values) <= _MOST)):
        odd = (i for i, value in enumerate(values) if type(value) not in allowed or not _LEAST <= value <= _MOST)
        index = next(odd)
        raise DataError(
            f"{where} {column}[{index}] is {described(values[index])}, not a token id: write whole numbers."
        )
    return np.array(values, np.int32)


def _without_padding(mask: Ids, input_ids: Ids, labels: Ids | None, where: str) -> tuple[Ids, Ids | None]:
    """Return ids and labels where the mask is 1."""
    if not np.isin(mask, (0, 1)).all():
        raise DataError(f"{where} attention_mask has values besides 0 (padding) and 1: write these.")
    (unmasked,) = np.nonzero(mask)
    if len(unmasked) and unmasked[-1] - unmasked[0] + 1 != len(unmasked):
        raise DataError(
            f"{where} attention_mask has a 0 between ones, but padding stands at an end: leave these tokens out of "
            f"input_ids, or write 1."
        )
    return input_ids[unmasked], None if labels is None else labels[unmasked]

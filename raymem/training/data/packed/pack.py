"""Packs encoded examples into rows of exactly S tokens.

Shapes: N rows, S = ``data.sequence_length`` tokens per row, T tokens of one example.

A *target* is a token that is to be predicted. The model predicts token t from the tokens before it, so the first token
of a segment can never be a target: its predecessor in the row belongs to another example, or does not exist. Packing
clears those marks, and therefore the marks in a row count exactly the terms of the loss after the model's own shift.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Packing = Literal["bfd", "wrapped", "none"]


@dataclass(frozen=True)
class Encoded:
    """One tokenised example."""

    input_ids: Ids
    """int32[T]"""
    targets: Mask
    """bool[T]"""
    splittable: bool
    """Whether an example that is too long may go on in another row (text), rather than being cut off."""


@dataclass(frozen=True)
class Packed:
    """Rows ready to be stored, and counts of the examples that did not fit."""

    input_ids: Ids
    """int32[N, S]"""
    targets: Mask
    """bool[N, S]; false at every segment start and in the padding."""
    starts: Mask
    """bool[N, S]; true at the first token of every segment. Only ``bfd`` has segments besides the row itself; there
    the padding is a segment of its own."""
    lengths: Ids
    """int32[N]; tokens of the row that are not padding, which is always at the end."""
    dropped: int
    """Examples left out because they hold no target, for instance after truncation."""
    truncated: int
    """Examples that lost their end because they are longer than a row."""


def pack(examples: Sequence[Encoded], sequence_length: int, packing: Packing, pad_id: int) -> Packed:
    """Lay ``examples`` into rows of ``sequence_length`` tokens; the result depends on nothing but the arguments.

    ``bfd``: best-fit decreasing, whole examples (Coffman et al. 1996). ``wrapped``: one stream cut at the row length.
    ``none``: one example per row. Rows without any target are left out.
    """
    if packing == "wrapped":
        with_targets = [example for example in examples if example.targets[1:].any()]
        rows = [[row] for row in _stream(with_targets, sequence_length)]
        dropped, truncated = len(examples) - len(with_targets), 0
    else:
        fitted: list[Encoded] = []
        dropped = truncated = 0
        for example in examples:
            pieces = [piece for piece in _fit(example, sequence_length) if piece.targets[1:].any()]
            fitted += pieces
            dropped += not pieces
            truncated += bool(pieces) and not example.splittable and len(example.input_ids) > sequence_length
        rows = best_fit_decreasing(fitted, sequence_length) if packing == "bfd" else [[piece] for piece in fitted]
    rows = [row for row in rows if any(piece.targets[1:].any() for piece in row)]

    input_ids = np.full((len(rows), sequence_length), pad_id, np.int32)
    targets = np.zeros((len(rows), sequence_length), np.bool_)
    starts = np.zeros((len(rows), sequence_length), np.bool_)
    lengths = np.zeros(len(rows), np.int32)
    starts[:, 0] = True
    for index, row in enumerate(rows):
        at = 0
        for piece in row:
            end = at + len(piece.input_ids)
            input_ids[index, at:end] = piece.input_ids
            targets[index, at:end] = piece.targets
            starts[index, at] = True
            at = end
        lengths[index] = at
        if packing == "bfd" and at < sequence_length:
            starts[index, at] = True
    targets &= ~starts
    return Packed(input_ids, targets, starts, lengths, dropped, truncated)


def best_fit_decreasing(pieces: Sequence[Encoded], capacity: int) -> list[list[Encoded]]:
    """Pack the longest first, each into the fullest row with room; ties go by order. Each piece must fit a row."""
    rows: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending: the first one that is large enough fits best
    for index in sorted(range(len(pieces)), key=lambda i: (-len(pieces[i].input_ids), i)):
        length = len(pieces[index].input_ids)
        best = bisect_left(room, (length, 0))
        if best < len(room):
            free, row = room.pop(best)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(pieces[index])
        insort(room, (free - length, row))
    return rows


def _fit(example: Encoded, capacity: int) -> list[Encoded]:
    """Cut the example into pieces of at most ``capacity`` tokens: splits it if allowed, otherwise truncates it."""
    end = len(example.input_ids) if example.splittable else min(capacity, len(example.input_ids))
    return [
        Encoded(example.input_ids[at : min(at + capacity, end)], example.targets[at : min(at + capacity, end)], True)
        for at in range(0, end, capacity)
    ]


def _stream(examples: Sequence[Encoded], capacity: int) -> list[Encoded]:
    if not examples:
        return []
    whole = Encoded(
        np.concatenate([example.input_ids for example in examples]),
        np.concatenate([example.targets for example in examples]),
        splittable=True,
    )
    return _fit(whole, capacity)

"""Cuts texts from prepared rows for methods that look at data before training, alike on every machine."""

from __future__ import annotations

import torch

from raymem.errors import DataError
from raymem.seeds import generator
from raymem.training.data.packed.dataset import PackedRows


def calibration_ids(rows: PackedRows, texts: int, length: int, seed: int) -> torch.Tensor:
    """Return token ids [texts, length], int64: rows in random order, joined without their padding and cut.

    Raises:
        DataError: there are not so many tokens.
    """
    order = torch.randperm(len(rows), generator=generator(seed, "calibration")).tolist()
    tokens, num_tokens = torch.empty(0, dtype=torch.int64), texts * length
    for index in order:
        row = rows.row(index)
        tokens = torch.cat([tokens, torch.tensor(row.input_ids[: row.length].astype("int64"))])
        if len(tokens) >= num_tokens:
            return tokens[:num_tokens].view(texts, length)
    raise DataError(
        f"base.calibration: the data has {len(tokens)} tokens, and calibration_texts: {texts} of calibration_length: "
        f"{length} are {num_tokens}; give more data or ask for less"
    )

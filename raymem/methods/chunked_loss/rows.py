"""How many positions a chunk has: as many as a byte limit allows, and never too few for an efficient product."""

from __future__ import annotations

import torch

from raymem.memory.devices import MIB
from raymem.memory.target import device_kind

CHUNK_BYTES = {"cpu": 16 * MIB, "cuda": 128 * MIB}
"""Bytes that all copies of one chunk's logits may take together; on a CPU about a last-level cache."""
FEWEST_ROWS = {"cpu": 16, "cuda": 128}
"""Below that a product waits for the weights of the head to be read rather than for its arithmetic."""


def rows_per_chunk(vocabulary: int, bytes_per_logit: int, device: torch.device) -> int:
    """Return the number of positions of one chunk, a multiple of 16.

    Args:
        vocabulary: logits of one position.
        bytes_per_logit: all copies of a logit that are alive at once, together.
        device: where the chunk is computed; while a step is planned, the kind that it is planned for counts.
    """
    kind = device_kind(device)
    limit, fewest = (table.get(kind, table["cuda"]) for table in (CHUNK_BYTES, FEWEST_ROWS))
    return max(fewest, limit // (vocabulary * bytes_per_logit) // 16 * 16)

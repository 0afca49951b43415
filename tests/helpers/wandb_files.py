"""Reads the transaction log of an offline run of W&B: LevelDB's log format around protocol buffers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEAD = 32768, 7


def history_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, as ``wandb sync`` would send them."""
    make = importlib.import_module("wandb.proto.wandb_internal_pb2").Record  # not installed everywhere
    rows = []
    for data in _records(path.read_bytes()):
        record = make()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    """The records: a block holds chunks with checksum (4 bytes), length (2) and type (1); types 2, 3, 4 are parts."""
    at, whole = _HEAD, b""  # after the file's own header, which has the length of a chunk's
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:
            return
        whole += data[at + _HEAD : at + _HEAD + length]
        at += _HEAD + length
        if kind in (1, 4):
            yield whole
            whole = b""

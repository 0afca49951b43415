from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from raymem.memory.heap import give_freed_memory_back
from tests.helpers.resident import status_bytes
from tests.helpers.support import in_processes

MIB = 1 << 20
BLOCKS, BLOCK_BYTES = 20, 8 * MIB


def kept_bytes(given_back: bool) -> int:
    """What a process still holds of blocks that it has freed, once it has freed a larger one."""
    if given_back:
        give_freed_memory_back()
    larger = torch.ones(2 * BLOCK_BYTES, dtype=torch.uint8)
    del larger
    before = status_bytes("VmRSS")
    blocks = [torch.ones(BLOCK_BYTES, dtype=torch.uint8) for _ in range(BLOCKS)]
    last = bytearray(MIB // 2)  # lies behind them in the heap, which can only shrink from its end
    blocks.clear()
    return status_bytes("VmRSS") - before - len(last)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_goes_back(tmp_path: Path) -> None:
    (kept,) = in_processes(kept_bytes, 0, tmp_path / "meet", False)
    (given_back,) = in_processes(kept_bytes, 0, tmp_path / "meet", True)
    assert given_back < BLOCK_BYTES
    assert kept > (BLOCKS // 2) * BLOCK_BYTES, "otherwise the test would prove nothing"

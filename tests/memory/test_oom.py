"""What is known after memory ran out."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from raymem.memory import oom


def test_the_kernels_count_is_read_from_either_version_of_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = tmp_path / "memory.events", tmp_path / "memory.oom_control"
    monkeypatch.setattr(oom, "_OOM_EVENTS", (new, old))
    assert oom.oom_kills() == 0
    old.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert oom.oom_kills() == 2
    new.write_text("low 0\nhigh 0\nmax 7\noom 3\noom_kill 3\n")
    assert oom.oom_kills() == 3


def test_a_gpu_has_given_out_what_it_did_and_was_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 KiB. GPU 0 has a total capacity ...")
    assert oom.measured_at_failure(error, on_gpu=True) == 1000 + 1536
    assert oom.measured_at_failure(RuntimeError("something else"), on_gpu=True) == 1000


def test_on_cpu_it_is_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = oom.measured_at_failure(MemoryError(), on_gpu=False)
    with mmap.mmap(-1, 64 << 20) as held:  # a tensor may get pages that the process holds already
        held.write(bytes([1]) * len(held))
        assert oom.measured_at_failure(MemoryError(), on_gpu=False) > before + (32 << 20)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("unable to mmap 9 bytes from file <m>: Cannot allocate memory (12)"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_errors_of_memory_are_known_from_others(error: Exception, is_one: bool) -> None:
    assert oom.is_out_of_memory(error) == is_one

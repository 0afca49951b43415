"""Reads the traces of running out of memory: how much was taken, and whom the kernel has killed."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from pathlib import Path

_OOM_EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
"""Files of cgroups, version 2 and 1."""


def measured_at_failure(error: BaseException, *, on_gpu: bool) -> int:
    """Return the bytes that the device had given out, and the refused request; on CPU the process's memory now."""
    if on_gpu:
        import torch

        asked = re.search(r"allocate ([\d.]+) (GiB|MiB|KiB)", str(error.__context__ or error))
        unit = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
        more = float(asked.group(1)) * unit[asked.group(2)] if asked else 0.0
        return int(torch.cuda.max_memory_allocated() + more)
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the highest mark, which may be that of earlier work
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, numpy or Python itself says that a device or the host had no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc")  # by torch, the system, and C++
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in said)


def oom_kills() -> int:
    """Count the processes of this container that the kernel has killed for memory."""
    for file in _OOM_EVENTS:
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in file.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0

"""Lists constants per kind of GPU: the memory of the device, and its needs besides the tensors.

Capacities are what the driver reports as total memory (the "total capacity" of PyTorch's out-of-memory message),
rounded down; the name on the box says more. Context and NCCL are outside PyTorch's allocator. They depend on driver and
libraries: the values here are ample round figures, not measurements of this project, and a run's own measurement is
shown beside every prediction. cuBLAS workspaces are inside the allocator, one per thread that multiplies (forward and
backward): PyTorch's default is 32 MiB from Hopper on and 8.125 MiB before.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from raymem.errors import BudgetError

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    capacity_bytes: int
    cublas_bytes: int
    """Workspace of one thread."""
    context_bytes: int = 600 * MIB
    """CUDA context with the kernels of PyTorch, cuBLAS and cuDNN."""


_OLD, _HOPPER = 8_519_680, 32 * MIB

GPUS: dict[str, Gpu] = {
    "T4": Gpu(int(14.56 * GIB), _OLD, 400 * MIB),
    "V100-16GB": Gpu(int(15.77 * GIB), _OLD, 500 * MIB),
    "V100-32GB": Gpu(int(31.73 * GIB), _OLD, 500 * MIB),
    "RTX3090": Gpu(int(23.68 * GIB), _OLD, 500 * MIB),
    "RTX4090": Gpu(int(23.64 * GIB), _OLD, 500 * MIB),
    "A10G": Gpu(int(21.98 * GIB), _OLD, 500 * MIB),
    "L4": Gpu(int(21.95 * GIB), _OLD, 500 * MIB),
    "A30": Gpu(int(23.50 * GIB), _OLD, 500 * MIB),
    "A6000": Gpu(int(47.40 * GIB), _OLD, 500 * MIB),
    "L40S": Gpu(int(44.30 * GIB), _OLD, 500 * MIB),
    "A100-40GB": Gpu(int(39.38 * GIB), _OLD),
    "A100-80GB": Gpu(int(79.10 * GIB), _OLD),
    "H100-80GB": Gpu(int(79.10 * GIB), _HOPPER),
    "H200": Gpu(int(139.7 * GIB), _HOPPER),
    "B200": Gpu(int(178.0 * GIB), _HOPPER),
}

ALIASES = {"A100": "A100-80GB", "H100": "H100-80GB"}
"""Maps a short name to the GPU that people mean by it."""

UNKNOWN_GPU = Gpu(0, _HOPPER)
"""The constants for a budget in bytes on an unnamed GPU, which are the larger ones."""

NCCL_BYTES = 400 * MIB
"""Buffers of one communicator on one machine, from two workers on."""


def gpu_facts(name: str | None) -> Gpu:
    """Return a GPU as :func:`gpu_named` does, and :data:`UNKNOWN_GPU` where no kind is given."""
    return UNKNOWN_GPU if name is None else gpu_named(name)


def gpu_named(name: str) -> Gpu:
    """Return a GPU of the table by its name or an alias; case and separators do not matter.

    Raises:
        BudgetError: it is not in the table; lists the known ones.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    by_plain = {plain(known): gpu for known, gpu in GPUS.items()}
    by_plain |= {plain(alias): GPUS[name] for alias, name in ALIASES.items()}
    if plain(name) not in by_plain:
        near = difflib.get_close_matches(name.upper(), GPUS, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise BudgetError(
            f"--gpu {name}: unknown; {hint}known are {', '.join(GPUS)}; for another one give --budget, e.g. 24GiB"
        )
    return by_plain[plain(name)]

"""Lists constants per kind of GPU: the memory of the device, and its needs besides the tensors.

Capacities are what the driver reports as total memory (the "total capacity" of PyTorch's out-of-memory message),
rounded down; the name on the box says more. Context and NCCL are outside PyTorch's allocator. They depend on driver and
libraries: the values here are ample round figures, not measurements of this project, and a run's own measurement is
shown beside every prediction. cuBLAS workspaces are inside the allocator, one per thread that multiplies (forward and
backward): PyTorch's default is 32 MiB from Hopper on and 8.125 MiB before.
"""

from __future__ import annotations

import difflib
import re
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

ALIASES = {"A100": "A100-80GB", "H100": "H100-80GB", "V100": "V100-16GB"}
"""Maps a short name to the GPU that people mean by it; of two sizes that are equally common, the smaller one."""

_NO_NAME = re.compile(r"(nvidia|geforce|tesla|quadro|sxm\d*|pcie|hbm\d*|tensorcore|gpu)$")
"""Matches words of a product's full name that do not tell it from others."""

UNKNOWN_GPU = Gpu(0, _HOPPER)
"""The constants for a budget in bytes on an unnamed GPU, which are the larger ones."""

NCCL_BYTES = 400 * MIB
"""Buffers of one communicator on one machine, from two workers on."""


def gpu_facts(name: str | None) -> Gpu:
    """Return a GPU as :func:`gpu_named` does, and :data:`UNKNOWN_GPU` where no kind is given."""
    return UNKNOWN_GPU if name is None else gpu_named(name)


def gpu_named(name: str) -> Gpu:
    """Return the GPU that :func:`gpu_key` finds. Raises BudgetError."""
    return GPUS[gpu_key(name)]


def gpu_key(name: str) -> str:
    """Return the name in :data:`GPUS` of the GPU that a person calls ``name``: ``4090``, ``RTX 4090``, ``a100-40``.

    Case, separators, the maker's words (``NVIDIA``, ``GeForce``, ``SXM4``), ``RTX`` and ``GB`` do not matter.

    Raises:
        BudgetError: it is not in the table; lists the nearest and the known ones.
    """
    keys = {_plain(known): known for known in GPUS} | {_plain(alias): key for alias, key in ALIASES.items()}
    plain = _plain(name)
    if plain in keys:
        return keys[plain]
    near = dict.fromkeys(keys[key] for key in difflib.get_close_matches(plain, keys, n=3, cutoff=0.6))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise BudgetError(
        f"--gpu {name}: unknown; {hint}known are {', '.join(GPUS)}; for another one give --budget, e.g. 24GiB"
    )


def _plain(name: str) -> str:
    """Return what tells a GPU from others: lower-case letters and digits."""
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if not _NO_NAME.match(word)]
    return "".join(re.sub(r"(?<=\d)gi?b$", "", word.removeprefix("rtx")) for word in words if word not in ("gb", "gib"))

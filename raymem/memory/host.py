"""Memory of the host beside that of a device: buffers there, and copies that run beside the computation.

On a CPU both are the same memory. Buffers are made and copies taken all the same, so that a step on a CPU is the one on
a GPU in every allocation, and a plan can tell the two memories apart (:func:`raymem.memory.trace.on_host`).

The order of copies is tested without a CUDA device, with a lane that delays them (tests/helpers/delayed_lane.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raymem.memory.target import device_kind
from raymem.memory.trace import on_host


def host_empty(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate numbers [numel] on the host, for copies from and to ``device``: page-locked if that is a CUDA device."""
    with on_host():
        if device.type == "cuda":
            return torch.empty(numel, dtype=dtype, pin_memory=True)
        if device_kind(device) == "cuda":
            return torch.empty(pinned_bytes(numel * dtype.itemsize) // dtype.itemsize, dtype=dtype)[:numel]
        return torch.empty(numel, dtype=dtype)


def host_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Allocate a tensor of the same shape, strides and dtype on the host; its elements fill its memory without gaps."""
    flat = host_empty(tensor.numel(), tensor.dtype, device)
    return flat.as_strided(tensor.size(), tensor.stride())


def keep_on_host(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter, frozen from now on, as one that lives on the host and is copied to the device for use."""
    parameter.requires_grad_(False)
    parameter.raymem_on_host = True  # type: ignore[attr-defined]
    return parameter


def lives_on_host(parameter: torch.Tensor) -> bool:
    """Say whether :func:`keep_on_host` has marked it."""
    return getattr(parameter, "raymem_on_host", False)


def pinned_bytes(num_bytes: int) -> int:
    """Return the bytes that PyTorch takes for page-locked memory: the next power of two."""
    return 1 << max(0, num_bytes - 1).bit_length()


Mark = Any
"""A place in the order of copies: what is before it can be waited for."""


class CopyLane:
    """Copies between a device and its host, in order: on a CUDA stream of their own, elsewhere at once.

    The caller sees to it that a source lives, unchanged, until the computation has waited for a mark behind its copy,
    and that nobody reads a copy before that. What was waited for may be freed as any other memory.

    Args:
        device: of the computation, whose current stream waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a contiguous tensor [numel] of the device to a new one on the host."""
        host = host_empty(tensor.numel(), tensor.dtype, tensor.device)
        self.copy(host, tensor)
        return host

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor [numel] of the host into a new one on the device."""
        tensor = torch.empty(host.numel(), dtype=host.dtype, device=self._device)
        self.copy(tensor, host)
        return tensor

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy between tensors of one layout.

        It waits for what has been computed so far: the source may be made by it, and the memory of the target used.
        """
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """Return the place behind all copies that have begun."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, mark: Mark) -> None:
        """Let the computation go on behind the copies before a mark; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

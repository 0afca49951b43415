"""Measures peak memory: the bytes that the allocator really handed out, on CPU and on CUDA.

On CUDA the caching allocator counts for itself. On CPU there is no such counter, so the peak is the bytes that are
resident when the window opens plus the highest running sum of the profiler's allocation events, which include the
temporaries inside kernels. What was allocated before the window and is freed inside it still counts to the end: torch
does not know the size of a block whose allocation it did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from raymem.linalg.local import local
from raymem.private_apis import ProfilerEventType


@dataclass(frozen=True)
class Peak:
    """The highest use of device memory inside a window."""

    allocated_bytes: int
    reserved_bytes: int | None
    """Bytes that the CUDA caching allocator holds from the driver; None on CPU, which has no such cache."""


class PeakMeter:
    """Context manager that measures the peak of what runs inside it.

    Args:
        device: where the work runs.
        resident: called on entry for the tensors that are alive then (:func:`resident_tensors`); used on CPU only.
        hidden_bytes: resident memory that no tensor within reach shows, such as DDP's buckets; CPU only.

    After the block ``peak`` holds the result.
    """

    def __init__(
        self, device: torch.device, resident: Callable[[], Iterable[torch.Tensor]], hidden_bytes: int = 0
    ) -> None:
        self._hidden_bytes = hidden_bytes
        self._device = device
        self._resident = resident
        self._profiler: torch.profiler.profile | None = None
        self._resident_bytes = 0
        self.peak: Peak | None = None

    def __enter__(self) -> PeakMeter:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        self._resident_bytes = self._hidden_bytes + storage_bytes(self._resident())
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is None:
            allocated = torch.cuda.max_memory_allocated(self._device)
            self.peak = Peak(allocated, torch.cuda.max_memory_reserved(self._device))
            return
        self._profiler.stop()
        if error is None:
            self.peak = Peak(self._resident_bytes + _highest_sum(self._profiler), None)
        self._profiler = None


def _highest_sum(profiler: torch.profiler.profile) -> int:
    """Return the highest running sum of the CPU allocations inside the window, in the order in which they happened.

    A block from before the window may be released with the size of an older one that had its address, so releases
    count only for blocks that the window saw allocated.
    """
    events: list[tuple[int, int, int]] = []

    def walk(nodes: Iterable[Any]) -> Iterator[Any]:
        stack = list(nodes)
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children)

    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for node in walk(results.experimental_event_tree()):
        kind, fields = node.typed
        if kind == ProfilerEventType.Allocation and fields.device.type == "cpu":
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size))
    alive: dict[int, int] = {}
    running = highest = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        running -= alive.pop(address, 0)  # also where other threads released it, which the profiler does not show
        if size > 0:
            alive[address] = size
            running += size
        highest = max(highest, running)
    return highest


def resident_tensors(model: nn.Module, extra: Iterable[torch.Tensor] = ()) -> Iterator[torch.Tensor]:
    """Yield every tensor that a model keeps between steps (quantisation state included), then ``extra``."""
    for tensor in [*model.parameters(), *model.buffers()]:
        yield tensor
        if tensor.grad is not None:
            yield tensor.grad
        state = getattr(tensor, "quant_state", None)  # bitsandbytes hides these outside parameters and buffers
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
            state = state.state2
    yield from extra


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Count the bytes of the storages behind the tensors: each storage once, and only a DTensor's local part.

    A tensor that consists of others, such as the 8-bit moments of torchao, has the bytes of these.
    """
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for part in _parts(local(tensor)):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))

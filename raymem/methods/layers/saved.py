"""Objects that are saved for backward instead of a tensor."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F

from raymem.linalg import LowRank

# T tokens (all leading dimensions), N features


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Arithmetic in the tensor's own dtype, on whatever device it is (meta knows no autocast)."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


class Held(Protocol):
    """Something that gives a tensor back; it is alive as long as a node of the autograd graph needs it."""

    def restore(self) -> torch.Tensor:
        """Return the tensor, or its approximation; possibly with the leading dimensions flattened."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it adds to the tensors that live anyway."""


class Raw:
    """The tensor itself. Autograd does not check hooked tensors for in-place changes, so this does.

    Raises:
        RuntimeError: in :meth:`restore`, when the tensor was written to since.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = tensor._version

    def restore(self) -> torch.Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor {list(self._tensor.shape)} that backward needs was changed in place after it was saved "
                f"(version {self._tensor._version}, saved at {self._version})"
            )
        return self._tensor

    @property
    def num_bytes(self) -> int:
        return self._tensor.numel() * self._tensor.element_size()


class Factors:
    """Low-rank factors [T, R] and [R, N]; until its site asks for exact values, see :meth:`keep_exact`."""

    def __init__(self, low_rank: LowRank, ready: torch.cuda.Event | None = None) -> None:
        self._low_rank: LowRank | None = low_rank
        self._ready = ready
        self._exact: Raw | None = None

    def restore(self) -> torch.Tensor:
        if self._exact is not None:
            return self._exact.restore()
        assert self._low_rank is not None
        if self._ready is not None:
            self._wait(self._ready, self._low_rank)
        with without_autocast(self._low_rank.left_MR):
            return self._low_rank.reconstruct()

    @property
    def num_bytes(self) -> int:
        held = self._exact or self._low_rank
        assert held is not None
        return held.num_bytes

    def keep_exact(self, tensor: torch.Tensor) -> None:
        """Hold ``tensor`` itself from now on: a later user of the same tensor needs its exact values."""
        self._exact, self._low_rank = Raw(tensor), None

    @staticmethod
    def _wait(ready: torch.cuda.Event, low_rank: LowRank) -> None:
        """Order the stream that restores behind the one that compressed, and tell the allocator that it reads."""
        stream = torch.cuda.current_stream(low_rank.left_MR.device)
        stream.wait_event(ready)
        for factor in (low_rank.left_MR, low_rank.right_RN):
            factor.record_stream(stream)


class GateProduct:
    """``silu(gate) * up`` of two held tensors: holds nothing of its own."""

    def __init__(self, gate: Held, up: Held) -> None:
        self._gate, self._up = gate, up

    def restore(self) -> torch.Tensor:
        gate_TN, up_TN = (held.restore().flatten(0, -2) for held in (self._gate, self._up))
        return F.silu(gate_TN) * up_TN

    @property
    def num_bytes(self) -> int:
        return 0


class Saved:
    """One use of something held: the shape in which autograd or a checkpoint wants it back."""

    def __init__(self, held: Held, shape: torch.Size) -> None:
        self.held = held
        self._shape = shape

    def unpack(self) -> torch.Tensor:
        return self.held.restore().view(self._shape)

"""Stands in for DistributedDataParallel as far as memory goes: on fake tensors its C++ reducer cannot run.

With ``gradient_as_bucket_view`` the gradients lie in flat buckets that stay allocated for the whole run. A gradient
that backward has just made is copied into its bucket, and its own storage goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raymem.memory.trace import Tracer

_FIRST_BUCKET_BYTES, _BUCKET_BYTES = 1 << 20, 25 << 20
"""DDP's default bucket sizes."""


class FakeDDP(DistributedDataParallel):
    """Holds a model as DDP does; call inside fake mode, and before the gradients' own hooks are registered."""

    def __init__(self, module: nn.Module, tracer: Tracer) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.require_backward_grad_sync = True
        self._places: dict[int, torch.Tensor] = {}
        trained = [p for p in module.parameters() if p.requires_grad]
        for bucket in _buckets(list(reversed(trained))):
            flat = torch.empty(sum(p.numel() for p in bucket), dtype=bucket[0].dtype)
            tracer.adopt(flat, "gradients", "gradient bucket")
            for parameter, view in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                self._places[id(parameter)] = view.view(parameter.shape)
                parameter.register_post_accumulate_grad_hook(self._reduce)  # type: ignore[no-untyped-call]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)

    @torch.no_grad()
    def _reduce(self, parameter: torch.Tensor) -> None:
        view = self._places[id(parameter)]
        if self.require_backward_grad_sync and parameter.grad is not view:
            assert parameter.grad is not None
            view.copy_(parameter.grad)
            parameter.grad = view


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters by bucket, in the order in which their gradients come."""
    buckets: list[list[nn.Parameter]] = []
    filled, limit = 0, _FIRST_BUCKET_BYTES
    for parameter in parameters:
        if not buckets or filled >= limit or buckets[-1][0].dtype != parameter.dtype:
            limit = _BUCKET_BYTES if buckets else _FIRST_BUCKET_BYTES
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.numel() * parameter.element_size()
    return buckets

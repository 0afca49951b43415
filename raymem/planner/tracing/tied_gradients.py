"""Sums of a tied weight's gradients, which the autograd engine makes in place and fake tensors do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from raymem.private_apis import in_backward

Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_SUM, _SUM_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor


class TiedGradients:
    """Runs operations, and adds up in place what the uses of a tied weight give for its gradient.

    The engine takes one of two summands for their sum where nothing else holds it, but never a fake tensor. Of all the
    sums in a backward pass only those of a whole weight count: an embedding's is the largest tensor of many models.

    Args:
        call: runs an operation.
        model: whose weights are trained.
    """

    def __init__(self, call: Call, model: nn.Module) -> None:
        self._call = call
        names: dict[int, int] = {}
        parameters = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
        for parameter in parameters:
            names[id(parameter)] = names.get(id(parameter), 0) + 1
        self._shapes = {tuple(p.shape) for p in parameters if names[id(p)] > 1 and p.requires_grad}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of ``func``."""
        if func is _SUM and self._shapes and not kwargs and self._is_sum_of_gradients(*args):
            func = _SUM_IN_PLACE
        return self._call(func, args, kwargs)

    def _is_sum_of_gradients(self, left: Any, right: Any) -> bool:
        if not isinstance(right, torch.Tensor) or tuple(left.shape) not in self._shapes or left.shape != right.shape:
            return False
        return in_backward() and not torch.is_grad_enabled()

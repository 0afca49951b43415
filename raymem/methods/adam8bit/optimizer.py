"""AdamW with moments in 8 bits: the state, and calls of bitsandbytes' kernels over each worker's part of it.

bitsandbytes' own optimizer classes count steps in Python numbers, keep tables beside the moments, and know no
distributed tensors. Here the state is tensors alone, under stable names, and is spread as the weight is; the arithmetic
is bitsandbytes'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from raymem.linalg.local import local
from raymem.memory.target import device_kind, holds_no_values
from raymem.memory.trace import note_passing, on_host
from raymem.methods.adam8bit.config import BLOCK, SMALLEST_PAGED, is_compressed, scales_shape

CODES, SCALES = ("exp_avg_codes", "exp_avg_sq_codes"), ("exp_avg_scales", "exp_avg_sq_scales")
WHOLE = ("exp_avg", "exp_avg_sq")
_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 30}
"""Numbers of a tensor that a kernel updates at once: those of CPUs hold fp32 copies, those of CUDA count in 32 bits."""
_FP32_COPIES = {True: 5, False: 3}
"""Copies of what it updates that bitsandbytes' CPU kernel holds at its highest moment, in 8 bits and whole
(tests/methods/adam8bit measures them); one more of weights that are not fp32."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2017) with blockwise 8-bit moments (Dettmers et al. 2022).

    The arithmetic is fp32. The state of a parameter is ``exp_avg_codes`` and ``exp_avg_sq_codes``, uint8 of its shape,
    and ``exp_avg_scales`` and ``exp_avg_sq_scales``, fp32, one for 256 numbers. Parameters below 4096 numbers, and
    distributed ones whose rows are not whole blocks, have fp32 moments ``exp_avg`` and ``exp_avg_sq`` instead. Groups
    carry ``step``, from 0.

    Args:
        params: parameters or groups of them, fp32 or bf16, contiguous; may be distributed by rows.
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        paged: hold large moments in CUDA's managed memory. Needs CUDA parameters that are not distributed.

    Raises:
        ImportError: there is no bitsandbytes.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        paged: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self._paged = paged
        if not all(holds_no_values(local(p)) for p in self._parameters()):
            import bitsandbytes  # noqa: F401 - missing, it is better missed now than in the first step

    def _parameters(self) -> Iterator[torch.Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def allocate_state(self) -> None:
        """Create the state of every parameter, as a step would."""
        for parameter in self._parameters():
            self._state_of(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
            group["step"] += 1
        if self._paged and any(parameter.is_cuda for parameter in self._parameters()):
            torch.cuda.synchronize()  # the host may read managed memory only behind the kernels that write it
        return loss

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            sharded = isinstance(parameter, DTensor)
            if is_compressed(parameter.shape, sharded=sharded):
                scales = scales_shape(parameter.shape)
                for codes_name, scales_name in zip(CODES, SCALES, strict=True):
                    state[codes_name] = self._zeros(parameter, torch.uint8)
                    state[scales_name] = _zeros_beside(parameter, scales)
            else:
                for name in WHOLE:
                    state[name] = self._zeros(parameter, torch.float32)
        return state

    def _zeros(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self._paged or parameter.numel() < SMALLEST_PAGED:
            return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        if holds_no_values(parameter):
            with on_host():
                return torch.zeros_like(parameter, dtype=dtype)
        import bitsandbytes.functional as bnb

        moments: torch.Tensor = bnb.get_paged(*parameter.shape, dtype=dtype, device=parameter.device)
        bnb.fill(moments, 0)
        return moments

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        weight, state = local(parameter), self._state_of(parameter)
        assert parameter.grad is not None and weight.is_contiguous()
        compressed = CODES[0] in state
        kind = device_kind(weight.device)
        at_once = _AT_ONCE.get(kind, _AT_ONCE["cuda"])
        if holds_no_values(weight):
            if kind == "cpu":
                copies = _FP32_COPIES[compressed] + (weight.dtype != torch.float32)
                note_passing(4 * copies * min(weight.numel(), at_once), "bitsandbytes::optimizer_update")
            return
        for value in state.values():
            if getattr(value, "is_paged", False):
                _prefetch(value)
        gradient = local(parameter.grad).to(weight.dtype).contiguous()
        tensors = [weight, gradient, *(local(value) for value in state.values())]
        update = _update_8bit if compressed else _update_32bit
        for start in range(0, weight.numel(), at_once):
            # Parts begin with a block, since what is updated at once is a multiple of one.
            parts = {
                name: _part(tensor, start, at_once, weight.numel())
                for name, tensor in zip(("weight", "gradient", *state), tensors, strict=True)
            }
            update(parts, group)


def _part(tensor: torch.Tensor, start: int, at_once: int, numel: int) -> torch.Tensor:
    """Return the numbers of a tensor, or their scales, that belong to some numbers of the weight; flat."""
    flat = tensor.view(-1)
    per_entry = 1 if flat.numel() == numel else BLOCK
    part = flat[start // per_entry : (start + at_once) // per_entry]
    if getattr(tensor, "is_paged", False):  # bitsandbytes' marks, which a view does not have
        part.is_paged, part.page_deviceid = True, tensor.page_deviceid  # type: ignore[attr-defined]
    return part


def _prefetch(paged: torch.Tensor) -> None:
    """Have pages on the GPU before a kernel meets them one by one."""
    import bitsandbytes.functional as bnb

    bnb.prefetch_tensor(paged)


def _update_8bit(parts: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
    import bitsandbytes.functional as bnb

    weight = parts["weight"]
    bnb.optimizer_update_8bit_blockwise(
        "adam",
        parts["gradient"],
        weight,
        *(parts[name] for name in CODES),
        *group["betas"],
        0.0,  # beta3 and alpha, which other optimizers have
        0.0,
        group["eps"],
        group["step"] + 1,
        group["lr"],
        *(_table(signed, weight.device) for signed in (True, False)),
        *(parts[name] for name in SCALES),
        weight_decay=group["weight_decay"],
    )


def _update_32bit(parts: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
    import bitsandbytes.functional as bnb

    bnb.optimizer_update_32bit(
        "adam",
        parts["gradient"],
        parts["weight"],
        parts["exp_avg"],
        group["betas"][0],
        group["eps"],
        group["step"] + 1,
        group["lr"],
        parts["exp_avg_sq"],
        group["betas"][1],
        weight_decay=group["weight_decay"],
    )


@functools.cache
def _table(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the values of the 256 codes, fp32."""
    import bitsandbytes.functional as bnb

    table: torch.Tensor = bnb.create_dynamic_map(signed=signed).to(device)
    return table


def _zeros_beside(parameter: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return fp32 zeros, of whose rows each worker has those of the parameter that it has."""
    part = local(parameter)
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=torch.float32, device=part.device)
    zeros = torch.zeros((part.shape[0], *shape[1:]), dtype=torch.float32, device=part.device)
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )

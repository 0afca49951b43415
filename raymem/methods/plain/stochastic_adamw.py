"""Implements AdamW for bf16 weights that keeps updates below a rounding step, by rounding at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from raymem.linalg import stochastic_round
from raymem.seeds import generator


class StochasticRoundingAdamW(torch.optim.Optimizer):
    """AdamW for bf16 parameters: fp32 arithmetic and moments, the result rounded up or down at random without bias.

    Args:
        named: name -> bf16 parameter; names seed the rounding, so that replicas and resumed runs round alike.
        seed: of the run.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        seed: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._names = {id(p): name for name, p in named.items()}
        self._seed = seed
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(named.values(), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
            group["step"] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; moments stay fp32, where torch would cast them to the parameter's bf16."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[parameter][name] = value.detach().to(parameter.device, copy=True)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        assert parameter.grad is not None
        target = _local(parameter)
        value = target.float()
        adamw(
            [value],
            [_local(parameter.grad).float()],
            [_local(state["exp_avg"])],
            [_local(state["exp_avg_sq"])],
            [],
            [state["step"]],
            fused=True,  # the only implementation that never asks the host for the step count
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        noise = generator(self._seed, "rounding", self._names[id(parameter)], group["step"], device=target.device)
        target.copy_(stochastic_round(value, noise))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part; every operation here is elementwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

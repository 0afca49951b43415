"""Wraps optimizers, and keeps bf16 weights trainable by fp32 master weights or stochastic rounding.

A bf16 number has 8 significant bits, so an update below about 0.4 % of a weight is lost when it is added to it.
``train.master`` chooses how that is avoided for bf16 trainable weights; it has no effect on fp32 ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raymem.kinds import OptimizerContext
from raymem.recipe.axes import ADAPTERS, OPTIMIZERS
from raymem.recipe.schema import Recipe


@runtime_checkable
class StepsInBackward(Protocol):
    """An optimizer that can update each parameter during the backward pass and free its gradient at once."""

    steps_in_backward: bool

    def grad_norm(self) -> torch.Tensor:
        """Return the L2 norm of all gradients since the last step."""


class Updater:
    """The trainable parameters of a model, their optimizer and, where wanted, their fp32 masters.

    Args:
        parameters: name -> trainable parameter.
        make_optimizer: called with the named tensors that the optimizer is to update.
        masters: keep fp32 copies, update those and round them into the parameters.
        buffers: name -> what a checkpoint must hold besides.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        make_optimizer: Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer],
        *,
        masters: bool,
        buffers: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.masters = {n: nn.Parameter(p.detach().float()) for n, p in parameters.items()} if masters else {}
        self.updated = self.masters or self.parameters
        self.buffers = dict(buffers or {})
        self.optimizer = make_optimizer(self.updated)

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients of updated tensors (fp32 with masters); parameters without one are left out."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        return [p.grad for p in self.updated.values() if p.grad is not None]

    def grad_norm(self) -> torch.Tensor:
        """Return the L2 norm of all gradients of this step, over all ranks; 0-dim fp32."""
        if isinstance(self.optimizer, StepsInBackward) and self.optimizer.steps_in_backward:
            return self.optimizer.grad_norm()
        norm = torch.nn.utils.get_total_norm(self.gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def begin(self, step: int, lr: float) -> None:
        """Announce step number ``step`` (from 0) with learning rate ``lr``, before its first backward pass.

        Both are written into the parameter groups: an optimizer that draws random numbers seeds them with the
        group's ``step``, and this way a resumed run needs no counter of its own.
        """
        for group in self.optimizer.param_groups:
            group.update(step=step, lr=lr)

    @torch.no_grad()
    def step(self) -> None:
        """Take the optimizer step that was begun; gradients are dropped."""
        self.optimizer.step()
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for parameter in [*self.parameters.values(), *self.masters.values()]:
            parameter.grad = None

    @torch.no_grad()
    def allocate_state(self) -> None:
        """Create the state of a first step (by one of rate 0), so that a checkpoint can be read into it."""
        allocate = getattr(self.optimizer, "allocate_state", None)
        if allocate is not None:  # MLorc's can do so without
            allocate()
            return
        for parameter in self.updated.values():
            parameter.grad = torch.zeros_like(parameter)
        self.begin(0, lr=0.0)
        self.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint under stable names: weights, masters, buffers, optimizer state."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"master.{name}": p.detach() for name, p in self.masters.items()}
        tensors |= {f"buffers.{name}": buffer for name, buffer in self.buffers.items()}
        for name, parameter in self.updated.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                assert isinstance(value, torch.Tensor), f"optimizer state {key} of {name} is no tensor"
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors


def build_updater(model: nn.Module, recipe: Recipe) -> Updater:
    """Build the recipe's optimizer over the trainable parameters of ``model``."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kind, low_precision = OPTIMIZERS.of(recipe), recipe.train.precision == "bf16"
    context = OptimizerContext(
        seed=recipe.seed,
        stochastic_rounding=low_precision and recipe.train.master == "stochastic_rounding",
        embeddings=frozenset(
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        ),
    )
    masters = low_precision and recipe.train.master == "fp32"
    return Updater(
        parameters,
        lambda named: kind.build(named, recipe.optimizer, context),
        masters=masters,
        buffers=ADAPTERS.of(recipe).buffers(model),
    )


def lr_factor(step: int, total_steps: int, schedule: str, warmup: float) -> float:
    """Return the learning rate of ``step`` (from 0) as a fraction of the peak; a pure function has nothing to save."""
    import math

    warmup_steps = int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0

"""Optimizers and what keeps bf16 weights trainable: fp32 master weights or stochastic rounding.

A bf16 number has 8 significant bits, so an update below about 0.4 % of a weight is lost when it is added to it.
``train.master`` chooses how that is avoided for bf16 trainable weights; it has no effect on fp32 ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import Any, Protocol, assert_never, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from raymem.errors import RecipeError
from raymem.linalg import stochastic_round
from raymem.methods.mlorc.config import MLorcAdamWOptions, MLorcLionOptions
from raymem.recipe.schema import AdamW, Recipe
from raymem.seeds import generator
from raymem.training.model.adapter import stored_buffers


@runtime_checkable
class StepsInBackward(Protocol):
    """An optimizer that can update each parameter during the backward pass and free its gradient at once."""

    steps_in_backward: bool

    def grad_norm(self) -> torch.Tensor:
        """L2 norm of all gradients since the last step."""


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
        """Gradients of the tensors that are updated (fp32 with masters); parameters without one are left out."""
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        return [p.grad for p in self.updated.values() if p.grad is not None]

    def grad_norm(self) -> torch.Tensor:
        """L2 norm of all gradients of this step, over all ranks; 0-dim fp32."""
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
        """The optimizer step that was begun; gradients are dropped."""
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
        """Every tensor that a checkpoint needs, under stable names: weights, masters, buffers, optimizer state."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"master.{name}": p.detach() for name, p in self.masters.items()}
        tensors |= {f"buffers.{name}": buffer for name, buffer in self.buffers.items()}
        for name, parameter in self.updated.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                assert isinstance(value, torch.Tensor), f"optimizer state {key} of {name} is no tensor"
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors


def build_updater(model: nn.Module, recipe: Recipe) -> Updater:
    """The recipe's optimizer over the trainable parameters of ``model``."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    low_precision = recipe.train.precision == "bf16"
    rounding = low_precision and recipe.train.master == "stochastic_rounding"
    options = recipe.optimizer
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def make(named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        match options:
            case AdamW():
                return _build_adamw(named, options, recipe.seed, stochastic_rounding=rounding)
            case MLorcAdamWOptions() | MLorcLionOptions():
                return _build_mlorc(named, options, recipe.seed, embeddings, stochastic_rounding=rounding)
        assert_never(options)

    masters = low_precision and recipe.train.master == "fp32"
    return Updater(parameters, make, masters=masters, buffers=stored_buffers(model))


def _build_adamw(
    named: Mapping[str, nn.Parameter], options: AdamW, seed: int, *, stochastic_rounding: bool
) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {
        "lr": options.lr,
        "betas": options.betas,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
    }
    if stochastic_rounding:
        return StochasticRoundingAdamW(named, seed=seed, **arguments)
    # torch picks by device when neither is given; the planner must know.
    arguments[options.implementation] = True
    return torch.optim.AdamW(named.values(), **arguments)


def _build_mlorc(
    named: Mapping[str, nn.Parameter],
    options: MLorcAdamWOptions | MLorcLionOptions,
    seed: int,
    embeddings: Set[str],
    *,
    stochastic_rounding: bool,
) -> torch.optim.Optimizer:
    from raymem.methods.mlorc import MLorcAdamW, MLorcLion

    arguments = dataclasses.asdict(options)
    in_backward = arguments.pop("step_in_backward")
    optimizer = MLorcAdamW if arguments.pop("kind") == "mlorc_adamw" else MLorcLion
    whole = set() if arguments.pop("compress_embeddings") else embeddings
    for name, parameter in named.items():
        shorter = min(parameter.shape) if parameter.ndim == 2 and name not in whole else 0
        if options.min_dim <= shorter <= options.rank:
            raise RecipeError(
                f"optimizer.rank: {options.rank} is not below min(m, n) = {shorter} of {name} {list(parameter.shape)}, "
                f"so nothing would be saved there; lower it, or set optimizer.min_dim above {shorter} to leave such "
                "matrices uncompressed"
            )
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in named.items() if name not in whole]},
        {"params": [(name, p) for name, p in named.items() if name in whole], "rank": None},
    ]
    # The loop's guard sees the gradients before they come here, unless they are gone by then.
    built = optimizer(
        [group for group in groups if group["params"]],
        **arguments,
        seed=seed,
        stochastic_rounding=stochastic_rounding,
        check_finite=in_backward,
    )
    if in_backward:
        built.step_in_backward()
    return built


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
    """This rank's part; every operation here is elementwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def lr_factor(step: int, total_steps: int, schedule: str, warmup: float) -> float:
    """Learning rate of ``step`` (from 0) as a fraction of the peak; a pure function, so there is nothing to save."""
    import math

    warmup_steps = int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0

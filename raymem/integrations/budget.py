"""Holds the memory of a trainer's step against a budget before its first step: the step itself, on fake tensors."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raymem.errors import BudgetExceeded, PlanError
from raymem.hooks import RunView
from raymem.integrations.applied import Applied, Ask, MicroBatch, with_targets
from raymem.memory.budget import bytes_text
from raymem.methods.probe import first_line
from raymem.planner.help import would_help
from raymem.planner.module import Loop, plan_loop
from raymem.planner.tracing.fake import CudaAutocast
from raymem.planner.types import Plan

log = logging.getLogger(__name__)


def plan_step(
    run: Applied, batch: MicroBatch, ask: Ask, *, accumulation: int, clip_norm: float | None, mixed: bool,
    optimizer: Any,
) -> Plan:  # fmt: skip
    """Predict the peak of a step of a trainer with the largest micro-batch that it gives.

    Args:
        ask: how the trainer asks a model for the loss.
        accumulation: micro-batches per step.
        mixed: the trainer runs forward passes under bf16 autocast.
        optimizer: the trainer's, perhaps wrapped.

    Raises:
        PlanError: the step cannot be planned; says what decides by values.
    """
    device = next(run.model.parameters()).device
    planned = with_targets(batch) if run.loss_calls is not None else batch
    parts = (planned.inputs, planned.count, planned.total, planned.targets)

    def loss(model: nn.Module, parts: Any) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            if mixed:  # the tensors of a plan are the CPU's
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
                if device.type == "cuda":
                    stack.enter_context(CudaAutocast())
            return ask(model, MicroBatch(*parts))

    def before_step(model: nn.Module, batches: Sequence[Any]) -> Callable[[int], None]:
        hooks = run.hooks(model)
        view = RunView(model, lambda step: list(batches), loss, planned=True)

        def prepare(step: int) -> None:
            model.train()
            for hook in hooks:
                hook.before_step(step, view)

        return prepare

    build = run.optimizer_over if run.owns(optimizer) else lambda model: _alike(optimizer, model)
    loop = Loop(build, loss, before_step, clip_norm, one_segment_per_row=not _is_packed(batch.inputs))
    log.info("raymem: planning a step of the trainer")
    try:
        return plan_loop(
            run.model, loop, [parts] * min(2, accumulation), kind="cuda" if device.type == "cuda" else "cpu"
        )
    except PlanError:
        raise
    except Exception as error:  # others' model, loss and optimizer may raise anything
        raise PlanError(
            f"raymem: the trainer's step cannot be planned ({type(error).__name__}: {first_line(error)}); leave budget "
            "out"
        ) from error


def _is_packed(inputs: Mapping[str, Any]) -> bool:
    """Say whether a row holds several examples: its positions start again."""
    positions = inputs.get("position_ids")
    return isinstance(positions, torch.Tensor) and bool((positions[..., 1:] == 0).any())


def _alike(optimizer: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Build an optimizer like the trainer's own over a copy of the model."""
    own = getattr(optimizer, "optimizer", optimizer)
    taken = inspect.signature(type(own).__init__).parameters
    options = {name: value for name, value in own.defaults.items() if name in taken}
    alike: torch.optim.Optimizer = type(own)([p for p in model.parameters() if p.requires_grad], **options)
    return alike


def refuse_above(plan: Plan, run: Applied, *, rows: int, names: Callable[[str], str | None]) -> None:
    """Refuse a step that is predicted to need more than the budget of the settings.

    Args:
        rows: of a micro-batch.
        names: the trainer's own way to write an override of a recipe; None where it has none.

    Raises:
        BudgetExceeded: names the largest term, and what would lower it.
    """
    budget = run.settings.budget_bytes
    assert budget is not None
    grouped = dist.is_initialized() and dist.get_world_size() > 1
    needed = plan.capacity_bytes + (plan.state["gradients"] if grouped else 0)  # DDP's buckets are as large
    if needed <= budget:
        return
    recipe = run.settings.recipe
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"micro_batch": rows, "global_batch": rows})}
    )
    term = max(plan.terms, key=lambda name: plan.terms[name])
    helpful = [own for override in would_help(term, recipe) if (own := names(override)) is not None]
    raise BudgetExceeded(
        f"raymem: budget: a step of {rows} rows is predicted to take {bytes_text(needed)}, above "
        f"{recipe.budget}; most of it is {term} ({bytes_text(plan.terms[term])}). "
        + (f"What would lower it: {'; '.join(helpful)}" if helpful else "Fewer or shorter rows, or a larger budget")
    )

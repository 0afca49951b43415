"""Plans a training loop that is no recipe: any module, optimizer and loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raymem.errors import PlanError
from raymem.memory import kernels
from raymem.memory.devices import gpu_key
from raymem.memory.target import planned_for
from raymem.memory.trace import Tracer
from raymem.planner.plan import make_plan
from raymem.planner.tracing.fake import fake_bytes, fakeify, gradients_named, quantisation_tensors, shims
from raymem.planner.tracing.fake_cache import OutputCache
from raymem.planner.tracing.four_bit import put_stand_ins
from raymem.planner.tracing.step_trace import MEASURED, StepTrace
from raymem.planner.types import Plan, Target
from raymem.private_apis import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    tree_leaves,
    tree_map,
)

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Loop:
    """A training loop as a plan runs it; each part is given a copy of the model whose tensors are fake."""

    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    """Given a micro-batch: what it adds to the loss, a scalar."""
    before_step: Callable[[nn.Module, Sequence[Any]], Callable[[int], None]] = lambda model, batches: lambda step: None
    """Given the micro-batches too: what runs before an optimizer step (from 0), with no gradients there."""
    clip_norm: float | None = None
    """Gradients are clipped to this norm, by torch's ``clip_grad_norm_``."""
    one_segment_per_row: bool = True
    """No row holds several examples, which transformers would keep apart by a mask."""


def plan_module(
    model: nn.Module, optimizer: MakeOptimizer, loss: Loss, *inputs: Any, gpu: str | None = None
) -> Plan:  # fmt: skip
    """Predict the peak memory of one training step of a module on one device: forward, backward, update.

    The loop is ``loss(model, *inputs).backward(); optimizer.step(); optimizer.zero_grad()``, traced on fake tensors in
    this process; nothing is computed, and ``model`` is left as it is. What is counted is the second step, when the
    optimizer has its state.

    Args:
        model: its weights may lie on the meta device (``with torch.device("meta"): model = ...``).
        optimizer: called with the list of trained parameters. Give torch's optimizers ``fused=True`` or
            ``foreach=True`` as the real loop has it: their default depends on the device.
        loss: gives a scalar.
        inputs: tensors, or containers of them, of which only shapes and dtypes count; such on the meta device will do.
        gpu: kind of GPU, such as ``H100-80GB``; by default a CPU is planned for.

    Raises:
        PlanError: the model, the loss or the optimizer decides by values, which are not there; names the operation.
        BudgetError: unknown GPU.
    """
    loop = Loop(
        lambda copied: optimizer([p for p in copied.parameters() if p.requires_grad]),
        lambda copied, batch: loss(copied, *batch),
    )
    return plan_loop(model, loop, [inputs], kind="cpu" if gpu is None else "cuda", gpu=gpu)


def plan_loop(model: nn.Module, loop: Loop, batches: Sequence[Any], *, kind: str, gpu: str | None = None) -> Plan:
    """Predict the peak memory of one step of a loop on one device; see :func:`plan_module`.

    Args:
        batches: the micro-batches of a step; two stand for any larger number.
        kind: ``cpu`` or ``cuda``.
        gpu: kind of GPU, by default a usual one.

    Raises:
        PlanError, BudgetError: as :func:`plan_module`.
    """
    gpu = None if gpu is None else gpu_key(gpu)
    target = Target(kind, 1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(planned_for(target.kind))
        copied = _without_values(model)
        stack.enter_context(shims(one_segment_per_row=loop.one_segment_per_row))
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        tracer = stack.enter_context(Tracer(kernels.workspace(target.kind), OutputCache(mode)))
        fakeify(copied, tracer)
        for handle in tracer.watch(copied):
            stack.callback(handle.remove)
        try:
            session = _trace(copied, loop, [_fake(batch, tracer) for batch in batches], tracer)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise PlanError(
                f"{error.func} decides by values, which a planned step has not; leave it out of the loss, or give the "
                "optimizer fused=True"
            ) from None
    return make_plan(session, target, gpu)


def _without_values(model: nn.Module) -> nn.Module:
    """Copy a module to the meta device; tied parameters stay tied."""

    def hollow(tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def hollow_weight(parameter: nn.Parameter) -> torch.Tensor:
        empty: Any = hollow(parameter)
        if (state := getattr(parameter, "quant_state", None)) is not None:  # bitsandbytes' has no place in a module
            empty.quant_state = copy.deepcopy(state, {id(t): hollow(t) for t in quantisation_tensors(parameter)})
        return empty  # type: ignore[no-any-return]

    fakes = {id(parameter): hollow_weight(parameter) for parameter in model.parameters()}
    fakes |= {id(buffer): hollow(buffer) for buffer in model.buffers()}
    for parameter in model.parameters():
        fakes |= {id(tensor): hollow(tensor) for tensor in quantisation_tensors(parameter)}
    copied = copy.deepcopy(model, fakes)
    put_stand_ins(copied)
    return copied


def _fake(inputs: Any, tracer: Tracer) -> Any:
    def fake_input(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = torch.empty(value.shape, dtype=value.dtype)
        tracer.adopt(tensor, "activations", "inputs")
        return tensor

    return tree_map(fake_input, inputs)


def _trace(model: nn.Module, loop: Loop, batches: Sequence[Any], tracer: Tracer) -> StepTrace:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = loop.optimizer(model)
    prepare = loop.before_step(model, batches)
    gradient_bytes = 0
    for number in (1, MEASURED):
        tracer.step, tracer.phase = number, "before_step"
        prepare(number - 1)
        with gradients_named(trained, tracer):
            for batch in batches:
                tracer.phase = "forward"
                torch.autograd.backward(loop.loss(model, batch))
        tracer.phase = "step"
        gradient_bytes = fake_bytes(p.grad for p in trained.values() if p.grad is not None)
        if loop.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), loop.clip_norm)
        optimizer.step()
        for name, parameter in trained.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tracer.adopt(value, "optimizer", f"{name} ({key})")
        optimizer.zero_grad()
    states = tree_leaves([optimizer.state.get(p, {}) for p in trained.values()])
    state = {
        "weights": fake_bytes([*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]),
        "trainable": fake_bytes(trained.values()),
        "gradients": gradient_bytes,
        "optimizer": fake_bytes(value for value in states if isinstance(value, torch.Tensor)),
    }
    return StepTrace(list(tracer.changes), state, rehearsed=True, loss_note=None)

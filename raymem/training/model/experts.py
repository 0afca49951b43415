"""Multiplies by routed experts whose weights are held in 4 bits.

transformers keeps the weights of all experts of a layer in one parameter [E, N, K], which bitsandbytes' layers cannot
hold. Every class that transformers marks as one of experts says how its weights lie (transposed, with biases, gated).
The formula here asks no more, so it serves every such class. One projection of one layer is dequantised at a time, and
again in backward, so that no dense weight is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from raymem.errors import ModelError
from raymem.memory.nf4 import BLOCK
from raymem.memory.packed import Packing
from raymem.methods.peft.linear_layers import experts_of_a_layer

# T tokens, S = T k pairs of a token and an expert, E experts, N output and K input features of a projection

_MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
"""Attributes that transformers gives to classes of experts that its own backends may compute."""


def check(base_model: nn.Module) -> None:
    """Refuse experts whose weights lie in a way that is not known.

    Raises:
        ModelError: names the module, its class and its weights.
    """
    for name, module in base_model.named_modules():
        if "expert" not in type(module).__name__.lower() or isinstance(module, nn.Linear):
            continue
        known = _projections(module)
        parameters = experts_of_a_layer(module) if known else _matrices(module)
        shapes = ", ".join(f"{leaf} {list(parameter.shape)}" for leaf, parameter in parameters.items())
        if set(parameters) != set(known):
            raise ModelError(
                f"base.quantize: nf4 knows no way to hold the experts of {type(module).__name__} in 4 bits ({name}: "
                f"{shapes}): it is none of the classes whose layout transformers declares. Set base.quantize: none, "
                "with scaling.strategy: fsdp2 if the weights are too large for one worker"
            )
        if any(parameter[0].numel() % BLOCK for parameter in parameters.values()):
            raise ModelError(
                f"base.quantize: nf4 holds experts of a multiple of {BLOCK} weights each, but not those of {name} "
                f"({shapes}); set base.quantize: none"
            )


def _matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module._parameters.items() if weight is not None and weight.dim() > 1}


def place(base_model: nn.Module, dtype: torch.dtype, *, planned: bool) -> None:
    """Replace the weights of routed experts by placeholders of packed ones, and let their modules multiply by these.

    Args:
        base_model: bare transformers model on the meta device.
        dtype: of the dequantised weights.
        planned: only memory counts.

    Raises:
        ModelError: as :func:`check`.
    """
    check(base_model)
    module: Any
    for _, module, parameters in _routed(base_model):
        packings = {leaf: Packing(tuple(parameter.shape), dtype, planned) for leaf, parameter in parameters.items()}
        for leaf, packing in packings.items():
            module._parameters[leaf] = packing.placeholder()
        module.packings = packings
        module.forward = PackedExperts(module)


@contextlib.contextmanager
def shown_to_peft(base_model: nn.Module) -> Iterator[None]:
    """Let PEFT wrap a model whose experts are packed: it asks a weight for shape, dtype and device.

    Afterwards LoRA on experts, which PEFT would add to the weight of every expert, multiplies beside it: per token
    ``W_e x + s B_e (A_e x)``, without a dense copy of all experts for backward.
    """
    packed: list[tuple[Any, dict[str, Any]]]
    packed = [(module, dict(module._parameters)) for _, module, _ in _routed(base_model) if _is_packed(module)]
    for experts, parameters in packed:
        for leaf, packing in experts.packings.items():
            shape_only = torch.empty((), dtype=packing.dtype, device=parameters[leaf].device).expand(packing.shape)
            experts._parameters[leaf] = nn.Parameter(shape_only, requires_grad=False)
    try:
        yield
    finally:
        for experts, parameters in packed:
            experts._parameters.update(parameters)
    if not packed:
        return
    from peft.tuners.lora.layer import ParamWrapper

    for wrapper in [module for module in base_model.modules() if isinstance(module, ParamWrapper)]:
        experts = wrapper.get_base_layer()
        if _is_packed(experts):
            experts.forward.adapters[wrapper.parameter_name] = wrapper
            wrapper.forward = wrapper.base_layer.__call__


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), PackedExperts)


class PackedExperts:
    """The forward pass of a module of experts; an object, so that it is copied and pickled with its module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.adapters: dict[str, Any] = {}
        """PEFT's wrapper of every projection that has one."""

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """Sum up what the chosen experts make of every token.

        Args:
            hidden_states: [T, H]; named, as the others are, as in transformers, whose blocks may pass them by name.
            top_k_index, top_k_weights: the experts of every token and their shares [T, k].
        """
        module: Any = self.module
        tokens, chosen = top_k_index.shape
        expert_S, order_S = top_k_index.flatten().sort()
        ends_E = torch.searchsorted(expert_S, torch.arange(module.num_experts, device=expert_S.device), right=True)
        ends_E = ends_E.to(torch.int32)
        up_name, down_name = _projections(module)
        inner = self._project(up_name, hidden_states[order_S // chosen], expert_S, ends_E)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output_SH = self._project(down_name, inner, expert_S, ends_E)
        if module.has_post_expert_norm:
            output_SH = module.post_expert_norm(output_SH)
        output_SH = output_SH * top_k_weights.flatten()[order_S, None]
        place_S = torch.empty_like(order_S)
        place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        return output_SH[place_S].view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)

    def _project(self, name: str, x_SK: torch.Tensor, expert_S: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """Multiply each row by the matrix of its expert; rows are sorted by expert."""
        module: Any = self.module
        packing: Packing = module.packings[name]
        y_SN: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x_SK.to(packing.dtype), module._parameters[name], packing, module.is_transposed, ends_E
        )
        if name in self.adapters:
            for update_SN in self._updates(self.adapters[name], x_SK, ends_E):
                y_SN = y_SN + update_SN
        if module.has_bias:
            y_SN = y_SN + getattr(module, f"{name}_bias")[expert_S]
        return y_SN

    def _updates(self, wrapper: Any, x_SK: torch.Tensor, ends_E: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield what each active adapter adds [S, N]."""
        names = [] if wrapper.disable_adapters else wrapper.active_adapters
        for adapter in [name for name in names if name in wrapper.lora_A]:
            left, right, scaling = wrapper.get_delta_factors(adapter)  # the weight's update is scaling * left @ right
            first_EKR, second_ERN = (left, right) if self.module.is_transposed else (right.mT, left.mT)
            # Grouped products of GPUs want rows of a multiple of 16 bytes.
            missing = -first_EKR.shape[-1] % (16 // first_EKR.element_size())
            first_EKR = F.pad(first_EKR, (0, missing)).contiguous()
            second_ERN = F.pad(second_ERN, (0, 0, 0, missing)).contiguous()
            inner_SR = F.grouped_mm(x_SK.to(first_EKR.dtype), first_EKR, offs=ends_E)
            yield F.grouped_mm(inner_SR, second_ERN, offs=ends_E) * scaling


class _Product(torch.autograd.Function):
    """``y_s = W_e(s) x_s``; ``dL/dx_s = W_e(s)^T dL/dy_s``. Nothing is kept but the packed weights and the ends."""

    @staticmethod
    def forward(
        ctx: Any, x_SK: torch.Tensor, flat: torch.Tensor, packing: Packing, transposed: bool, ends_E: torch.Tensor
    ) -> torch.Tensor:
        # Not saved for backward: a sharded weight is gathered into the same memory again before that.
        ctx.flat, ctx.packing, ctx.transposed = flat, packing, transposed
        ctx.save_for_backward(ends_E)
        dense = packing.dequantise(flat)
        return F.grouped_mm(x_SK, dense if transposed else dense.mT, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ends_E,) = ctx.saved_tensors
        dense = ctx.packing.dequantise(ctx.flat)
        grad_SK = F.grouped_mm(grad_SN, dense.mT if ctx.transposed else dense, offs=ends_E)
        return grad_SK, None, None, None, None


def _routed(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Yield the modules that hold routed experts, with their names and those of the experts' weights."""
    for name, module in model.named_modules():
        if parameters := experts_of_a_layer(module):
            yield name, module, parameters


def _projections(module: Any) -> tuple[str, ...]:
    """Return the names of the two projections of experts, in their order; none where they are not known."""
    if not all(hasattr(module, mark) for mark in _MARKS):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")

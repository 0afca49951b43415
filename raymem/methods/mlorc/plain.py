"""AdamW and Lion with whole fp32 moments, for what is not compressed: biases, norms, small matrices."""

from __future__ import annotations

import torch

from raymem.linalg.local import local
from raymem.methods.mlorc.update import Matrix, fused_adamw


def adamw_step(
    matrix: Matrix,
    state: dict[str, torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW exactly as torch has it, in fp32, for a parameter of any shape."""
    weight = matrix.weight_MN.float()
    moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
    fused_adamw(
        weight, matrix.grad_MN.float(), *moments, state["step"], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )
    matrix.store(slice(None), weight)


def lion_step(
    matrix: Matrix, state: dict[str, torch.Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    """Lion (Chen et al. 2023) in fp32, for a parameter of any shape."""
    weight, gradient, moment = matrix.weight_MN.float(), matrix.grad_MN.float(), local(state["exp_avg"])
    direction = torch.lerp(moment, gradient, 1 - betas[0]).sign_()
    weight.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr)
    moment.lerp_(gradient, 1 - betas[1])
    matrix.store(slice(None), weight)

"""MLorc as the paper writes it, line by line, with ``torch.pca_lowrank`` as the authors use it: the yardstick."""

from __future__ import annotations

import math

import torch

# M rows, N columns, R rank


class StraightLineAdamW:
    """One matrix. Draws from the global random stream, as the original does."""

    def __init__(self, rank: int, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:  # fmt: skip
        self.rank, self.lr, self.betas, self.eps, self.weight_decay = rank, lr, betas, eps, weight_decay
        self.first: tuple[torch.Tensor, ...] | None = None
        self.second: tuple[torch.Tensor, ...] | None = None
        self.step_count = 0

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the factors stand for, second moment repaired."""
        assert self.first is not None and self.second is not None
        left, values, right = self.first
        first_MN = left @ torch.diag(values) @ right.T
        left, values, right = self.second
        second_MN = left @ torch.diag(values) @ right.T
        negative_MN = second_MN < 0
        if negative_MN.any():
            filling = -second_MN[negative_MN].mean()
            second_MN = torch.relu(second_MN) + filling * negative_MN
        return first_MN, second_MN

    @torch.no_grad()
    def step(self, weight_MN: torch.Tensor, grad_MN: torch.Tensor) -> torch.Tensor:
        """Update the weight in place; returns the direction M / (sqrt(V) + eps) with bias correction."""
        beta1, beta2 = self.betas
        self.step_count += 1
        if self.first is None:
            first_MN, second_MN = torch.zeros_like(grad_MN), torch.zeros_like(grad_MN)
        else:
            first_MN, second_MN = self.moments()
        first_MN = beta1 * first_MN + (1 - beta1) * grad_MN
        second_MN = beta2 * second_MN + (1 - beta2) * grad_MN * grad_MN
        correction1, correction2 = 1 - beta1**self.step_count, 1 - beta2**self.step_count
        direction_MN = (first_MN / correction1) / (second_MN.sqrt() / math.sqrt(correction2) + self.eps)
        weight_MN.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * direction_MN)
        self.first = torch.pca_lowrank(first_MN, q=self.rank, center=False, niter=1)
        self.second = torch.pca_lowrank(second_MN, q=self.rank, center=False, niter=1)
        return direction_MN


class StraightLineLion:
    """One matrix, Lion."""

    def __init__(self, rank: int, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.rank, self.lr, self.betas = rank, lr, betas
        self.momentum: tuple[torch.Tensor, ...] | None = None

    @torch.no_grad()
    def step(self, weight_MN: torch.Tensor, grad_MN: torch.Tensor) -> torch.Tensor:
        """Update the weight in place; returns the direction."""
        beta1, beta2 = self.betas
        moment_MN = torch.zeros_like(grad_MN)
        if self.momentum is not None:
            left, values, right = self.momentum
            moment_MN = left @ torch.diag(values) @ right.T
        direction_MN = torch.sign(beta1 * moment_MN + (1 - beta1) * grad_MN)
        weight_MN.sub_(self.lr * direction_MN)
        moment_MN = beta2 * moment_MN + (1 - beta2) * grad_MN
        self.momentum = torch.pca_lowrank(moment_MN, q=self.rank, center=False, niter=1)
        return direction_MN

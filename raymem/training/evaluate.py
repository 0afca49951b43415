"""Evaluation loss and perplexity over every evaluation row, each counted once whatever the number of workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from raymem.training.data.batches import eval_batches
from raymem.training.data.dataset import PackedRows
from raymem.training.dist_env import Layout
from raymem.training.loss import forward_loss_sum


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy per target token in nats, and how many targets it is the mean of."""

    loss: float
    num_targets: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(model: nn.Module, rows: PackedRows, layout: Layout, *, micro_batch: int, mixed: bool) -> Evaluation:
    """Collective: every rank evaluates its share and gets the whole result."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=layout.device)
    for batch in eval_batches(rows, layout.rank, layout.world_size, micro_batch):
        total += forward_loss_sum(model, batch.to(layout.device), mixed=mixed).double()
    model.train(was_training)
    if layout.world_size > 1:
        dist.all_reduce(total)
    num_targets = int(rows.num_targets.sum())
    return Evaluation(float(total) / num_targets, num_targets)

"""Computes loss and perplexity over every evaluation row, each counted once whatever the number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn

from raymem.metrics import Score
from raymem.training.data.batches import eval_batches
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.shards import Prepared
from raymem.training.dist_env import DistEnv
from raymem.training.loss import forward_loss_sum
from raymem.training.reporter import Row


@dataclass(frozen=True)
class Evaluation:
    """The mean cross-entropy per target token in nats, and the number of targets."""

    loss: float
    num_targets: int
    by_name: dict[str, Evaluation] = field(default_factory=dict)
    """The evaluation of each name, where ``data.eval`` has names; ``loss`` is over all targets together."""
    scores: tuple[Score, ...] = ()
    """Metrics of the model's own answers, where sources of ``data.eval`` have a ``metric``."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def metrics(self) -> Row:
        """Return ``eval_loss``, ``eval_perplexity``, an ``eval_loss/<name>`` for each name, and metrics of answers by
        their source: ``data.eval.math/numeric``.
        """
        named = {f"eval_loss/{name}": part.loss for name, part in self.by_name.items()}
        return {"eval_loss": self.loss, "eval_perplexity": self.perplexity, **named, **self.judged}

    @property
    def judged(self) -> Row:
        """Return the metrics of answers alone."""
        return {f"{score.where}/{score.metric}": score.value for score in self.scores}


EvaluationRows = PackedRows | Mapping[str, PackedRows]


def evaluation_rows(prepared: Prepared) -> EvaluationRows:
    """Open the rows of prepared evaluation data, by name if its sources have names."""
    names = list(dict.fromkeys(source.name for source in prepared.sources if source.name is not None))
    if not names:
        return PackedRows(prepared.directories)
    return {
        name: PackedRows([(source.directory, source.weight) for source in prepared.sources if source.name == name])
        for name in names
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, rows: EvaluationRows, dist_env: DistEnv, *, micro_batch: int, mixed: bool,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:  # fmt: skip
    """Evaluate this rank's share and return the whole result. Collective.

    Args:
        progress: called before each batch.
    """
    sets = rows if isinstance(rows, Mapping) else {"": rows}
    was_training = model.training
    model.eval()
    totals = torch.zeros(len(sets), dtype=torch.float64, device=dist_env.device)
    for index, part in enumerate(sets.values()):
        for batch in eval_batches(part, dist_env.rank, dist_env.world_size, micro_batch):
            progress()
            totals[index] += forward_loss_sum(model, batch.to(dist_env.device), mixed=mixed).double()
    model.train(was_training)
    if dist_env.world_size > 1:
        dist.all_reduce(totals)
    counts = [int(part.num_targets.sum()) for part in sets.values()]
    by_name = {
        name: Evaluation(total / count, count) for name, total, count in zip(sets, totals.tolist(), counts, strict=True)
    }
    whole = Evaluation(sum(totals.tolist()) / sum(counts), sum(counts))
    return replace(whole, by_name=by_name) if isinstance(rows, Mapping) else whole

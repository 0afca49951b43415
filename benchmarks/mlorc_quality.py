"""Pre-training the demo model: AdamW, MLorc and the paper's algorithm line by line, after equal steps.

Every run starts from the same weights per seed, sees the same rows and has the same learning rates. Resumable: a run
that was done before is not repeated. Several processes may share the work.

    python benchmarks/mlorc_quality.py [--steps 100] [--seeds 0 1 2] [--optimizers adamw "mlorc r32"] [--part 0/2]
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import provenance
import torch
from torch import nn

from raymem.cli.console import hush_libraries
from raymem.methods.mlorc import MLorcAdamW
from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.recipe.schema import Recipe
from raymem.runs.prepare import prepare_split
from raymem.runs.resolve import resolve
from raymem.runs.train import launch
from raymem.training.data.batches import eval_batches, global_targets, rank_batches
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.sampler import Sampler
from raymem.training.loss import forward_loss_sum
from raymem.training.model.build import build_model
from raymem.training.optim import Updater, lr_factor
from raymem.training.step import train_step

sys.path.append(str(Path(__file__).parents[1]))
from tests.helpers.straight_line import StraightLineAdamW

CONFIGURATIONS = (
    "adamw", "mlorc r4", "mlorc r32", "mlorc r1", "paper r4", "paper r32", "mlorc sqrt r4", "mlorc sqrt r32",
)  # fmt: skip
EVAL_BATCHES = 24
OPTIONS: dict[str, Any] = {"lr": 1.5e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class PaperOptimizer(torch.optim.Optimizer):
    """The straight-line algorithm on every matrix that MLorc would compress, AdamW on the rest."""

    def __init__(self, named: Mapping[str, nn.Parameter], rank: int) -> None:
        super().__init__(named.values(), OPTIONS)
        matrices = [p for p in named.values() if p.ndim == 2 and min(p.shape) >= 64]
        self._lines = {p: StraightLineAdamW(rank, **OPTIONS) for p in matrices}
        self._rest = torch.optim.AdamW([p for p in named.values() if p not in self._lines], **OPTIONS)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter, line in self._lines.items():
            line.lr = self.param_groups[0]["lr"]
            line.step(parameter.data, parameter.grad)
        self._rest.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self._rest.step()


def optimizer_for(configuration: str, seed: int) -> Any:
    kind, _, rank = configuration.rpartition(" r")
    if configuration == "adamw":
        return lambda named: torch.optim.AdamW(named.values(), fused=True, **OPTIONS)
    if kind == "paper":
        return lambda named: PaperOptimizer(named, int(rank))
    space = "sqrt" if "sqrt" in kind else "raw"
    return lambda named: MLorcAdamW(named.items(), rank=int(rank), seed=seed, second_moment=space, **OPTIONS)


def run(recipe: Recipe, configuration: str) -> dict[str, Any]:
    resolved = resolve(recipe, build_demo=launch)
    recipe = resolved.recipe
    split = {
        "train": PackedRows(prepare_split(resolved, "train").directories),
        "eval": PackedRows(prepare_split(resolved, "eval").directories),
    }
    model = build_model(recipe)
    torch.manual_seed(recipe.seed)
    parameters = dict(model.named_parameters())
    updater = Updater(parameters, optimizer_for(configuration, recipe.seed), masters=False)
    rows, steps = split["train"], recipe.train.steps or 0
    sampler = Sampler(recipe.seed, rows.sizes_and_weights, recipe.train.global_batch)

    start, losses, began = eval_loss(model, split["eval"]), [], time.process_time()
    for step in range(steps):
        ids = sampler.ids(step)
        batches = rank_batches(rows, ids, 0, 1, recipe.train.micro_batch)
        lr = OPTIONS["lr"] * lr_factor(step, steps, "cosine", 0.1)
        result = train_step(model, batches, global_targets(rows, ids), updater, step, lr, clip_norm=1.0)
        losses.append(float(result.loss))
    return {"start": start, "eval_loss": eval_loss(model, split["eval"]), "train_loss": statistics.mean(losses[-20:]),
            "cpu_s": time.process_time() - began}  # fmt: skip


@torch.no_grad()
def eval_loss(model: nn.Module, rows: PackedRows) -> float:
    """Mean loss per token over the first batches of the evaluation split."""
    model.eval()
    batches = list(itertools.islice(eval_batches(rows, 0, 1, 4), EVAL_BATCHES))
    total = sum(float(forward_loss_sum(model, batch, mixed=False)) for batch in batches)
    model.train()
    return total / sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches)


def summary(runs: Mapping[str, Mapping[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    """Per configuration: mean eval loss, and its distance from AdamW's as a share of AdamW's decrease since step 0."""
    rows = []
    for configuration in CONFIGURATIONS:
        found = [(runs.get(f"{configuration}/{seed}"), runs.get(f"adamw/{seed}")) for seed in seeds]
        pairs = [(mine, base) for mine, base in found if mine and base]
        if pairs:
            gap = [mine["eval_loss"] - base["eval_loss"] for mine, base in pairs]
            decrease = [base["start"] - base["eval_loss"] for _, base in pairs]
            rows.append({
                "optimizer": configuration,
                "seeds": len(pairs),
                "eval_loss": round(statistics.mean(mine["eval_loss"] for mine, _ in pairs), 4),
                "gap_to_adamw": round(statistics.mean(gap), 4),
                "gap_percent_of_decrease": round(100 * statistics.mean(gap) / statistics.mean(decrease), 2),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = provenance.parser(__doc__, steps=100, shared=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--storage", default="raymem-runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizers", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS, metavar="NAME")
    parser.add_argument("--name", default="mlorc_quality", help="of the result file; default: %(default)s")
    arguments = parser.parse_args()
    hush_libraries()
    torch.set_num_threads(arguments.threads)
    jobs = [(configuration, seed) for seed in arguments.seeds for configuration in CONFIGURATIONS[:6]]
    jobs += [(configuration, seed) for seed in arguments.seeds for configuration in CONFIGURATIONS[6:]]
    jobs = [job for job in jobs if job[0] in arguments.optimizers]
    runs = {}
    for configuration, seed in jobs[arguments.part]:
        overrides = [f"seed={seed}", f"train.steps={arguments.steps}", "data.eval={path: demo:text, split: eval}",
                     f"storage.path={arguments.storage}", "scaling.num_workers=0"]  # fmt: skip
        recipe = load_recipe(packaged_recipe("pretrain"), overrides)
        runs[f"{configuration}/{seed}"] = provenance.kept(
            f"mlorc_quality-{arguments.steps}-{configuration}-{seed}", functools.partial(run, recipe, configuration)
        )
    if len(runs) < len(jobs):
        return
    found = {"steps": arguments.steps, "table": summary(runs, arguments.seeds), "runs": runs}
    provenance.save(arguments.name, found)


if __name__ == "__main__":
    main()

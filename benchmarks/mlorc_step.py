"""One optimizer step: MLorc against the paper's algorithm as lean as torch says it, and against torch's fused AdamW.

``paper`` holds whole matrices for a moment and decomposes each momentum by ``torch.svd_lowrank`` of its own rank,
without oversampling; what is negative is looked for, and repaired only where there is some.

All of them take turns in one process; process CPU time on one thread, and wall time on two. fp32.

    python benchmarks/mlorc_step.py [--rounds 5]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import provenance
import torch
from torch import nn

from raymem.methods.mlorc import MLorcAdamW
from raymem.recipe.load import load_recipe, packaged_recipe
from raymem.training.model.build import build_model

Shape = tuple[int, int]
SETS: dict[str, list[Shape]] = {
    "small": [(1024, 1024)] * 16 + [(1024, 2816)] * 8,
    "large": [(4096, 4096), (11008, 4096), (4096, 11008)],
}


class Contestant:
    """One optimizer with weights of its own; all of them get the same gradients."""

    def __init__(self, shapes: Sequence[Shape], make: Callable[[list[nn.Parameter]], Callable[[], None]]) -> None:
        self.parameters = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
        self.step = make(self.parameters)

    def timed_step(self, gradients: Sequence[torch.Tensor], clock: Callable[[], float]) -> float:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        began = clock()
        self.step()
        seconds = clock() - began
        assert all(bool(parameter.isfinite().all()) for parameter in self.parameters)
        return seconds


class Paper:
    """The state of one matrix under MLorc-AdamW (algorithm 1)."""

    def __init__(
        self, rank: int, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.rank, self.lr, self.betas, self.eps = rank, lr, betas, eps
        self.factors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.count = 0

    @torch.no_grad()
    def step(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        self.count += 1
        beta1, beta2 = self.betas
        if self.factors:
            (u1, s1, v1), (u2, s2, v2) = self.factors
            first, second = (u1 * s1) @ v1.mT, (u2 * s2) @ v2.mT
            negative = second < 0
            if negative.any():
                second = torch.where(negative, -second[negative].mean(), second)
        else:
            first, second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (1 - beta2**self.count) ** 0.5
        weight.addcdiv_(first, second.sqrt().add_(self.eps * root), value=-self.lr * root / (1 - beta1**self.count))
        self.factors = [torch.svd_lowrank(moment, q=self.rank, niter=1) for moment in (first, second)]


def paper(rank: int) -> Callable[[list[nn.Parameter]], Callable[[], None]]:
    def make(parameters: list[nn.Parameter]) -> Callable[[], None]:
        papers = [Paper(rank) for _ in parameters]

        def step() -> None:
            for one, parameter in zip(papers, parameters, strict=True):
                assert parameter.grad is not None
                one.step(parameter.data, parameter.grad)

        return step

    return make


def contestants(shapes: Sequence[Shape], rank: int) -> dict[str, Contestant]:
    def torch_adamw(parameters: list[nn.Parameter]) -> Any:
        return torch.optim.AdamW(parameters, fused=True).step

    def mlorc(space: Any) -> Any:
        return lambda parameters: MLorcAdamW(parameters, rank=rank, second_moment=space).step

    makers = {"paper": paper(rank), "mlorc": mlorc("raw"), "mlorc sqrt": mlorc("sqrt"), "fused adamw": torch_adamw}
    return {name: Contestant(shapes, make) for name, make in makers.items()}


def measure(name: str, rank: int, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shapes = SETS[name]
    # Gradients as training has them: a few strong directions in noise.
    gradients = [0.1 * torch.randn(m, 16) @ torch.randn(16, n) + torch.randn(m, n) for m, n in shapes]
    found = contestants(shapes, rank)
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {key: [] for key in found}
    for _ in range(rounds + 1):
        for key, contestant in found.items():
            seconds[key].append(contestant.timed_step(gradients, clock))
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}  # without the first step
    return {
        "set": name,
        "rank": rank,
        "threads": threads,
        "clock": "process CPU" if threads == 1 else "wall",
        "ms": {key: round(1e3 * value, 1) for key, value in medians.items()},
        "times_faster_than_paper": {key: round(medians["paper"] / value, 2) for key, value in medians.items()},
        "mlorc_over_fused_adamw": round(medians["mlorc"] / medians["fused adamw"], 1),
    }


def share_of_a_training_step(rounds: int, tokens: int = 4096) -> dict[str, Any]:
    """Part of the process CPU time of forward, backward and step that the optimizer takes; the demo model."""
    torch.set_num_threads(1)
    recipe = load_recipe(packaged_recipe("pretrain"))
    shares: dict[str, list[float]] = {"mlorc": [], "mlorc sqrt": [], "fused adamw": []}
    model = build_model(recipe)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (tokens // 1024, 1024))
    named = list(model.named_parameters())
    optimizers = {"mlorc": MLorcAdamW(named), "mlorc sqrt": MLorcAdamW(named, second_moment="sqrt"),
                  "fused adamw": torch.optim.AdamW(model.parameters(), fused=True)}  # fmt: skip
    for _ in range(rounds + 1):
        for name, optimizer in optimizers.items():
            began = time.process_time()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            before_step = time.process_time()
            optimizer.step()
            ended = time.process_time()
            optimizer.zero_grad()
            assert bool(loss.isfinite())
            shares[name].append((ended - before_step) / (ended - began))
    return {"tokens": tokens, "percent": {name: round(100 * statistics.median(values[1:]), 2)
                                          for name, values in shares.items()}}  # fmt: skip


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows = [measure(name, rank, 1, rounds) for name in SETS for rank in (4, 32)]
    rows += [measure("large", rank, 2, rounds) for rank in (4, 32)]
    share = share_of_a_training_step(rounds)
    provenance.save("mlorc_step", {"rows": rows, "share_of_a_training_step": share, "sets": SETS})


if __name__ == "__main__":
    main()

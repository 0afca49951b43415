"""Forward and backward of one linear layer under MoRAM and its rivals: time over the frozen layer's, and peak.

All candidates take turns in every round, so that the machine's drift falls on each; a figure is the median over rounds
of the ratio to the frozen layer of the same round, in wall time and in CPU time (which does not see other processes
that take turns with this one). Peaks include the output and the gradient of the input.

    python benchmarks/moram_linear.py [--rounds 15] [--tokens 2048] [--dtype fp32|bf16] [--threads 2]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import provenance
import torch
import torch.nn.functional as F
from torch import nn

from raymem.memory.meter import PeakMeter
from raymem.methods.moram.base import BaseWeight
from raymem.methods.moram.ops import choose_formulation, moram_linear

INPUTS, OUTPUTS, RANK = 1024, 2816, 16
CONNECTIONS = (8, 16, 32, 64, 128)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Step = Callable[[], None]


def steps(tokens: int, dtype: torch.dtype) -> dict[str, Step]:
    """Name -> one forward and backward pass."""
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=source).mul_(0.02).to(dtype)
    x = torch.randn(tokens, INPUTS, generator=source).to(dtype).requires_grad_()
    grad_y = torch.randn(tokens, OUTPUTS, generator=source).to(dtype)

    def timed(forward: Callable[[], torch.Tensor], *trained: torch.Tensor) -> Step:
        def step() -> None:
            forward().backward(grad_y)
            for leaf in (x, *trained):
                leaf.grad = None

        return step

    found = {"frozen": timed(lambda: F.linear(x, weight)), "lora": _peft(weight, x, timed, "lora")}
    full = weight.clone().requires_grad_()
    found["full fine-tuning"] = timed(lambda: F.linear(x, full), full)
    for k in CONNECTIONS:
        index = torch.rand(OUTPUTS, INPUTS, generator=source).topk(k, dim=1).indices.sort(dim=1).values.int()
        factor_A = torch.randn(RANK, INPUTS, generator=source).to(dtype).requires_grad_()
        factor_B = torch.randn(OUTPUTS, RANK, generator=source).mul_(0.01).to(dtype).requires_grad_()
        mask = torch.zeros(OUTPUTS, INPUTS, dtype=dtype).scatter_(1, index.long(), 1.0)

        def moram(formulation: Any, index: Any = index, A: Any = factor_A, B: Any = factor_B) -> torch.Tensor:
            return moram_linear(x, index, A, B, scale=2.0, base=BaseWeight(weight), formulation=formulation)

        def dense(mask: Any = mask, A: Any = factor_A, B: Any = factor_B) -> torch.Tensor:
            return F.linear(x, weight + mask * (B @ A) * 2.0)

        for formulation in ("fast", "frugal"):
            run = timed(lambda formulation=formulation, moram=moram: moram(formulation), factor_A, factor_B)  # type: ignore[misc]
            found[f"moram {formulation} k={k}"] = run
        found[f"dense mask k={k}"] = timed(dense, factor_A, factor_B)
        found[f"shira k={k}"] = _peft(weight, x, timed, "shira", k)
    return found


def _peft(weight: torch.Tensor, x: torch.Tensor, timed: Callable[..., Step], kind: str, k: int = 0) -> Step:
    """PEFT's own layer; SHiRA with as many values as k connections per output."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    linear = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    r = RANK if kind == "lora" else max(1, round(OUTPUTS * k / (OUTPUTS + INPUTS)))
    config = (LoraConfig if kind == "lora" else ShiraConfig)(r=r, target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
    return timed(lambda: model(x), *(p for p in model.parameters() if p.requires_grad))


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    candidates = steps(arguments.tokens, dtype)
    peaks = {}
    for name, step in candidates.items():
        step()
        with PeakMeter(torch.device("cpu"), lambda: []) as meter:
            step()
        assert meter.peak is not None
        peaks[name] = meter.peak.allocated_bytes
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(arguments.rounds):
        for name, step in candidates.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            step()
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu_began)

    def over_frozen(times: dict[str, list[float]], name: str) -> float:
        return statistics.median(mine / base for mine, base in zip(times[name], times["frozen"], strict=True))

    figures = {
        name: {
            "over_frozen": over_frozen(seconds, name),
            "cpu_over_frozen": over_frozen(cpu_seconds, name),
            "best_over_best": min(seconds[name]) / min(seconds["frozen"]),
            "peak_mb": peaks[name] / 2**20,
        }
        for name in candidates
    }
    chosen = {k: choose_formulation(k / INPUTS, dtype, "cpu") for k in CONNECTIONS}
    provenance.save(
        f"moram_linear_{arguments.dtype}",
        {
            "layer": [INPUTS, OUTPUTS], "rank": RANK, "tokens": arguments.tokens, "dtype": arguments.dtype,
            "threads": arguments.threads, "rounds": arguments.rounds,
            "frozen_ms": 1e3 * statistics.median(seconds["frozen"]),
            "automatic_choice": chosen, "candidates": figures,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()

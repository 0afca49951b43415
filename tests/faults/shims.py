"""Changes to a session's own process that stand for a fault of its machine. Called before the command begins."""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any


def nan_gradients(step: int) -> None:
    """Make the gradients of the ``step``-th step NaN, once a step was taken by this process so often."""
    loop: Any = importlib.import_module("raymem.training.loop")

    original, taken = loop.train_step, [0]

    def train_step(model: Any, *arguments: Any, **options: Any) -> Any:
        taken[0] += 1
        if taken[0] == step:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
            try:
                return original(model, *arguments, **options)
            finally:
                handle.remove()
        return original(model, *arguments, **options)

    loop.train_step = train_step


def clock_jumps(step: int, seconds: float) -> None:
    """Set this process's wall clock forward or back before the ``step``-th step; files keep the system's clock."""
    loop: Any = importlib.import_module("raymem.training.loop")

    real, real_ns, original, taken = time.time, time.time_ns, loop.train_step, [0]

    def offset() -> float:
        return seconds if taken[0] >= step else 0.0

    def train_step(*arguments: Any, **options: Any) -> Any:
        taken[0] += 1
        return original(*arguments, **options)

    time.time = lambda: real() + offset()
    time.time_ns = lambda: real_ns() + int(offset() * 1e9)
    loop.train_step = train_step


def slow_disk(folder: str, seconds: float) -> None:
    """Make every use of a file below ``folder`` wait."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.scandir") and arguments:
            path = arguments[0]
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
                time.sleep(seconds)

    real = os.fsync

    def fsync(fd: Any) -> None:
        time.sleep(10 * seconds)
        real(fd)

    sys.addaudithook(audit)
    os.fsync = fsync


def paced_workers(seconds: float, nan_at: int = 0) -> None:
    """Make each step of the Ray workers last so much longer, that there is time to strike between two checkpoints.

    Args:
        nan_at: also make the gradients of a worker's step of this number NaN; 0 for none.
    """
    from raymem.cluster.train import controller, worker

    original = worker.train_worker

    def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
        loop: Any = importlib.import_module("raymem.training.loop")
        from tests.faults import shims

        if nan_at:
            shims.nan_gradients(nan_at)
        step = loop.train_step

        def train_step(*arguments: Any, **options: Any) -> Any:
            time.sleep(seconds)
            return step(*arguments, **options)

        loop.train_step = train_step
        try:
            return original(config)
        finally:
            loop.train_step = step

    controller.train_worker = train_worker  # type: ignore[attr-defined]

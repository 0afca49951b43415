"""Directories of runs and sweeps written by hand, as raymem leaves them, for the page about them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from raymem.memory.trace import CATEGORIES
from raymem.runs.record import DATA, PLAN, note_predictions
from raymem.storage.storage import Storage
from tests.helpers.support import make_recipe, merged

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><b>&amp;"
"""A text that runs code in a page that does not escape it."""
MIB = 1 << 20


def write_run(
    storage: Path, name: str = "run", *, steps: int = 40, slope: float = 1.0, text: str = "the answer", **changes: Any
) -> Path:
    """A finished run of ``steps`` steps with all that a run may leave; ``changes`` are laid over its recipe."""
    run = Storage.open(str(storage / name))
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": float(step),
            "loss": 5.0 - slope * math.log(step) + 0.1 * (step % 3),
            "grad_norm": 1.0 / step,
            "lr": 1e-3 * (1 - step / (steps + 1)),
            "tokens_per_s": 900.0 + step % 7,
            "epoch": step / 100,
            "elapsed_s": float(step),
        }
        if step in (2, 3):
            row |= {"peak_bytes": 90.0 * MIB, "held_bytes/weights": 30.0 * MIB, "held_bytes/trainable": 5.0 * MIB}
            row |= {"held_bytes/optimizer": 10.0 * MIB}
        if step % 10 == 0:
            loss = 5.2 - slope * math.log(step)
            row |= {"eval_loss": loss, "eval_perplexity": math.exp(loss)}
        rows.append(row)
    run.write_bytes("metrics.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    recipe = make_recipe({"name": name}, changes).to_dict()
    facts = {"raymem": "0", "recipe": recipe, "step": steps, "eval_loss": 2.0, "peak_bytes": 90 * MIB}
    run.write_json("adapter/raymem.json", facts)
    write_data(run, text)
    write_plan(run)
    answer = {"prompt": f"prompt: {text}", "prediction": f"prediction: {text}", "reference": f"reference: {text}"}
    note_predictions(run, "adapter", [answer])
    return storage / name


def write_data(run: Storage, text: str) -> None:
    """The record of the data."""
    source = {
        "path": f"{text}.jsonl", "num_read": 1200, "num_kept": 1100, "dropped": {f"because {text}": 100},
        "how": f"read as {text}",
        "truncated": 7, "num_tokens": 5000, "num_targets": 2500, "fill": 0.9,
    }  # fmt: skip
    parts = [{"text": f"context {text}", "is_target": False}, {"text": f"target {text}", "is_target": True}]
    run.write_record(DATA, {"train": [source], "examples": [{"parts": parts, "left_out": 12}]})


def write_plan(run: Storage) -> None:
    """The record of the plan."""
    step: dict[str, int] = {t: size * MIB for t, size in zip(CATEGORIES, (30, 5, 4, 10, 35, 4, 1), strict=True)}
    plan = {
        "terms": step, "phases": {"backward": {**step, "peak_bytes": 89 * MIB}, "forward": {"peak_bytes": 1}},
        "peak_bytes": 95 * MIB, "capacity_bytes": 100 * MIB, "traced": True,
    }  # fmt: skip
    run.write_record(PLAN, plan)


def trial(number: int, status: str, **changes: Any) -> dict[str, Any]:
    """A row of a sweep's report."""
    row = {
        "number": number, "status": status, "point": {"adapter.rank": 2**number}, "metrics": {}, "overhead_s": None,
        "predicted_bytes": None, "measured_bytes": None, "problem": None,
    }  # fmt: skip
    return merged(row, changes)


def finished(number: int, loss: float, mib: int) -> dict[str, Any]:
    """A trial that came to its end."""
    metrics = {"eval_loss": loss, "loss": loss, "peak_bytes": float(mib * MIB)}
    sizes = {"predicted_bytes": mib * MIB, "measured_bytes": mib * MIB}
    return trial(number, "finished", metrics=metrics, **sizes)


TRIALS = [
    finished(0, 3.0, 60),
    finished(1, 2.5, 80),
    finished(2, 2.6, 90),
    trial(3, "failed", problem="loss is not finite"),
    trial(4, "refused", predicted_bytes=130 * MIB),
    trial(5, "refused", problem="adapter.rank: 32 is too large"),
    trial(6, "refused", predicted_bytes=900 * MIB),
]
"""Trials 0 and 1 are the front; 2 is beaten by 1."""


def write_sweep(storage: Path, name: str = "sweep", trials: list[dict[str, Any]] | None = None) -> Path:
    """A sweep under 100 MiB."""
    folder = Storage.open(str(storage / name))
    space = {"adapter.rank": {"choice": [1, 2, 4]}}
    folder.write_record("sweep.json", {"budget": 100 * MIB, "objective": ["eval_loss"], "space": space, "key": "ab"})
    folder.write_json("report/trials.json", TRIALS if trials is None else trials)
    folder.write_bytes("report/best.yaml", b"# the best\nadapter: {rank: 2}\n")
    return storage / name

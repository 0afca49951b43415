"""Reading what a run left in its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def losses(run: Path) -> list[float]:
    """Losses by step; each step has one line, whatever happened to the run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def result_bytes(run: Path) -> bytes:
    """All tensors of the adapter that a run made, or of the model if it made a model."""
    found = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    assert found, f"{run} has no result"
    return b"".join(file.read_bytes() for file in sorted(found))


def write_recipe(path: Path, storage: Path, model: Path, examples: Path, /, **sections: Any) -> Path:
    """A recipe file of a few steps in one process; ``sections`` take the place of its own."""
    raw = {
        "model": {"name": str(model)},
        "data": {
            "train": str(examples / "train.jsonl"),
            "eval": str(examples / "eval.jsonl"),
            "sequence_length": 32,
        },
        "adapter": {"rank": 4},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 4, "global_batch": 4, "micro_batch": 2, "save_every": 2},
        "scaling": {"num_workers": 0},
        "storage": {"path": str(storage / "runs")},
        "tracking": "none",
        **sections,
    }
    path.write_text(yaml.safe_dump(raw))
    return path

"""Reading what a run left in its directory."""

from __future__ import annotations

import json
from pathlib import Path


def losses(run: Path) -> list[float]:
    """Losses by step as the driver saw them; of a replayed step the last."""
    rows = {row["step"]: row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert sorted(rows) == list(range(1, len(rows) + 1)), "a step is missing"
    return [loss for _, loss in sorted(rows.items())]


def result_bytes(run: Path) -> bytes:
    """All tensors of the adapter that a run made, or of the model if it made a model."""
    found = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    assert found, f"{run} has no result"
    return b"".join(file.read_bytes() for file in sorted(found))

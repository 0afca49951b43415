"""Remembers measured peaks of runs beside the predicted ones, per kind of device and method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymem.cache import cache_root, read_json, write_json
from raymem.recipe.schema import Recipe


def method_of(recipe: Recipe) -> str:
    """Name a recipe's five kinds in a word, such as ``full+lora+checkpoint+auto+adamw``."""
    base = "nf4" if getattr(recipe.base, "quantize", "none") == "nf4" else recipe.base.kind
    return "+".join((base, recipe.adapter.kind, recipe.activations.kind, recipe.loss.kind, recipe.optimizer.kind))


def record(recipe: Recipe, predicted_bytes: int, measured_bytes: int) -> None:
    """Take in one run."""
    records, key = _read(), _key(recipe)
    before, now = records.get(key, {}), measured_bytes / predicted_bytes
    records[key] = {
        "runs": before.get("runs", 0) + 1,
        "sum": before.get("sum", 0.0) + now,
        "highest": max(before.get("highest", 0.0), now),
    }
    write_json(_file(), records)


def ratio(recipe: Recipe) -> tuple[float, int] | None:
    """Return the mean of measured over predicted peak and the number of runs; None before the first one."""
    record = _read().get(_key(recipe))
    return None if record is None else (record["sum"] / record["runs"], record["runs"])


def highest(recipe: Recipe) -> float | None:
    """Return the largest measured over predicted peak of these methods; None before the first run."""
    highest_ratio: float | None = _read().get(_key(recipe), {}).get("highest")
    return highest_ratio


def _key(recipe: Recipe) -> str:
    return f"{'cuda' if recipe.scaling.use_gpu else 'cpu'}/{method_of(recipe)}"


def _file() -> Path:
    return cache_root() / "calibration.json"


def _read() -> dict[str, Any]:
    return read_json(_file()) or {}

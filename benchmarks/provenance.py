"""Shared parts of the benchmarks: arguments, runs that are kept, result files that say where they came from."""

from __future__ import annotations

import argparse
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

OUT = "RAYMEM_BENCHMARK_RESULTS"
"""The environment variable that names another directory of results."""
SINCE = "RAYMEM_BENCHMARK_SINCE"
"""The environment variable with the time, in seconds, before which no kept row counts."""
RESULTS = Path(os.environ.get(OUT) or Path(__file__).parent / "results")
PARTS = RESULTS / "parts"
PACKAGES = ("torch", "ray", "transformers", "peft", "mlflow")

Found = TypeVar("Found")


def parser(
    doc: str | None, *, base: str | None = None, steps: int | None = None, shared: bool = False
) -> argparse.ArgumentParser:
    """Return a benchmark's parser; with ``base`` it has the options of those that train a demo model.

    Args:
        base: demo model that is fine-tuned unless told otherwise.
        steps: of training, unless told otherwise.
        shared: several processes can share the runs, each with its ``--part``.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if base is not None:
        found.add_argument("--model", default=base, help="demo model (make_base.py); default: %(default)s")
        found.add_argument("--storage", type=Path, default=Path("raymem-runs"), help="where it was built")
    if steps is not None:
        found.add_argument("--steps", type=int, default=steps, help="of every training; default: %(default)s")
    if shared:
        found.add_argument("--part", default="0/1", type=_slice, help="I/N: do every N-th run, from the I-th on")
    return found


def _slice(part: str) -> slice:
    first, _, count = part.partition("/")
    return slice(int(first), None, int(count))


def kept(key: str, work: Callable[[], Found]) -> Found:
    """Return the result of ``work`` as JSON keeps it: once done it is read from ``results/parts/``.

    Args:
        key: all that the result depends on.
    """
    path = PARTS / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', key)}.json"
    if not path.exists() or path.stat().st_mtime < float(os.environ.get(SINCE, 0)):
        found = work()
        PARTS.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found))
        unfinished.replace(path)
        print(key, found, flush=True)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def commit() -> str:
    """Return the commit of raymem's code, and whether it was changed since."""
    root = Path(__file__).parents[1]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "raymem"], cwd=root, capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def origin() -> dict[str, Any]:
    """Return where figures come from: date, commit, versions, device."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores",
    }


def entered(name: str, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the row ``key`` of ``results/<name>.jsonl``, where ``work`` enters it if it is not there yet.

    A file of rows that may each take an hour, some on one day and some on another: every row says where it comes from.
    Processes may share it.
    """
    path = RESULTS / f"{name}.jsonl"
    for row in entries(path):
        if row["key"] == key and row["time"] >= float(os.environ.get(SINCE, 0)):
            return row
    row = {"key": key, **work(), "time": round(time.time()), "provenance": origin()}
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
    print(key, flush=True)
    return row


def entries(path: Path) -> list[dict[str, Any]]:
    """Return the rows of such a file, of each key the latest one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({row["key"]: row for row in map(json.loads, lines)}.values())


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` and print it."""
    contents = {**figures, "provenance": origin()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n")
    print(path.read_text())
    return path

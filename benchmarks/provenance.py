"""What every result file says about where it came from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "ray", "transformers", "peft", "mlflow")


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` and print it."""
    import torch

    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "raymem"], cwd=root, capture_output=True, text=True)
    contents = {
        **figures,
        "provenance": {
            "date": datetime.date.today().isoformat(),
            "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores",
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n")
    print(path.read_text())
    return path

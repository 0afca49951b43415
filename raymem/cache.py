"""What is kept between runs on this machine: plans, calibration, what probes found. All of it can be made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def cache_root() -> Path:
    """RAYMEM_CACHE, or raymem's folder in the user's cache directory."""
    base = os.environ.get("RAYMEM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "raymem")
    return Path(base).expanduser()


def read_json(file: Path) -> Any:
    """What a file holds; None if it is not there or cannot be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def write_json(file: Path, value: Any) -> None:
    """Write a file as a whole; one that cannot be written is left out, since all of this can be made again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(value))
        part.replace(file)
    except OSError:
        return

"""What tests of a model's own answers share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """Seven prompts with answers."""
    rows = [{"prompt": f"w{n} w50 w{n}", "completion": f" w{2 * n}"} for n in range(1, 8)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

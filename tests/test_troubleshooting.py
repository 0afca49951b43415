"""docs/troubleshooting.md speaks of messages that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = [
    message for cells in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE) for message in re.findall(r"`([^`]+)`", cells)
]


@pytest.fixture(scope="module")
def texts() -> str:
    """All texts in the sources, one a line, with {} for what is filled in."""
    found = []
    for file in (ROOT / "raymem").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_page_has_messages() -> None:
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", MESSAGES)
def test_it_is_one_that_raymem_gives(message: str, texts: str) -> None:
    pieces = [piece.strip() for piece in message.split("...")]
    pattern = r"[^\n]*?".join(re.escape(piece) for piece in pieces)
    assert re.search(pattern, texts), message

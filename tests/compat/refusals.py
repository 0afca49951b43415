"""A pytest plugin for the lowest environment: what raymem refuses there by name is skipped, and counted."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

REFUSALS = ("through hooks that peft has since 0.21",)
"""Parts of the sentences that docs/versions.md announces."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Report a test that ended with such a sentence as skipped."""
    report = yield
    if report.failed and call.excinfo is not None:
        said = str(call.excinfo.value)
        if any(part in said for part in REFUSALS):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.reportinfo()[1] or 0, f"Skipped: {said[:200]}")
    return report

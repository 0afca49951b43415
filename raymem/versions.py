"""The releases of the large libraries that raymem is tested with; docs/versions.md has the results.

What is older than the window is refused by pip, by the requirements in pyproject.toml. What is newer is used, with a
warning: a new release breaks less often than it works.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """The lowest and the newest minor release that were tested."""

    lowest: str
    newest: str

    def __str__(self) -> str:
        return f"{self.lowest} to {self.newest}"

    def is_older(self, installed: str) -> bool:
        """Say whether a release comes before the window."""
        return _release(installed) < _release(self.lowest)

    def is_newer(self, installed: str) -> bool:
        """Say whether a release comes after the window; patches of the newest minor release do not."""
        newest = _release(self.newest)
        return _release(installed)[: len(newest)] > newest


WINDOWS = {
    "torch": Window("2.11", "2.15"),
    "ray": Window("2.51", "2.60"),
    "transformers": Window("5.12", "5.24"),
    "peft": Window("0.19", "0.21"),
    "mlflow": Window("3.7", "3.17"),
}


def newer_than_tested() -> list[str]:
    """Return a sentence for each installed library that is newer than what raymem was tested with."""
    sentences = []
    for name, window in WINDOWS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if window.is_newer(installed):
            sentences.append(
                f"{name} {installed} is newer than what raymem was tested with ({window}); it is used all the same"
            )
    return sentences


@functools.cache
def warn_of_newer() -> None:
    """Warn of libraries that are newer than tested, once in a process."""
    for sentence in newer_than_tested():
        log.warning("%s", sentence)


def _release(text: str) -> tuple[int, ...]:
    """Return the numbers of a version: (2, 13, 0) of 2.13.0+cpu and of 2.13.0rc1."""
    from packaging.version import Version

    return Version(text).release

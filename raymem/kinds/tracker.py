"""Defines the base class of the kinds of the ``tracking`` axis."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from raymem.kinds.core import Kind, OptionsT


class TrackerKind(Kind[OptionsT]):
    """A tracking system, in which runs are recorded."""

    @abstractmethod
    def load(self) -> type[Any]:
        """Return the class of its trackers, a :class:`raymem.tracking.Tracker`; nothing heavy is imported before."""

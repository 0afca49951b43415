"""No tracking as a kind of the ``tracking`` axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, TrackerKind


@dataclass(frozen=True)
class NoTracking:
    """Metrics are only printed and written beside the checkpoints."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["none"] = "none"


class NoTrackingKind(TrackerKind[NoTracking]):
    """Records nothing."""

    options = NoTracking

    def load(self) -> type[Any]:
        from raymem.tracking.tracker import NullTracker

        return NullTracker

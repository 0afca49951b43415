"""Weights & Biases as a kind of the ``tracking`` axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, TrackerKind


@dataclass(frozen=True)
class WandbTracking:
    """Weights & Biases run; its key is WANDB_API_KEY, or what ``wandb login`` wrote, and never stands in a recipe."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["wandb"] = "wandb"
    project: str = "raymem"
    entity: str | None = None
    """User or team; by default that of the key."""
    mode: Literal["online", "offline"] | None = None
    """``offline`` writes files in the storage path, for ``wandb sync``; by default WANDB_MODE, or else ``online``."""
    log_model: bool = False
    """Upload the final adapter or model as an artifact."""


class WandbKind(TrackerKind[WandbTracking]):
    """Its library is imported with the first run."""

    options = WandbTracking

    def load(self) -> type[Any]:
        from raymem.tracking.wandb_tracker import WandbTracker

        return WandbTracker

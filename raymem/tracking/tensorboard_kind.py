"""TensorBoard as a kind of the ``tracking`` axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, TrackerKind


@dataclass(frozen=True)
class TensorBoardTracking:
    """TensorBoard event files: the recipe as text, and metrics."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["tensorboard"] = "tensorboard"
    directory: str | None = None
    """What ``tensorboard --logdir`` is given: each run has a folder there; by default ``tensorboard`` below the storage
    path."""


class TensorBoardKind(TrackerKind[TensorBoardTracking]):
    """Its library is imported with the first run."""

    options = TensorBoardTracking
    paths = ("directory",)

    def load(self) -> type[Any]:
        from raymem.tracking.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker

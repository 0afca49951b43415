"""Several tracking systems at once as a kind of the ``tracking`` axis, for which a recipe may write a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, Rule, TrackerKind
from raymem.recipe.axes import TRACKERS
from raymem.recipe.axis_field import AxisField


@dataclass(frozen=True)
class SeveralTracking:
    """Several at once; ``tracking: [mlflow, {kind: tensorboard, directory: /logs}]`` is short for it."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["several"] = "several"
    trackers: tuple[Annotated[Any, AxisField(TRACKERS)], ...] = ()
    """Kinds, or sections as above."""

    def __post_init__(self) -> None:
        if any(hasattr(one, "trackers") for one in self.trackers):
            raise ValueError("trackers: a list within a list; write one list")


class SeveralKind(TrackerKind[SeveralTracking]):
    """Each is started, logged to and finished as if it was alone."""

    options = SeveralTracking
    nested = ("trackers",)

    def rules(self) -> Sequence[Rule]:
        """Refuse an empty list."""
        return [
            Rule(
                ("tracking.trackers: []",), "it names no kind, and nothing would be recorded",
                "name one or more, or set tracking: none", lambda recipe: not recipe.tracking.trackers,
            )
        ]  # fmt: skip

    def load(self) -> type[Any]:
        from raymem.tracking.several_trackers import SeveralTrackers

        return SeveralTrackers

"""MLflow as a kind of the ``tracking`` axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from raymem.kinds import OPTIONS_RULES, TrackerKind


@dataclass(frozen=True)
class MlflowTracking:
    """MLflow run, parameters, metrics and the final artefact."""

    __pydantic_config__: ClassVar = OPTIONS_RULES

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """Tracking server; by default MLFLOW_TRACKING_URI, or else sqlite under the storage path."""
    experiment: str = "raymem"
    register_as: str | None = None
    """Registered model that gets the final adapter or model as a new version."""
    alias: str = "candidate"
    """Alias of that version."""
    system_metrics: bool = False
    """Log how busy CPU, memory, disk, network and GPUs of the driver's machine are, every ten seconds at most."""


class MlflowKind(TrackerKind[MlflowTracking]):
    """Its library is imported with the first run."""

    options = MlflowTracking

    def load(self) -> type[Any]:
        from raymem.tracking.mlflow.tracker import MlflowTracker

        return MlflowTracker

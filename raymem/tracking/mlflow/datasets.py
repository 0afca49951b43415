"""Tells MLflow which data a run has read: the column "Dataset" of its pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from raymem.tracking.tracker import DatasetFacts


def log_datasets(client: Any, run_id: str, datasets: Sequence[DatasetFacts]) -> None:
    """Add data sets to a run; those that it has already are not doubled."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=facts.name,
                digest=facts.digest,
                source_type="local" if "://" not in facts.source and facts.source.startswith("/") else "external",
                source=json.dumps({"uri": facts.source}),
                schema=json.dumps({"mlflow_tensorspec": {"features": _features(facts)}}),
                profile=json.dumps(dict(facts.figures)),
            ),
            tags=[InputTag("mlflow.data.context", facts.context)],
        )
        for facts in datasets
    ]
    if inputs:
        client.log_inputs(run_id, datasets=inputs)


def _features(facts: DatasetFacts) -> list[dict[str, Any]]:
    """Return the columns of the rows as MLflow describes tensors."""
    shape = [-1, facts.sequence_length]
    return [
        {"name": name, "type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}
        for name, dtype in facts.columns.items()
    ]

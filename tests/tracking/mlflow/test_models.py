"""Adapters as models of MLflow: logged once, registered once, and again when they change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.tracking import DatasetFacts
from raymem.tracking.mlflow.client import connect
from raymem.tracking.mlflow.models import is_adapter
from raymem.tracking.mlflow.tracker import MlflowTracker
from tests.helpers.tracking import Server, recipe, start


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Iterator[MlflowTracker]:
    # Nothing is registered here: mlflow's server would tell its registry to all clients of this process.
    yield start(str(tmp_path), tracking=recipe(uri=server.uri)["tracking"])
    server.up = True


def models(tracker: MlflowTracker) -> list[Any]:
    client = connect(tracker.tracking_uri)
    run = client.get_run(tracker.run_id)
    return list(client.search_logged_models([run.info.experiment_id], f"source_run_id = '{tracker.run_id}'"))


def test_an_adapter_is_logged_once_and_again_when_it_changes(storage: str, adapter: Path) -> None:
    tracker = start(storage, tracking=recipe(register_as="mine")["tracking"])
    tracker.log([{"step": 3, "loss": 2.0}])
    for _ in range(2):
        result = tracker.finish("FINISHED", {"adapter": adapter}, model="adapter")
        assert (result.problem, result.model_version) == (None, "mine/1")
    (model,) = models(tracker)
    assert str(model.status) == "READY" and model.name == "run1" and model.model_type == "adapter"
    assert [(m.key, m.value, m.step) for m in model.metrics] == [("loss", 2.0, 3)]
    assert model.tags["raymem.base_model"] == "org/base" and model.params["model.revision"] == "abc123"
    client = connect(tracker.tracking_uri)
    (output,) = client.get_run(tracker.run_id).outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 3)
    # By the model's id, unless another test has told mlflow of another server for all of this process.
    version = client.get_model_version_by_alias("mine", "candidate")
    assert version.source in (f"models:/{model.model_id}", model.artifact_location)
    assert [point.value for point in client.get_metric_history(tracker.run_id, "loss")] == [2.0]

    (adapter / "adapter_model.safetensors").write_bytes(b"trained further")
    assert tracker.finish("FINISHED", {"adapter": adapter}, model="adapter").model_version == "mine/2"
    assert len(models(tracker)) == 2


def test_a_model_that_an_outage_cut_is_completed_later(
    server: Server, remote: MlflowTracker, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(remote.tracking_uri)
    with monkeypatch.context() as patch:
        patch.setattr(type(client), "log_model_artifacts", lambda *args: 1 / 0)
        result = remote.finish("FINISHED", {"adapter": adapter}, model="adapter")
    assert result.problem is not None and "did not arrive: run the same command again" in result.problem
    assert [str(model.status) for model in models(remote)] == ["PENDING"]
    again = MlflowTracker(remote.tracking_uri, str(remote.run_id))
    assert again.finish("FINISHED", {"adapter": adapter}, model="adapter").problem is None
    assert [str(model.status) for model in models(remote)] == ["READY"]


def test_a_whole_model_is_no_adapter(adapter: Path) -> None:
    assert is_adapter(adapter)
    (adapter / "config.json").write_text("{}")
    assert not is_adapter(adapter)


def test_data_sets_are_named_once(storage: str) -> None:
    figures = {"num_rows": 7, "how": "format text"}
    columns = {"input_ids": "int32"}
    facts = DatasetFacts("a.jsonl", "training", "0123456789abcdef", "/data/a.jsonl", 32, columns, figures)
    for resume in (False, True):
        tracker = start(storage, resume=resume, datasets=[facts])
    run = connect(tracker.tracking_uri).get_run(tracker.run_id)
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("a.jsonl", "0123456789abcdef")
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]
    assert json.loads(entry.dataset.profile) == figures and json.loads(entry.dataset.source) == {"uri": "/data/a.jsonl"}

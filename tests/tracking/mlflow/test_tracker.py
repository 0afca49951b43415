"""MlflowTracker against mlflow's own stores: sqlite, and its REST application that is stopped and started."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from raymem.tracking import NullTracker
from raymem.tracking.mlflow.client import connect
from raymem.tracking.mlflow.tracker import MlflowTracker
from tests.helpers.tracking import Server, recipe, start

REGISTERED = {"tracking": recipe(register_as="my-model", alias="champion")["tracking"]}


def history(tracker: MlflowTracker, key: str) -> list[tuple[int, float]]:
    """What the server holds, in order of steps."""
    found = connect(tracker.tracking_uri).get_metric_history(tracker.run_id, key)
    return sorted((m.step, m.value) for m in found)


@pytest.fixture
def tracker(storage: str) -> MlflowTracker:
    return start(storage, **REGISTERED)


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Iterator[MlflowTracker]:
    made = start(str(tmp_path), tracking=recipe(uri=server.uri, register_as="my-model", alias="champion")["tracking"])
    made._retry_after_s = 0.2
    yield made
    server.status = None
    server.up = True


def test_rows_become_metrics(tracker: MlflowTracker) -> None:
    tracker.log([{"step": 0, "loss": 2.5, "lr": 1e-3, "note": "text", "flag": True, "nothing": None}])
    tracker.log([{"step": 1, "loss": 2, "eval_loss": float("nan")}])
    assert history(tracker, "loss") == [(0, 2.5), (1, 2.0)]
    assert set(connect(tracker.tracking_uri).get_run(tracker.run_id).data.metrics) == {"loss", "lr", "eval_loss"}
    summary = tracker.result()
    assert (summary.logged, summary.failures, summary.problem) == (4, 0, None)


def test_a_database_that_another_program_holds_is_one_warning(
    tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """mlflow itself waits for 20 seconds, and prints a traceback each time."""
    text = sqlalchemy.sql.text
    monkeypatch.setattr(sqlalchemy.sql, "text", lambda words: text(words.replace("20000", "20")))
    tracker._retry_after_s = 0.0
    with contextlib.closing(sqlite3.connect(tracker.tracking_uri.removeprefix("sqlite:///"))) as other:
        other.execute("BEGIN EXCLUSIVE")
        tracker.log([{"step": 1, "loss": 0.5}])
        tracker.log([{"step": 2, "loss": 0.25}])
    assert tracker.result().failures == 2
    tracker.log([{"step": 3, "loss": 0.125}])
    assert history(tracker, "loss") == [(1, 0.5), (2, 0.25), (3, 0.125)]
    problem = tracker.finish("FINISHED").problem
    assert problem is not None
    assert "failed 2 times" in problem and "database is locked" in problem and "all metric values arrived" in problem
    (record,) = caplog.records
    assert record.name == "raymem.tracking" and "database is locked" in record.getMessage()
    assert "Traceback" not in capsys.readouterr().err


def test_replayed_steps_are_not_logged_again(tracker: MlflowTracker) -> None:
    rows = [{"step": s, "loss": 1.0 / (s + 1), **({"eval_loss": 1.0} if s == 2 else {})} for s in range(5)]
    tracker.log(rows[:4])
    tracker.log(rows[2:])
    again = MlflowTracker(tracker.tracking_uri, str(tracker.run_id))  # a driver after its restart
    again.log(rows)
    again.log([{"step": 5, "loss": 0.1}])
    assert [s for s, _ in history(tracker, "loss")] == [0, 1, 2, 3, 4, 5]
    assert [s for s, _ in history(tracker, "eval_loss")] == [2]
    # one metric that is behind does not hold another back
    again.log([{"step": 4, "loss": 9.0, "eval_loss": 0.5}])
    assert [s for s, _ in history(tracker, "eval_loss")] == [2, 4]


def test_one_request_per_call_and_large_batches(server: Server, remote: MlflowTracker) -> None:
    remote.log([{"step": 0, "loss": 1.0}])
    server.requests.clear()
    remote.log([{"step": s, "loss": 1.0, "lr": 2.0, "grad_norm": 3.0} for s in range(1, 4)])
    assert server.requests == ["/api/2.0/mlflow/runs/log-batch"]
    server.requests.clear()
    remote.log([{"step": s, "loss": 1.0} for s in range(4, 2204)])
    assert server.requests == ["/api/2.0/mlflow/runs/log-batch"] * 3
    assert remote.result().logged == 1 + 9 + 2200


def test_outage_is_survived_and_mended(server: Server, remote: MlflowTracker) -> None:
    remote.log([{"step": 0, "loss": 1.0}])
    server.up = False
    start = time.monotonic()
    for step in range(1, 200):
        remote.log([{"step": step, "loss": 1.0 / step}])
    assert time.monotonic() - start < 5
    down = remote.result()
    assert down.waiting == 199
    assert 1 <= down.failures <= 1 + (time.monotonic() - start) / 0.2
    assert down.problem is not None
    assert f"tracking at {server.uri} failed" in down.problem
    assert "199 metric values are missing there" in down.problem
    server.up = True
    time.sleep(0.25)
    remote.log([{"step": 200, "loss": 0.0}])
    assert [s for s, _ in history(remote, "loss")] == list(range(201))
    up = remote.result()
    assert (up.waiting, up.dropped) == (0, 0)
    assert up.problem is not None
    assert up.problem.endswith("all metric values arrived later")


def test_no_second_attempt_before_the_pause_is_over(server: Server, remote: MlflowTracker) -> None:
    remote._retry_after_s = 30.0
    server.status = 500
    server.requests.clear()
    for step in range(20):
        remote.log([{"step": step, "loss": 1.0}])
    assert len(server.requests) == 1
    assert remote.result().failures == 1
    server.status = None
    remote.finish("FINISHED")  # does not wait for the pause
    assert [s for s, _ in history(remote, "loss")] == list(range(20))


def test_a_silent_server_costs_one_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that never answers, with users' own generous limits in the environment."""
    monkeypatch.setattr("raymem.tracking.mlflow.tracker.CALL_TIMEOUT_S", 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = MlflowTracker(f"http://127.0.0.1:{silent.getsockname()[1]}", "0" * 32)
        start = time.monotonic()
        for step in range(5):
            tracker.log([{"step": step, "loss": 1.0}])
        took = time.monotonic() - start
    assert 0.9 < took < 4
    assert tracker.result().failures == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "120"


def test_half_stored_batch_is_not_doubled(
    server: Server, remote: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stores a batch, but its answer is lost."""
    remote.log([{"step": 0, "loss": 1.0}])
    log_batch = remote._client.log_batch

    def lost(*args: Any, **kwargs: Any) -> None:
        log_batch(*args, **kwargs)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(remote._client, "log_batch", lost)
    remote.log([{"step": 1, "loss": 0.5}])
    assert remote.result().waiting == 1
    monkeypatch.undo()
    time.sleep(0.25)
    remote.log([{"step": 2, "loss": 0.4}])
    assert [s for s, _ in history(remote, "loss")] == [0, 1, 2]


def test_the_buffer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymem.tracking.mlflow.tracker.MAX_WAITING", 10)
    tracker = MlflowTracker("http://127.0.0.1:9", "0" * 32)
    for step in range(25):
        tracker.log([{"step": step, "loss": 1.0}])
    summary = tracker.result()
    assert (summary.waiting, summary.dropped, summary.failures) == (10, 15, 1)
    assert summary.problem is not None
    assert "25 metric values are missing" in summary.problem
    assert tracker._waiting[0].step == 15


def adapter(tmp_path: Path) -> Path:
    (tmp_path / "ad").mkdir()
    (tmp_path / "ad" / "adapter_config.json").write_text("{}")
    return tmp_path / "ad"


def test_finish_in_sqlite(tracker: MlflowTracker, tmp_path: Path) -> None:
    check_finish(tracker, tmp_path)


def test_finish_on_a_server(remote: MlflowTracker, tmp_path: Path) -> None:
    check_finish(remote, tmp_path)


def check_finish(tracker: MlflowTracker, tmp_path: Path) -> None:
    name = "my-model"
    result = tracker.finish("FINISHED", {"adapter": adapter(tmp_path)}, model="adapter")
    assert result.problem is None
    assert result.model_version == f"{name}/1"
    assert result.summary_lines() == [
        f"MLflow run {tracker.run_id} at {tracker.tracking_uri}",
        "registered as my-model/1",
    ]
    client = connect(tracker.tracking_uri)
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(tracker.run_id, "adapter")] == ["adapter/adapter_config.json"]
    version = client.get_model_version_by_alias(name, "champion")
    assert version.source == f"runs:/{tracker.run_id}/adapter"
    assert version.tags == {"raymem.base_model": "org/base", "raymem.base_revision": "abc123"}
    # finishing the same run once more moves the alias, and makes no second version
    tracker._alias = "next"
    assert tracker.finish("FINISHED", {"adapter": tmp_path / "ad"}, model="adapter").model_version == f"{name}/1"
    assert client.get_model_version_by_alias(name, "next").version == version.version


def test_what_is_no_model_is_not_registered(tracker: MlflowTracker, tmp_path: Path) -> None:
    result = tracker.finish("FINISHED", {"report": adapter(tmp_path)})
    assert (result.model_version, result.problem) == (None, None)
    assert [a.path for a in connect(tracker.tracking_uri).list_artifacts(tracker.run_id, "report")]


def test_finish_failures_are_counted(tracker: MlflowTracker, tmp_path: Path) -> None:
    result = tracker.finish("FAILED", {"adapter": tmp_path / "absent"}, model="adapter")
    assert result.failures == 1
    assert result.model_version is None
    assert result.problem is not None
    assert "absent" in result.problem
    assert "adapter and the registration did not arrive" in result.problem
    assert connect(tracker.tracking_uri).get_run(tracker.run_id).info.status == "FAILED"


def test_finish_with_the_server_gone_is_quick(server: Server, remote: MlflowTracker, tmp_path: Path) -> None:
    server.up = False
    start = time.monotonic()
    result = remote.finish("FINISHED", {"adapter": adapter(tmp_path)}, model="adapter")
    assert time.monotonic() - start < 3
    assert result.failures == 1


def test_a_file_is_looked_at_with_a_command_and_a_server_is_not(tracker: MlflowTracker, remote: MlflowTracker) -> None:
    assert tracker.result().hint == f"look at the curves: mlflow ui --backend-store-uri {tracker.tracking_uri}"
    assert remote.result().hint is None


def test_a_tracker_that_records_nothing() -> None:
    tracker = NullTracker()
    tracker.log([{"step": 1, "loss": 1.0}])
    result = tracker.finish("FINISHED", {"adapter": "/none"}, model="adapter")
    assert (result.problem, result.hint, result.run_id, result.summary_lines()) == (None, None, None, [])

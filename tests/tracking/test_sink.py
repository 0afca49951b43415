"""MlflowSink against mlflow's own stores: sqlite, and its REST application that is stopped and started."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.tracking import MlflowSink, NullSink, sink_from, start_tracking
from raymem.tracking.client import connect
from tests.helpers.tracking import Server, recipe


def history(sink: MlflowSink, key: str) -> list[tuple[int, float]]:
    """What the server holds, in order of steps."""
    found = connect(sink.tracking_uri).get_metric_history(sink.run_id, key)
    return sorted((m.step, m.value) for m in found)


@pytest.fixture
def sink(storage: str) -> MlflowSink:
    made = start_tracking(recipe(), storage_path=storage, resume=False)
    assert isinstance(made, MlflowSink)
    return made


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Iterator[MlflowSink]:
    started = start_tracking(recipe(uri=server.uri), storage_path=str(tmp_path), resume=False)
    assert isinstance(started, MlflowSink) and started.run_id is not None
    yield MlflowSink(started.tracking_uri, started.run_id, retry_after_s=0.2)
    server.status = None
    server.up = True


def test_rows_become_metrics(sink: MlflowSink) -> None:
    sink.log_history([{"step": 0, "loss": 2.5, "lr": 1e-3, "note": "text", "flag": True, "nothing": None}])
    sink.log_history([{"step": 1, "loss": 2, "eval_loss": float("nan")}])
    assert history(sink, "loss") == [(0, 2.5), (1, 2.0)]
    assert set(connect(sink.tracking_uri).get_run(sink.run_id).data.metrics) == {"loss", "lr", "eval_loss"}
    summary = sink.summary()
    assert (summary.logged, summary.failures, summary.problem) == (4, 0, None)


def test_replayed_steps_are_not_logged_again(sink: MlflowSink) -> None:
    rows = [{"step": s, "loss": 1.0 / (s + 1), **({"eval_loss": 1.0} if s == 2 else {})} for s in range(5)]
    sink.log_history(rows[:4])
    sink.log_history(rows[2:])
    again = sink_from(sink.spec())  # the controller after its restart
    again.log_history(rows)
    again.log_history([{"step": 5, "loss": 0.1}])
    assert [s for s, _ in history(sink, "loss")] == [0, 1, 2, 3, 4, 5]
    assert [s for s, _ in history(sink, "eval_loss")] == [2]
    # one metric that is behind does not hold another back
    again.log_history([{"step": 4, "loss": 9.0, "eval_loss": 0.5}])
    assert [s for s, _ in history(sink, "eval_loss")] == [2, 4]


def test_sink_is_plain_data(sink: MlflowSink) -> None:
    sink.log_history([{"step": 0, "loss": 1.0}])
    back = pickle.loads(pickle.dumps(sink))
    back.log_history([{"step": 1, "loss": 0.5}])
    assert [s for s, _ in history(sink, "loss")] == [0, 1]
    assert sink_from(None).run_id is None and isinstance(sink_from(None), NullSink)


def test_one_request_per_call_and_large_batches(server: Server, remote: MlflowSink) -> None:
    remote.log_history([{"step": 0, "loss": 1.0}])
    server.requests.clear()
    remote.log_history([{"step": s, "loss": 1.0, "lr": 2.0, "grad_norm": 3.0} for s in range(1, 4)])
    assert server.requests == ["/api/2.0/mlflow/runs/log-batch"]
    server.requests.clear()
    remote.log_history([{"step": s, "loss": 1.0} for s in range(4, 2204)])
    assert server.requests == ["/api/2.0/mlflow/runs/log-batch"] * 3
    assert remote.summary().logged == 1 + 9 + 2200


def test_outage_is_survived_and_mended(server: Server, remote: MlflowSink) -> None:
    remote.log_history([{"step": 0, "loss": 1.0}])
    server.up = False
    start = time.monotonic()
    for step in range(1, 200):
        remote.log_history([{"step": step, "loss": 1.0 / step}])
    assert time.monotonic() - start < 5
    down = remote.summary()
    assert down.waiting == 199
    assert 1 <= down.failures <= 1 + (time.monotonic() - start) / 0.2
    assert down.problem is not None
    assert f"tracking at {server.uri} failed" in down.problem
    assert "199 metric values are missing there" in down.problem
    server.up = True
    time.sleep(0.25)
    remote.log_history([{"step": 200, "loss": 0.0}])
    assert [s for s, _ in history(remote, "loss")] == list(range(201))
    up = remote.summary()
    assert (up.waiting, up.dropped) == (0, 0)
    assert up.problem is not None
    assert up.problem.endswith("all metric values arrived later")


def test_no_second_attempt_before_the_pause_is_over(server: Server, remote: MlflowSink) -> None:
    assert remote.run_id is not None
    remote = MlflowSink(remote.tracking_uri, remote.run_id, retry_after_s=30.0)
    server.status = 500
    server.requests.clear()
    for step in range(20):
        remote.log_history([{"step": step, "loss": 1.0}])
    assert len(server.requests) == 1
    assert remote.summary().failures == 1
    server.status = None
    remote.finish("FINISHED")  # does not wait for the pause
    assert [s for s, _ in history(remote, "loss")] == list(range(20))


def test_a_silent_server_costs_one_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that never answers, with users' own generous limits in the environment."""
    monkeypatch.setattr("raymem.tracking.sink.CALL_TIMEOUT_S", 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sink = MlflowSink(f"http://127.0.0.1:{silent.getsockname()[1]}", "0" * 32)
        start = time.monotonic()
        for step in range(5):
            sink.log_history([{"step": step, "loss": 1.0}])
        took = time.monotonic() - start
    assert 0.9 < took < 4
    assert sink.summary().failures == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "120"


def test_half_stored_batch_is_not_doubled(server: Server, remote: MlflowSink, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stores a batch, but its answer is lost."""
    remote.log_history([{"step": 0, "loss": 1.0}])
    log_batch = remote._client.log_batch

    def lost(*args: Any, **kwargs: Any) -> None:
        log_batch(*args, **kwargs)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(remote._client, "log_batch", lost)
    remote.log_history([{"step": 1, "loss": 0.5}])
    assert remote.summary().waiting == 1
    monkeypatch.undo()
    time.sleep(0.25)
    remote.log_history([{"step": 2, "loss": 0.4}])
    assert [s for s, _ in history(remote, "loss")] == [0, 1, 2]


def test_the_buffer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymem.tracking.sink.MAX_WAITING", 10)
    sink = MlflowSink("http://127.0.0.1:9", "0" * 32)
    for step in range(25):
        sink.log_history([{"step": step, "loss": 1.0}])
    summary = sink.summary()
    assert (summary.waiting, summary.dropped, summary.failures) == (10, 15, 1)
    assert summary.problem is not None
    assert "25 metric values are missing" in summary.problem
    assert sink._waiting[0].step == 15


def adapter(tmp_path: Path) -> Path:
    (tmp_path / "ad").mkdir()
    (tmp_path / "ad" / "adapter_config.json").write_text("{}")
    return tmp_path / "ad"


def test_finish_in_sqlite(sink: MlflowSink, tmp_path: Path) -> None:
    check_finish(sink, tmp_path)


def test_finish_on_a_server(remote: MlflowSink, tmp_path: Path) -> None:
    check_finish(remote, tmp_path)


def check_finish(sink: MlflowSink, tmp_path: Path) -> None:
    name = "my-model"
    summary = sink.finish(
        "FINISHED", {"adapter": adapter(tmp_path)}, register_as=name, alias="champion", model_tags={"method": "lora"}
    )
    assert summary.problem is None
    assert summary.model_version == f"{name}/1"
    client = connect(sink.tracking_uri)
    assert client.get_run(sink.run_id).info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(sink.run_id, "adapter")] == ["adapter/adapter_config.json"]
    version = client.get_model_version_by_alias(name, "champion")
    assert version.source == f"runs:/{sink.run_id}/adapter"
    assert version.tags == {"raymem.base_model": "org/base", "raymem.base_revision": "abc123", "method": "lora"}
    # finishing the same run once more moves the tags, and makes no second version
    again = sink.finish("FINISHED", {"adapter": tmp_path / "ad"}, register_as=name, alias="next", model_tags={"x": "y"})
    assert again.model_version == f"{name}/1"
    assert client.get_model_version_by_alias(name, "next").tags["x"] == "y"


def test_finish_failures_are_counted(sink: MlflowSink, tmp_path: Path) -> None:
    summary = sink.finish("FAILED", {"adapter": tmp_path / "absent"}, register_as="m", alias="champion")
    assert summary.failures == 1
    assert summary.model_version is None
    assert summary.problem is not None
    assert "absent" in summary.problem
    assert connect(sink.tracking_uri).get_run(sink.run_id).info.status == "FAILED"


def test_finish_with_the_server_gone_is_quick(server: Server, remote: MlflowSink, tmp_path: Path) -> None:
    server.up = False
    start = time.monotonic()
    summary = remote.finish("FINISHED", {"adapter": adapter(tmp_path)}, register_as="m", alias="champion")
    assert time.monotonic() - start < 3
    assert summary.failures == 1


def test_null_sink() -> None:
    sink = NullSink()
    sink.log_history([{"step": 1, "loss": 1.0}])
    assert sink.finish("FINISHED", {"adapter": "/none"}).problem is None
    assert sink.summary().logged == 0

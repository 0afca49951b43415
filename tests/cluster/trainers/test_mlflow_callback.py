"""The MLflow callback for anybody's trainer: its hooks as Ray Train's controller calls them, and whole trainers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
from ray.train.v2._internal.execution.controller.state import AbortedState, RestartingState
from ray.train.v2.api.exceptions import WorkerGroupError

import raymem
from raymem.cluster.trainers.mlflow_callback import MLflowCallback
from raymem.errors import TrackingError
from raymem.tracking.mlflow.client import connect
from tests.helpers.ray_processes import RayHead
from tests.helpers.tracking import Server


@pytest.fixture(autouse=True)
def _up_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("raymem.tracking.mlflow.late_run.RETRY_AFTER_S", 0.0)
    yield
    server.up = True


@dataclass
class Controller:
    """Calls the hooks of a callback as Ray Train's controller does."""

    callback: MLflowCallback
    storage: Path
    config: Any = None

    def __post_init__(self) -> None:
        config = ray.train.RunConfig(name="mine", storage_path=str(self.storage), callbacks=[self.callback])
        scaling = ray.train.ScalingConfig(num_workers=2)
        (self.storage / "mine").mkdir(parents=True, exist_ok=True)
        self.callback.after_controller_start(
            SimpleNamespace(run_config=config, scaling_config=scaling, train_loop_config=self.config)
        )

    def report(self, *metrics: dict[str, Any], checkpoint: str | None = None) -> None:
        path = None if checkpoint is None else SimpleNamespace(path=checkpoint)
        self.callback.after_report(SimpleNamespace(checkpoint=path), list(metrics))

    def finish(self, error: Exception | None = None) -> None:
        self.callback.after_controller_finish(SimpleNamespace(error=error))


def runs(server: Server, experiment: str = "mine") -> list[Any]:
    client = connect(server.uri)
    found: list[Any] = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return found


def history(server: Server, run: Any, key: str = "loss") -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in connect(server.uri).get_metric_history(run.info.run_id, key)]


def test_a_run_has_metrics_params_checkpoint_and_status(server: Server, tmp_path: Path) -> None:
    config = {"lr": 0.1, "max_tokens": 7, "hf_token": "canary", "data": {"uri": "s3://a:canary@b/c"}}
    controller = Controller(MLflowCallback("complete", server.uri, tags={"team": "a"}), tmp_path, config)
    metrics = {"step": 1, "loss": 2.0, "eval": {"loss": 3.0}, "top@5": np.float32(0.5), "note": "text", "flag": True}
    controller.report(metrics, {"step": 1, "loss": 9.0})
    controller.report({"step": 2, "loss": 1.0}, {"step": 2, "loss": 9.0}, checkpoint="/there/checkpoint_2")
    error = WorkerGroupError("training failed", {1: RuntimeError("boom")})
    controller.callback.after_controller_state_update(None, RestartingState(training_failed_error=error))
    controller.finish()
    (run,) = runs(server, "complete")
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert history(server, run) == [(1, 2.0), (2, 1.0)] and history(server, run, "eval/loss") == [(1, 3.0)]
    assert run.data.metrics == {"loss": 1.0, "eval/loss": 3.0, "top_5": 0.5}
    assert (run.data.params["config.lr"], run.data.params["config.max_tokens"]) == ("0.1", "7")
    assert run.data.params["scaling.num_workers"] == "2"
    assert "canary" not in json.dumps([run.data.params, run.data.tags])
    tags = run.data.tags
    assert (tags["ray.checkpoint"], tags["ray.restarts"], tags["team"]) == ("/there/checkpoint_2", "1", "a")
    assert tags["ray.last_failure"] == "worker 1 failed: boom"


def test_an_interrupted_run_ends_as_killed(server: Server, tmp_path: Path) -> None:
    controller = Controller(MLflowCallback("interrupted", server.uri), tmp_path)
    controller.callback.before_controller_abort()
    controller.callback.after_controller_state_update(None, AbortedState())
    (run,) = runs(server, "interrupted")
    assert run.info.status == "KILLED"


def test_metrics_of_all_ranks_on_request(server: Server, tmp_path: Path) -> None:
    controller = Controller(MLflowCallback("ranks", server.uri, ranks="all"), tmp_path)
    controller.report({"step": 1, "loss": 2.0}, {"step": 1, "loss": 9.0})
    (run,) = runs(server, "ranks")
    assert run.data.metrics == {"loss": 2.0, "loss/rank_1": 9.0}
    with pytest.raises(ValueError, match="ranks='every' is neither"):
        MLflowCallback("ranks", server.uri, ranks="every")  # type: ignore[arg-type]


def test_an_outage_and_a_killed_controller_cost_no_step_and_double_none(server: Server, tmp_path: Path) -> None:
    """The controller that is killed takes with it what only its memory holds."""
    callback = MLflowCallback("mine", server.uri)
    pickled = pickle.dumps(callback)
    first = Controller(callback, tmp_path)
    first.report({"step": 1, "loss": 1.0})
    server.up = False
    for step in (2, 3, 4):
        first.report({"step": step, "loss": float(step)})
    first.finish(RuntimeError("the server stays away"))

    second = Controller(pickle.loads(pickled), tmp_path)
    second.report({"step": 4, "loss": 4.0})
    second.report({"step": 5, "loss": 5.0})
    assert sorted(path.name for path in (tmp_path / "mine" / "mlflow").glob("waiting-*"))
    server.up = True
    second.report({"step": 6, "loss": 6.0})
    (run,) = runs(server)
    assert history(server, run) == [(step, float(step)) for step in range(1, 7)]
    second.finish()
    (run,) = runs(server)
    assert run.info.status == "FINISHED"
    assert [path.name for path in (tmp_path / "mine" / "mlflow").iterdir()] == ["state.json"]


def test_what_a_checkpoint_was_reported_with_is_logged_by_the_next_controller(server: Server, tmp_path: Path) -> None:
    """A controller may be killed when Ray has committed a checkpoint, and before the callback is called."""
    result = {"checkpoint_dir_name": "checkpoint_2", "metrics": {"step": 2, "loss": 0.5}}
    (tmp_path / "mine").mkdir()
    snapshot = json.dumps({"checkpoint_results": [result], "latest_checkpoint_result": result})
    (tmp_path / "mine" / "checkpoint_manager_snapshot.json").write_text(snapshot)
    Controller(MLflowCallback("committed", server.uri), tmp_path).report({"step": 3, "loss": 0.25})
    (run,) = runs(server, "committed")
    assert history(server, run) == [(2, 0.5), (3, 0.25)]


def test_reports_without_a_step_are_counted_from_the_last_checkpoint(server: Server, tmp_path: Path) -> None:
    first = Controller(MLflowCallback("counted", server.uri), tmp_path)
    for loss in (1.0, 2.0):
        first.report({"loss": loss}, checkpoint="/c" if loss == 1.0 else None)
    first.callback.before_worker_group_start(None)  # a worker has died
    for loss in (2.0, 3.0):
        first.report({"loss": loss}, checkpoint="/c" if loss == 3.0 else None)
    second = Controller(MLflowCallback("counted", server.uri), tmp_path)
    second.report({"loss": 4.0})
    (run,) = runs(server, "counted")
    assert history(server, run) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_raymems_own_reports_are_rows(server: Server, tmp_path: Path) -> None:
    controller = Controller(MLflowCallback("rows", server.uri), tmp_path)
    controller.report({"rows": [{"step": 1.0, "loss": 2.0}, {"step": 2.0, "loss": 1.0}], "replayed": 0}, {"rows": []})
    (run,) = runs(server, "rows")
    assert history(server, run) == [(1, 2.0), (2, 1.0)]


def test_a_storage_that_fails_ends_no_training(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mlflow").write_text("a file where the directory should be")
    controller = Controller(MLflowCallback("unwritable", server.uri), tmp_path)
    controller.report({"step": 1, "loss": 2.0})
    controller.finish()
    assert "its storage fails, training goes on" in caplog.text


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (None, "tracking_uri is not given, and MLFLOW_TRACKING_URI is not set"),
        ("sqlite:///here.db", "tracking_uri: sqlite:///here.db is relative"),
        ("http://ann:secret@host", "tracking_uri: a password before the @"),
        ("http://127.0.0.1:9", "start it, correct tracking_uri, or leave the callback out"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_where_it_is_given(
    uri: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError) as error:
        MLflowCallback("mine", uri)
    assert words in str(error.value) and "secret" not in str(error.value)


LOOP = """
import json, os, sys, tempfile, time
import ray, ray.train
from ray.train.torch import TorchTrainer
from raymem.ray import MLflowCallback

def loop(config):
    checkpoint, first = ray.train.get_checkpoint(), 1
    if checkpoint:
        with checkpoint.as_directory() as directory:
            first = json.load(open(os.path.join(directory, "step.json"))) + 1
    for step in range(first, config["steps"] + 1):
        metrics = {"step": step, "loss": 1.0 / step}
        if step % 3 or ray.train.get_context().get_world_rank():
            ray.train.report(metrics)
        else:
            with tempfile.TemporaryDirectory() as directory:
                json.dump(step, open(os.path.join(directory, "step.json"), "w"))
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint(directory))

storage, uri, steps = sys.argv[1:]
ray.init(log_to_driver=False)
TorchTrainer(
    loop, train_loop_config={"steps": int(steps)},
    scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
    run_config=ray.train.RunConfig(name="mine", storage_path=storage, callbacks=[MLflowCallback("plain", uri)]),
).fit()
"""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_plain_trainer_whose_driver_is_killed_during_an_outage(
    server: Server, ray_head: RayHead, tmp_path: Path
) -> None:
    (tmp_path / "driver.py").write_text(LOOP)
    environment = {
        **os.environ, **ray_head.client_env(), "RAY_ADDRESS": ray_head.gcs,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "PYTHONPATH": str(Path(raymem.__file__).parents[1]),
    }  # fmt: skip
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path), server.uri]
    folder = tmp_path / "mine" / "mlflow"
    driver = subprocess.Popen([*command, "100000"], env=environment)
    try:
        wait_for(lambda: {step for run in known(server) for step, _ in history(server, run)} >= {1, 2, 3, 4})
        server.up = False
        wait_for(lambda: len(list(folder.glob("waiting-*.json"))) >= 4)
    finally:
        driver.kill()
        driver.wait()
    waiting = max(folder.glob("waiting-*.json")).read_text()
    server.up = True
    steps = json.loads(waiting)[-1][1]["step"] + 5
    subprocess.run([*command, str(int(steps))], env=environment, check=True)
    (run,) = known(server)
    assert run.info.status == "FINISHED"
    assert history(server, run) == [(step, 1.0 / step) for step in range(1, int(steps) + 1)]
    assert run.data.params["config.steps"] == "100000"
    assert run.data.tags["ray.checkpoint"].startswith(str(tmp_path / "mine" / "checkpoint_"))


def known(server: Server) -> list[Any]:
    """The runs of the plain trainer's experiment, if there is one."""
    return runs(server, "plain") if connect(server.uri).get_experiment_by_name("plain") else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)

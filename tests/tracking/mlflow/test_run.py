"""The start of a tracked run: what is written, what is reused, and what is refused before training."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymem.errors import TrackingError
from raymem.tracking import NullTracker, RunStart, check_tracking, start_tracking
from raymem.tracking.mlflow.client import connect
from raymem.tracking.mlflow.run import accepted_name, flatten
from tests.helpers.tracking import Server, recipe, start


def test_a_new_run_is_complete(storage: str) -> None:
    tracker = start(storage, device="NVIDIA H100", tags={"team": "a"}, big={f"k{i}": i for i in range(250)})
    client = connect(tracker.tracking_uri)
    run = client.get_run(tracker.run_id)
    assert run.info.run_name == "run1"
    assert run.info.status == "RUNNING"
    assert run.data.params["train.steps"] == "30"
    assert run.data.params["model.config"] == "null"
    assert run.data.params["big.k249"] == "249"
    assert run.data.tags["raymem.device"] == "NVIDIA H100"
    assert run.data.tags["team"] == "a"
    assert {"raymem.torch", "raymem.ray", "raymem.transformers", "raymem.peft", "raymem.version"} <= set(run.data.tags)
    here = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert run.data.tags.get("mlflow.source.git.commit", "") == here
    text = Path(storage, "mlartifacts", str(tracker.run_id), "artifacts", "recipe.yaml").read_text()
    assert yaml.safe_load(text)["train"] == {"steps": 30}


def test_the_system_tags_say_who_started_what_and_where_it_is_shown(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", str(checkout), *command], check=True)
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    tracker = start(storage, source=checkout / "my.yaml")
    client = connect(tracker.tracking_uri)
    run = client.get_run(tracker.run_id)
    expected = {
        "mlflow.source.name": "my.yaml",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": head.stdout.strip(),
        "mlflow.user": "ann",
        "mlflow.note.content": "raymem, fine-tuning of org/base",
    }
    assert {name: run.data.tags.get(name) for name in expected} == expected
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    client.set_experiment_tag(experiment.experiment_id, "mlflow.experimentKind", "mine")
    client.set_tag(tracker.run_id, "mlflow.note.content", "my own words")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    again = start(storage, resume=True, source=tmp_path / "my.yaml")
    tags = client.get_run(again.run_id).data.tags
    assert again.run_id == tracker.run_id
    assert (tags["mlflow.note.content"], tags["mlflow.source.type"]) == ("my own words", "JOB")
    assert client.get_experiment(experiment.experiment_id).tags["mlflow.experimentKind"] == "mine"


def test_bytes_are_logged_in_gib_too(storage: str) -> None:
    tracker = start(storage)
    tracker.log([{"step": 3, "peak_bytes": 3 << 29}])
    metrics = connect(tracker.tracking_uri).get_run(tracker.run_id).data.metrics
    assert metrics == {"peak_bytes": 3 << 29, "peak_gib": 1.5}


def test_no_commit_outside_of_a_checkout(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = start(storage)
    assert "mlflow.source.git.commit" not in connect(tracker.tracking_uri).get_run(tracker.run_id).data.tags


@pytest.mark.parametrize("name", ["a%20b", "a?b=c", "a#b", "a b&c;d+e@f", "50%", "\u00e9"])
def test_a_path_is_a_path_whatever_it_holds(name: str, tmp_path: Path, template_db: Path) -> None:
    root = tmp_path / "root"
    storage = root / name
    storage.mkdir(parents=True)
    shutil.copy(template_db, storage / "mlflow.db")
    before = sqlite_runs(storage)
    sink = start(str(storage))
    sink.log([{"step": 1, "loss": 1.0}])
    (storage / "adapter").mkdir()
    (storage / "adapter" / "note.txt").write_text("kept")
    assert sink.finish("FINISHED", {"adapter": storage / "adapter"}).problem is None
    assert sqlite_runs(storage) == before + 1
    assert (storage / "mlartifacts" / str(sink.run_id) / "artifacts" / "adapter" / "note.txt").is_file()
    assert [path.name for path in root.iterdir()] == [name]
    assert start(str(storage), resume=True).run_id == sink.run_id
    assert check_tracking(recipe()["tracking"], str(storage)) == f"{storage / 'mlflow.db'} exists"


def sqlite_runs(storage: Path) -> int:
    with sqlite3.connect(storage / "mlflow.db") as database:
        return int(database.execute("select count(*) from runs").fetchone()[0])


def test_resume_continues_the_same_run(storage: str) -> None:
    first = start(storage)
    first.log([{"step": 1, "loss": 1.0}])
    first.finish("FAILED")
    second = start(storage, resume=True, train={"steps": 60, "extra": 1})
    assert second.run_id == first.run_id
    second.log([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    client = connect(second.tracking_uri)
    run = client.get_run(second.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["train.steps"] == "30"  # immutable
    assert run.data.params["train.extra"] == "1"
    assert [m.step for m in client.get_metric_history(second.run_id, "loss")] == [1, 2]


def test_what_is_not_resumed(storage: str) -> None:
    first = start(storage)
    assert start(storage).run_id != first.run_id  # begun afresh
    assert start(storage, resume=True, name="other").run_id != first.run_id
    newest = start(storage)
    assert start(storage, resume=True).run_id == newest.run_id


def test_child_runs(storage: str) -> None:
    parent = start(storage)
    child = start(storage, name="trial_0001", parent_run_id=parent.run_id)
    run = connect(child.tracking_uri).get_run(child.run_id)
    assert run.info.run_name == "trial_0001"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert start(storage, resume=True, name="trial_0001").run_id == child.run_id


def test_flatten() -> None:
    value = {"a": {"b": [1, "x"], "c": True, "d": {}}, "e é!": None, "f": "y" * 7000, "g": "text"}
    assert dict(flatten(value)) == {
        "a.b": '[1, "x"]',
        "a.c": "true",
        "a.d": "{}",
        "e __": "null",
        "f": "y" * 6000,
        "g": "text",
    }
    assert len(next(iter(flatten({"k" * 300: 1})))[0]) == 250


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("eval/loss", "eval/loss"), ("top@5", "top_5"), ("/a//b/", "a/b"), ("a/../b", "a/__/b"), ("/", "_")],
)
def test_names_are_those_that_mlflow_takes(name: str, accepted: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert accepted_name(name) == accepted
    _validate_metric_name(accepted)


def test_tracking_none(tmp_path: Path) -> None:
    assert isinstance(start_tracking(RunStart({"tracking": {"kind": "none"}}, "/x", resume=False)), NullTracker)
    assert check_tracking({"kind": "none"}, "/x") == "not wanted by this recipe"


@pytest.mark.parametrize("alias", ["latest", "Latest", "v3"])
def test_reserved_alias_is_refused_at_start(storage: str, alias: str) -> None:
    tracking = recipe(register_as="m", alias=alias)["tracking"]
    with pytest.raises(TrackingError, match=rf"'{alias}' is reserved by MLflow .* for example candidate"):
        start(storage, tracking=tracking)
    with pytest.raises(TrackingError, match="reserved"):
        check_tracking(tracking, storage)


def test_odd_alias_is_refused(storage: str) -> None:
    with pytest.raises(TrackingError, match=r"tracking.alias: 'a b' may hold letters, digits, _ and - only"):
        start(storage, tracking=recipe(register_as="m", alias="a b")["tracking"])


def test_unreachable_server(tmp_path: Path) -> None:
    tracking = recipe(uri="http://127.0.0.1:9")["tracking"]
    words = r"tracking at http://127.0.0.1:9 cannot be used: .*; start it, correct tracking.uri, or set tracking: none"
    with pytest.raises(TrackingError, match=words):
        start(str(tmp_path), tracking=tracking)
    with pytest.raises(TrackingError, match=words):
        check_tracking(tracking, str(tmp_path))


@pytest.mark.parametrize("status", [401, 403])
def test_refusing_server(server: Server, tmp_path: Path, status: int) -> None:
    tracking = recipe(uri=server.uri)["tracking"]
    assert check_tracking(tracking, str(tmp_path)) == f"{server.uri} answers"
    server.status = status
    try:
        with pytest.raises(TrackingError, match=r"; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
            start(str(tmp_path), tracking=tracking)
        with pytest.raises(TrackingError, match=r"; set MLFLOW_TRACKING_USERNAME"):
            check_tracking(tracking, str(tmp_path))
    finally:
        server.status = None


def test_deleted_experiment(storage: str) -> None:
    client = connect(start(storage).tracking_uri)
    client.delete_experiment(client.get_experiment_by_name("exp").experiment_id)
    with pytest.raises(TrackingError, match=r"'exp' was deleted at .*; restore it \(mlflow experiments restore"):
        start(storage)


def test_copied_storage(storage: str, tmp_path: Path) -> None:
    start(storage)
    Path(storage).rename(tmp_path / "moved")
    with pytest.raises(TrackingError, match=rf"keeps its artifacts in {storage}/mlartifacts, outside of storage.path"):
        start(str(tmp_path / "moved"))


def test_unwritable_artifacts(storage: str) -> None:
    Path(storage, "mlartifacts").write_text("a file in the way")
    with pytest.raises(TrackingError, match=r"; correct tracking.uri or the rights on its artifacts"):
        start(storage)


def test_damaged_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    with pytest.raises(TrackingError, match=r"tracking at sqlite:///.*mlflow.db cannot be used: .*not a database"):
        start(str(tmp_path))


def test_check_says_what_sqlite_will_do(storage: str, tmp_path: Path) -> None:
    tracking = recipe()["tracking"]
    assert check_tracking(tracking, storage) == f"{storage}/mlflow.db exists"
    assert check_tracking(tracking, str(tmp_path / "new")) == f"{tmp_path}/new/mlflow.db will be created"
    assert not (tmp_path / "new").exists()


def test_first_use_of_a_fresh_storage(first_use: dict[str, Any]) -> None:
    """Tables are made once although two drivers started together; nothing is printed, or left in their directory."""
    assert first_use["outputs"] == ["", ""]
    assert first_use["codes"] == [0, 0]
    assert list(first_use["cwd"].iterdir()) == []
    client = connect(f"sqlite:///{first_use['db']}")
    experiment = client.get_experiment_by_name("first")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def test_a_trial_says_what_its_sweep_has_chosen(storage: str) -> None:
    parent = start(storage, name="sweep")
    point = {"adapter.rank": 4, "optimizer": {"kind": "adamw"}}
    child = start(storage, name="trial", parent_run_id=parent.run_id, point=point)
    run = connect(child.tracking_uri).get_run(child.run_id)
    chosen = {name: value for name, value in run.data.tags.items() if name.startswith("raymem.point.")}
    assert chosen == {"raymem.point.adapter.rank": "4", "raymem.point.optimizer.kind": "adamw"}
    assert run.data.tags["mlflow.note.content"] == "adapter.rank: 4; optimizer.kind: adamw"


def test_stages_of_a_pipeline_are_children_of_one_run_that_ends_as_the_last_does(storage: str) -> None:
    aligned = start(storage, name="aligned", group="mine")
    aligned.finish("FINISHED")
    trained = start(storage, name="mine", group="mine")
    client = connect(trained.tracking_uri)
    parents = {client.get_run(one.run_id).data.tags["mlflow.parentRunId"] for one in (aligned, trained)}
    (parent,) = parents
    assert client.get_run(parent).info.run_name == "mine" and parent != trained.run_id
    assert client.get_run(parent).info.status == "RUNNING"
    trained.finish("FAILED")
    assert client.get_run(parent).info.status == "FAILED"


def test_system_metrics_come_with_the_others_on_request(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = start(storage, tracking=recipe(system_metrics=True)["tracking"])
    tracker.log([{"step": 1, "loss": 1.0}])
    tracker.log([{"step": 2, "loss": 1.0}])
    monkeypatch.setattr("raymem.tracking.mlflow.system.SAMPLE_EVERY_S", 0.0)
    tracker._system._next = 0.0  # type: ignore[union-attr]
    tracker.log([{"step": 3, "loss": 1.0}])
    client = connect(tracker.tracking_uri)
    points = client.get_metric_history(tracker.run_id, "system/cpu_utilization_percentage")
    assert [point.step for point in points] == [1, 3]
    assert client.get_run(tracker.run_id).data.metrics["system/system_memory_usage_megabytes"] > 0
    assert not [name for name in client.get_run(start(storage).run_id).data.metrics if name.startswith("system/")]

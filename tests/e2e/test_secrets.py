"""Secrets stay in the environment: canary values in it are in nothing that commands write, print or send."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest

from raymem.cli.main import run_app
from raymem.cluster.jobs.submit import submit
from raymem.k8s.render import render
from tests.helpers.jobs import jobs_sent
from tests.helpers.manifests import needs_kubectl
from tests.helpers.run_files import write_recipe

CANARY = "canary-3f9c1d"
NAMES = (
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
    "RAY_AUTH_TOKEN",
    "MY_DATABASE_PASSWORD",
)


@pytest.fixture(autouse=True)
def _canaries(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(NAMES):
        monkeypatch.setenv(name, f"{CANARY}-{number}")
    caplog.set_level(logging.DEBUG)


def holding(folder: Path) -> list[str]:
    """The files below a folder, databases too, that hold a canary."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_the_search_finds_one(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.db").write_bytes(b"\0" + CANARY.encode() + b"-3\0")
    assert holding(tmp_path) == [str(tmp_path / "below" / "x.db")]


def test_no_command_writes_or_says_one(
    tmp_path: Path,
    llama: Path,
    examples: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A tracked run with its evaluation, commands that fail, and all that they leave: logs, manifests, MLflow."""
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path, llama, examples, tracking={"kind": "mlflow"})
    assert run_app("train", recipe) == 0
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    assert run_app("evaluate", recipe) == 0
    for wrong in ("adapter.rank=none", "train.precision=fp7", "data.train=/nowhere.jsonl", "adapter.targets=nothing"):
        assert run_app("train", recipe, "-s", "name=wrong", "-s", wrong) == 1
    shown = capfd.readouterr()
    assert shown.err.count("error: ") >= 4
    assert holding(tmp_path) == []
    assert CANARY not in shown.out + shown.err + caplog.text


def test_a_job_is_sent_without_one(
    tmp_path: Path, llama: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = jobs_sent(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "work").mkdir()
    recipe = write_recipe(tmp_path / "work" / "run.yaml", tmp_path, Path("/shared/model"), Path("/shared/data"))
    submit(recipe, working_dir=tmp_path / "work", follow=False, env_passthrough=["OMP_NUM_THREADS"])
    assert sent[0]["runtime_env"]["env_vars"] == {"OMP_NUM_THREADS": "3"}
    assert CANARY not in repr(sent)


@needs_kubectl
def test_manifests_hold_none(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run.yaml", Path("/shared"), Path("/shared/model"), Path("/shared/data"))
    made = render(recipe, overlay="gpu", worker_memory="10Gi")
    assert "RayJob" in made.manifests
    assert CANARY not in repr(made)

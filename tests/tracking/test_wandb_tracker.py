"""Weights & Biases without its server: files of its offline mode, and what is refused."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import TrackingError
from raymem.recipe.load import recipe_of
from raymem.tracking import RunStart, Tracker, check_tracking, start_tracking
from raymem.tracking.library import library
from tests.helpers.wandb_files import history_of

OPTIONS = {"kind": "wandb", "project": "p", "entity": None, "mode": "offline", "log_model": True}


def start(storage: Path, *, resume: bool = False, **options: Any) -> Tracker:
    recipe = {"name": "run1", "train": {"steps": 30}, "tracking": {**OPTIONS, **options}}
    return start_tracking(RunStart(recipe, str(storage), resume, tags={"sweep": "s"}))


def rows(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": float(step)} for step in steps]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def wandb() -> Iterator[Any]:
    yield pytest.importorskip("wandb", reason="pip install 'raymem[wandb]'")
    sys.modules["wandb"].teardown()  # its process, which remembers the key


@pytest.mark.usefixtures("wandb")
def test_a_run_that_goes_on_is_the_same_run_and_has_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary" * 8)
    first = start(tmp_path)
    first.log(rows(1, 2))
    first.log([*rows(3), {"step": 3, "eval_loss": 7.0}])
    first.finish("KILLED")
    time.sleep(1.1)  # wandb names a session's files by the second
    second = start(tmp_path, resume=True)
    second.log(rows(1, 2, 3, 4))
    second.log(rows(4, 5))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "x.safetensors").write_bytes(b"x")
    result = second.finish("FINISHED", {"adapter": tmp_path / "adapter"}, model="adapter")
    assert first.run_id == second.run_id == result.run_id
    assert result.problem is None and result.hint is not None and result.hint.startswith("upload it: wandb sync ")
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{first.run_id}/run-{first.run_id}.wandb"))
    history = [row for file in files for row in history_of(file)]
    assert [(row["_step"], row["loss"]) for row in history] == [(s, float(s)) for s in (1, 2, 3, 4, 5)]
    assert history[2]["eval_loss"] == 7.0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    third = start(tmp_path)  # begun anew
    assert third.finish("FINISHED").run_id != first.run_id


@pytest.mark.usefixtures("wandb")
def test_without_a_key_it_is_refused_and_offline_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    online = {**OPTIONS, "mode": None}
    with pytest.raises(TrackingError, match=r"set WANDB_API_KEY or run `wandb login` .*tracking\.mode: offline"):
        start(tmp_path, mode=None)
    with pytest.raises(TrackingError, match="wandb has no key here"):
        check_tracking(online, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check_tracking(online, str(tmp_path)) == "project p, offline"


def test_a_missing_library_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrackingError, match=r"wandb needs wandb, which .*pip install 'raymem\[wandb\]'"):
        start(tmp_path)
    with pytest.raises(TrackingError, match="cannot be imported here"):
        library("wandb", "wandb")


def test_a_key_has_no_place_in_a_recipe() -> None:
    raw = {"name": "r", "model": {"name": "demo"}, "data": {"train": "demo:text"}, "train": {"steps": 1}}
    with pytest.raises(Exception, match=r"tracking\.api_key: unknown key"):
        recipe_of({**raw, "tracking": {"kind": "wandb", "api_key": "x"}})

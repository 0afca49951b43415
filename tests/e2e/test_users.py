"""Several users of one storage: nobody's lock, cache, tracking database or run is in another one's way."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.loram_runs import ALIGN, BASE
from tests.helpers.run_files import write_recipe
from tests.helpers.support import in_processes
from tests.helpers.users import TEAM, User, run_as

ANNA, BERT, CARL = 65001, 65002, 65003


@pytest.fixture
def place(llama: Path, examples: Path) -> Iterator[Path]:
    """A folder that every user may read, with model and data; pytest's own folders are closed to others."""
    if os.geteuid() != 0:
        pytest.skip("only root may act as other users")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        root = Path(folder)
        shutil.copytree(llama, root / "llama")
        shutil.copytree(examples, root / "examples", ignore=shutil.ignore_patterns("cache"))
        for path in (*root.rglob("*"), root):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield root


def storage_of(place: Path, mode: int) -> Path:
    runs = place / "runs"
    runs.mkdir()
    os.chown(runs, -1, TEAM)
    runs.chmod(mode)
    return runs


def recipe_of(place: Path, name: str, **sections: Any) -> str:
    path = write_recipe(place / f"{name}.yaml", place, place / "llama", place / "examples", name=name, **sections)
    path.chmod(0o644)
    return str(path)


def as_user(
    place: Path, uid: int, umask: int, *commands: Sequence[str], groups: tuple[int, ...] = (TEAM,)
) -> list[subprocess.CompletedProcess[str]]:
    user = User(uid, umask, place / f"home-{uid}", groups)
    ((done,),) = [in_processes(run_as, 0, place / f"meet-{uid}", user, [list(command) for command in commands])]
    if done is None:
        pytest.skip("this process may not act as another user here")
    for one in done:
        assert "Traceback" not in one.stderr, one.stderr
    return done


def assert_done(done: Sequence[subprocess.CompletedProcess[str]]) -> None:
    for one in done:
        assert one.returncode == 0, f"{one.args}: {one.stderr}"
        assert "tracking at" not in one.stderr, one.stderr


def test_a_storage_of_a_team(place: Path) -> None:
    runs = storage_of(place, 0o2770)
    first, second = recipe_of(place, "first"), recipe_of(place, "second")
    assert_done(as_user(place, ANNA, 0o077, ["train", first]))
    taken, trained, evaluated = as_user(
        place, BERT, 0o022, ["train", first], ["train", second], ["evaluate", second]
    )  # fmt: skip
    assert_done([trained, evaluated])
    check_modes(runs, 0o2770, ".locks", "cache", "cache/data", "cache/tokenizers")
    assert {path.stat().st_gid for path in runs.rglob("*")} == {TEAM}
    assert taken.returncode == 1
    assert taken.stderr.strip() == (
        f"error: storage: cannot write {runs}/first: permission denied ({runs}/first belongs to uid {ANNA}, mode "
        f"drwx--S---; this user is uid {BERT}); choose another name for this run (name: first)"
    )
    (runs / "cache" / "data").chmod(0o700)
    (stranger,) = as_user(place, CARL, 0o022, ["train", second], groups=())
    (closed,) = as_user(place, BERT, 0o022, ["train", second, "-s", "train.steps=6"])
    assert stranger.returncode == closed.returncode == 1
    assert f"({runs} belongs to root, mode drwxrws---; this user is uid {CARL}); give this user" in stranger.stderr
    assert f"permission denied ({runs}/cache/data belongs to uid {ANNA}, mode drwx------" in closed.stderr


def test_a_storage_of_everybody(place: Path) -> None:
    runs = storage_of(place, 0o1777)
    first, second = recipe_of(place, "first"), recipe_of(place, "second")
    assert_done(as_user(place, ANNA, 0o077, ["train", first]))
    assert_done(as_user(place, BERT, 0o022, ["data", second], ["train", second]))
    assert_done(as_user(place, ANNA, 0o077, ["train", first, "-s", "train.steps=6"]))
    check_modes(runs, 0o1777, ".locks", "cache", "cache/data", "cache/tokenizers")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o2770, 0o1777], ids=["of a team", "of everybody"])
def test_two_users_of_one_tracking_database(place: Path, mode: int) -> None:
    runs = storage_of(place, mode)
    first, second = recipe_of(place, "first", tracking="mlflow"), recipe_of(place, "second", tracking="mlflow")
    assert_done(as_user(place, ANNA, 0o077, ["train", first]))
    assert_done(as_user(place, BERT, 0o022, ["train", second]))
    check_modes(runs, mode, "mlartifacts")
    (runs / "mlflow.db").chmod(0o644)
    (refused,) = as_user(place, BERT, 0o022, ["train", recipe_of(place, "third", tracking="mlflow")])
    assert refused.returncode == 1
    assert f"{runs}/mlflow.db belongs to uid {ANNA}, mode -rw-r--r--" in refused.stderr
    assert "set tracking.uri, or set tracking: none" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", [0o2770, 0o1777], ids=["of a team", "of everybody"])
def test_two_users_of_one_pruned_model(place: Path, mode: int) -> None:
    runs = storage_of(place, mode)
    base = {**BASE, "align": ALIGN}
    first, second = recipe_of(place, "first", base=base), recipe_of(place, "second", base=base)
    assert_done(as_user(place, ANNA, 0o077, ["loram", "run", first]))
    assert_done(as_user(place, BERT, 0o022, ["loram", "run", second]))
    check_modes(runs, mode, "cache/loram")
    assert len(list((runs / "cache" / "loram").iterdir())) == len(list(runs.glob("loram-aligned-*"))) == 1


def check_modes(runs: Path, mode: int, *folders: str) -> None:
    """What is shared has the mode of the storage; what is a user's own is as the umask says."""
    for folder in folders:
        assert stat.S_IMODE((runs / folder).stat().st_mode) == mode, folder
    assert stat.S_IMODE((runs / "first").stat().st_mode) & 0o777 == 0o700
    assert not list(runs.rglob(".making-*"))


@pytest.mark.slow
@pytest.mark.ray
def test_two_users_sweep_side_by_side(place: Path) -> None:
    runs = storage_of(place, 0o2770)
    space = {"adapter.rank": {"type": "choice", "choices": [2, 4]}}
    scaling = {"num_workers": 1, "resources_per_worker": {"CPU": 1}}

    def sweep(user: tuple[int, int, str]) -> list[subprocess.CompletedProcess[str]]:
        uid, umask, name = user
        recipe = recipe_of(place, name, space=space, scaling=scaling)
        return as_user(place, uid, umask, ["sweep", recipe, "--budget", "1GiB", "--samples", "2", "--name", name])

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(sweep, [(ANNA, 0o077, "first"), (BERT, 0o022, "second")]):
            assert_done(done)
    for name in ("first", "second"):
        report = json.loads((runs / name / "report" / "trials.json").read_text())
        statuses = [trial["status"] for trial in report]
        assert len(statuses) == 2 and set(statuses) <= {"finished", "stopped"}, "a trial that lags behind is stopped"

"""Whole sweeps on Ray: a budget, a kill, memory that runs out, and trials with workers of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from raymem.errors import BudgetExceeded, RecipeError
from raymem.planner import Planner, process
from raymem.recipe.schema import Recipe
from raymem.recipe.space_load import load_space
from raymem.storage.storage import Storage
from raymem.sweeps import search as search_module
from raymem.sweeps import tune
from raymem.sweeps.driver import sweep
from raymem.sweeps.journal import open_study
from raymem.sweeps.options import Objective, SweepOptions
from raymem.sweeps.report import SweepRow
from raymem.sweeps.result import SweepResult
from raymem.tracking.none_kind import NoTracking
from tests.helpers.ray_processes import RayHead, clean_environment, end_session, free_ports
from tests.helpers.runs import MONITOR, ray_recipe
from tests.helpers.support import PlansHere

SPACE = {
    "adapter.rank": {"type": "choice", "choices": [2, 4, 8, 16]},
    "train.micro_batch": {"type": "choice", "choices": [1, 2, 4, 8]},
    "optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
}
STEPS = {"steps": 6, "global_batch": 8, "micro_batch": 2, "eval_every": 3, "save_every": 3, "warmup": 0}


@pytest.fixture
def recipe(llama: Path, examples: Path, tmp_path: Path) -> Recipe:
    return ray_recipe(llama, examples, tmp_path / "storage", "sweep", train=STEPS, space=SPACE)


@pytest.fixture(scope="module", autouse=True)
def planned_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "PlannerProcess", PlansHere)
        yield


@pytest.fixture(scope="module")
def sizes(planned_here: None, llama: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Predicted peaks of the corners, in order."""
    found = []
    with Planner() as planner:
        for micro_batch in (1, 8):
            for rank in (2, 16):
                train = {**STEPS, "micro_batch": micro_batch}
                point = ray_recipe(
                    llama, examples, tmp_path_factory.mktemp("s"), "x", train=train, adapter={"rank": rank}
                )
                scaling = point.scaling.model_copy(update={"num_workers": 0})
                found.append(planner.plan(point.model_copy(update={"scaling": scaling})).capacity_bytes)
    return sorted(found)


def run(recipe: Recipe, budget: int, samples: int = 6, early_stopping: bool = False, **options: Any) -> SweepResult:
    wanted = SweepOptions(budget, samples, early_stopping=early_stopping, **options)
    return sweep(recipe, load_space(None, recipe), wanted)


def started(rows: list[SweepRow]) -> list[SweepRow]:
    return [row for row in rows if row.status != "refused"]


def leaked_groups() -> list[str]:
    return [g["name"] for g in ray.util.placement_group_table().values() if g["state"] not in ("REMOVED",)]


def test_only_what_fits_is_tried_and_the_best_can_be_trained(
    cluster: RayHead, recipe: Recipe, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "PATIENCE", 20)
    budget = (sizes[1] + sizes[2]) // 2
    tracked = recipe.model_copy(update={"tracking": NoTracking()})
    swept = run(tracked, budget, samples=4)
    rows = started(swept.rows)
    assert len(rows) == 4 and {row.status for row in rows} == {"finished"}
    assert len(swept.rows) > 4, "something was refused"
    for row in rows:
        assert row.measured_bytes is not None and row.measured_bytes <= budget
        assert row.predicted_bytes == pytest.approx(row.measured_bytes, rel=0.03)
    assert not leaked_groups()
    best = yaml.safe_load(Path(str(swept.best)).read_text())
    assert best["train"]["micro_batch"] < 8 and best["scaling"] == recipe.to_dict()["scaling"]
    assert (Path(swept.report) / "pareto.png").exists()
    again = run(tracked, budget, samples=4)  # nothing is left to do
    assert [row.number for row in again.rows] == [row.number for row in swept.rows]
    with pytest.raises(RecipeError, match="a sweep of this name with another budget lies there"):
        run(tracked, budget + 1)
    with pytest.raises(BudgetExceeded) as refused:
        run(tracked.model_copy(update={"name": "tiny"}), sizes[0] - 1)
    assert "below the smallest point of the space" in str(refused.value) and "'adapter.rank': 2" in str(refused.value)


@pytest.mark.slow
def test_a_metric_of_answers_can_be_what_is_looked_for(
    cluster: RayHead, recipe: Recipe, sizes: list[int], tmp_path: Path
) -> None:
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps({"prompt": f"w{n}", "completion": f" w{2 * n}"}) + "\n" for n in range(1, 8)))
    name = "data.eval[0]/f1"
    raw = recipe.to_dict() | {"scaling": {"num_workers": 0}, "space": {"adapter.rank": SPACE["adapter.rank"]}}
    raw["data"] |= {"eval": {"path": str(sums), "metric": "f1"}}
    judged = Recipe.model_validate(raw)
    swept = run(judged, 2 * sizes[-1], samples=2, objective=Objective((name,)))
    found = [row.metrics[name] for row in started(swept.rows)]
    assert len(found) == 2 and all(0 <= value <= 1 for value in found)
    best = Path(str(swept.best)).read_text()
    assert f"{name} {max(found):.4f}" in best
    with pytest.raises(RecipeError, match=r"'data\.eval\[0\]/numeric': .* reports .* if it has that metric"):
        run(judged.model_copy(update={"name": "other"}), 2 * sizes[-1], objective=Objective(("data.eval[0]/numeric",)))


def dying_trial(config: dict[str, Any]) -> None:
    """Every fifth trial runs out of memory, every fourth one's process is killed on the first try."""
    import torch

    from raymem.sweeps.trial import TrialJob, run_trial
    from raymem.training import loop, step

    job = TrialJob.of(config)
    folder = Path(job.recipe["storage"]["path"])
    with open(folder / "attempts.txt", "a") as file:
        file.write(f"{job.number} {os.getpid()}\n")
    attempts = [line.split()[0] for line in (folder / "attempts.txt").read_text().splitlines()]
    index = sorted(set(map(int, attempts))).index(job.number)
    original = step.train_step

    def fails(*arguments: Any, **options: Any) -> Any:
        if index % 5 == 4:
            raise torch.OutOfMemoryError("injected")
        if index % 4 == 3 and attempts.count(str(job.number)) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", fails)
        run_trial(config)


@pytest.mark.slow
def test_memory_that_runs_out_is_a_result_and_a_crash_is_tried_again(
    cluster: RayHead, recipe: Recipe, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(tune, "run_trial", dying_trial)
    try:
        swept = run(recipe, sizes[-1], samples=10)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    rows = started(swept.rows)
    assert Counter(row.status for row in rows) == {"finished": 8, "infeasible": 2}
    assert all(
        row.measured_bytes and "out of memory" in (row.problem or "") for row in rows if row.status == "infeasible"
    )
    lines = [line.split() for line in (Path(recipe.storage.path) / "attempts.txt").read_text().splitlines()]
    per_trial = Counter(number for number, _ in lines)
    assert sorted(per_trial.values()) == [1] * 6 + [2] * 4, "killed ones once more, infeasible ones only to say so"
    processes = [pid for number, pid in lines]
    assert len(set(processes)) < len(processes), "processes are used again"
    for number in [str(row.number) for row in rows if row.status == "infeasible"]:
        failed = next(index for index, (n, _) in enumerate(lines) if n == number)
        assert lines[failed][1] not in processes[failed + 1 :], "a process that ran out of memory is not used again"
    study = open_study(Storage.open(swept.folder), Objective(("eval_loss",)), recipe.name)
    assert all(trial.state.is_finished() for trial in study.get_trials())
    assert not leaked_groups()


def left_checkpoints(swept: SweepResult) -> list[Path]:
    return list(Path(swept.folder).parent.glob(f"{Path(swept.folder).name}-*/checkpoints/*"))


LONG = {"steps": 30, "eval_every": 3, "save_every": 3}
RATES = {"optimizer.lr": {"type": "choice", "choices": [1e-2, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8]}}


@pytest.mark.slow
def test_what_is_clearly_worse_is_stopped_and_nothing_is_lost(
    cluster: RayHead, recipe: Recipe, sizes: list[int]
) -> None:
    """What ``raymem sweep`` does by default, with the best rate first."""
    wanted = Recipe.model_validate({**recipe.to_dict(), "space": RATES, "train": {**recipe.to_dict()["train"], **LONG}})
    swept = run(wanted, 2 * sizes[-1], samples=6, early_stopping=True, algorithm="grid")
    rows = started(swept.rows)
    counts = Counter(row.status for row in rows)
    assert counts.total() == 6 and counts["finished"] and counts["stopped"] >= 2, counts
    assert set(counts) == {"finished", "stopped"} and rows[0].status == "finished"
    study = open_study(Storage.open(swept.folder), Objective(("eval_loss",)), recipe.name)
    assert all(trial.state.is_finished() for trial in study.get_trials())
    stopped = [trial for trial in study.get_trials() if trial.user_attrs["status"] == "stopped"]
    assert all(0 < trial.user_attrs["step"] < LONG["steps"] for trial in stopped)
    assert not leaked_groups() and not left_checkpoints(swept)


@pytest.mark.slow
def test_a_stopped_trial_with_workers_ends_with_them(cluster: RayHead, recipe: Recipe, sizes: list[int]) -> None:
    """Two workers on two cores: the next trial starts only when all of the last one is gone."""
    longer = {"steps": 150, "eval_every": 30, "save_every": 30}
    plain = recipe.to_dict()
    scaling = {**plain["scaling"], "num_workers": 2, "resources_per_worker": None}
    changes = {"space": RATES, "train": {**plain["train"], **longer}, "scaling": scaling}
    wanted = Recipe.model_validate({**plain, **changes})
    swept = run(wanted, 2 * sizes[-1], samples=2, early_stopping=True, algorithm="grid")
    rows = started(swept.rows)
    assert [row.status for row in rows] == ["finished", "stopped"]
    (folder,) = Path(swept.folder).parent.glob(f"{Path(swept.folder).name}-*-{rows[1].number:04d}")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) < longer["steps"]
    deadline = time.monotonic() + 30  # Ray Train gives back a dead group's places a second later

    def left() -> list[str]:
        return [*processes_of(cluster, "RayTrainWorker", "ImplicitFunc"), *leaked_groups()]

    while left() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left() and not left_checkpoints(swept)


def killed_trial(config: dict[str, Any]) -> None:
    """The second trial's process is killed at its first try."""
    from raymem.sweeps.trial import TrialJob, run_trial
    from raymem.training import loop, step

    job = TrialJob.of(config)
    folder = Path(job.recipe["storage"]["path"])
    original = step.train_step

    def dies(*arguments: Any, **options: Any) -> Any:
        if not (folder / "killed.txt").exists():
            (folder / "killed.txt").write_text(ray.get_runtime_context().get_worker_id())
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        if job.number == 1:
            patch.setattr(loop, "train_step", dies)
        run_trial(config)


@pytest.mark.slow
def test_a_trial_that_rays_memory_monitor_kills_does_not_end_the_sweep(
    cluster: RayHead, recipe: Recipe, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray tells of that end in an error of its own, at which Ray Tune gives up."""
    from ray.air.execution._internal.actor_manager import RayActorManager

    killed = Path(recipe.storage.path) / "killed.txt"
    original = RayActorManager._actor_task_failed

    told: list[str] = []

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, ray.exceptions.RayActorError) and killed.exists() and not told:
            told.append(MONITOR.format(killed.read_text()))
            exception = ray.exceptions.OutOfMemoryError(told[0])
        original(self, tracked_actor_task, exception)

    monkeypatch.setattr(RayActorManager, "_actor_task_failed", failed)
    monkeypatch.setattr(tune, "run_trial", killed_trial)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        swept = run(recipe, 2 * sizes[-1], samples=4)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    rows = started(swept.rows)
    assert [row.status for row in rows] == ["finished", "infeasible", "finished", "finished"]
    assert rows[1].problem == "killed: its node was out of memory"
    assert not leaked_groups() and not left_checkpoints(swept)


@pytest.mark.slow
def test_trials_with_workers_take_turns(cluster: RayHead, recipe: Recipe, sizes: list[int]) -> None:
    """Two workers on two cores: never more than one trial at a time, and no deadlock."""
    scaling = {"num_workers": 2, "resources_per_worker": None}
    wanted = Recipe.model_validate({**recipe.to_dict(), "scaling": {**recipe.to_dict()["scaling"], **scaling}})
    swept = run(wanted, 2 * sizes[-1], samples=2)
    assert [row.status for row in started(swept.rows)] == ["finished"] * 2
    assert all(row.measured_bytes == pytest.approx(row.predicted_bytes, rel=0.03) for row in started(swept.rows))


@pytest.mark.slow
def test_sigkill_of_the_driver_repeats_nothing_and_mlflow_shows_the_tree(
    ray_head: RayHead, recipe: Recipe, sizes: list[int], tmp_path: Path
) -> None:
    """With a real ``mlflow server``."""
    import mlflow

    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/m.db", "--artifacts-destination", str(tmp_path / "art")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, env={**clean_environment(), **quiet}, stdout=log, stderr=log)
    steps = {**STEPS, "steps": 30, "eval_every": 10, "save_every": 10}
    plain = {**recipe.to_dict(), "train": {**recipe.to_dict()["train"], **steps}}
    plain["tracking"] = {"kind": "mlflow", "uri": uri, "experiment": "sweeps"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plain))
    arguments = ["sweep", str(tmp_path / "sweep.yaml"), "--samples", "6", f"--budget={sizes[-1]}B", "--name=killed"]
    arguments += ["--no-early-stopping"]
    folder = Path(recipe.storage.path)
    try:
        wait(lambda: answers(uri), server, tmp_path / "server.log")
        driver = start_driver(ray_head, arguments, tmp_path / "one.log")
        wait(lambda: len(list(folder.glob("killed-*/trial.json"))) >= 2, driver, tmp_path / "one.log")
        before = {file.parent.name: file.read_bytes() for file in folder.glob("killed-*/trial.json")}
        driver.kill()
        driver.wait()
        ended = time.monotonic() + 60
        while processes_of(ray_head, "ImplicitFunc", "run_trial") and time.monotonic() < ended:
            time.sleep(0.5)
        assert not processes_of(ray_head, "ImplicitFunc", "run_trial"), "trials end with their driver"
        second = start_driver(ray_head, arguments, tmp_path / "two.log")
        assert second.wait(300) == 0, (tmp_path / "two.log").read_text()[-3000:]
        rows = json.loads((folder / "killed/report/trials.json").read_text())
        done = [row for row in rows if row["status"] != "refused"]
        assert [row["status"] for row in done] == ["finished"] * 6
        for name, content in before.items():
            assert (folder / name / "trial.json").read_bytes() == content, "a finished trial is not trained again"
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name("sweeps")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
        children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        names = {int(r.info.run_name.rpartition("-")[2]) for r in children if r.info.status == "FINISHED"}
        assert names == {row["number"] for row in done}
        finished = next(r for r in children if r.info.status == "FINISHED")
        assert {"eval_loss", "peak_bytes", "predicted_peak_bytes"} <= finished.data.metrics.keys()
        assert finished.data.params["adapter.rank"] in "2 4 8 16"
        assert {f.path for f in client.list_artifacts(parent.info.run_id, "sweep")} >= {
            "sweep/best.yaml",
            "sweep/pareto.png",
        }
    finally:
        end_session(server)


def start_driver(head: RayHead, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**head.client_env(), "RAYMEM_CACHE": os.environ["RAYMEM_CACHE"]}
    with open(log, "wb") as out:
        return subprocess.Popen([sys.executable, "-m", "raymem", *arguments], env=environment, stdout=out, stderr=out)


def processes_of(head: RayHead, *words: str) -> list[str]:
    found = psutil.Process(head.pid).children(recursive=True)
    names = []
    for child in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(child.cmdline()))
    return [name for name in names if any(word in name for word in words)]


def answers(uri: str) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"ended with {process.poll()}, or too slow:\n{log.read_text()[-4000:]}")
        time.sleep(0.1)

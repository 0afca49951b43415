"""Parts of a sweep without a cluster: what a trial takes, how it ends, and what the command refuses."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml

from raymem.errors import (
    BudgetError,
    ClusterError,
    NonFiniteError,
    OutOfMemory,
    RaymemError,
    RecipeError,
    RunBusy,
    StorageError,
    TrackingError,
)
from raymem.recipe.schema import Recipe
from raymem.recipe.space_load import load_space
from raymem.runs.lock import in_turn
from raymem.storage.identity import held, identify
from raymem.storage.leases.held import holding
from raymem.storage.storage import Storage
from raymem.sweeps import driver as sweep_module
from raymem.sweeps import trial as trial_module
from raymem.sweeps import tune
from raymem.sweeps.driver import sweep
from raymem.sweeps.journal import open_study
from raymem.sweeps.options import Objective, SweepOptions
from raymem.sweeps.report import rows_of
from raymem.sweeps.resources import RUNTIME_BYTES, admitted_bytes, most_at_once, nested, resources_of
from raymem.sweeps.trial import TrialJob
from raymem.training.loop import Outcome
from raymem.training.model.revision import Began, at_revision
from tests.helpers.commands import run_command
from tests.helpers.runs import MONITOR
from tests.helpers.support import make_recipe

SPACE = {"adapter.rank": {"type": "choice", "choices": [2, 4]}}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    data = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "eval")}
    for path in data.values():
        Path(path).touch()  # that it is there is looked at before anything else
    one_core = {"num_workers": 1, "resources_per_worker": {"CPU": 1}}
    return make_recipe({"space": SPACE, "data": data, "storage": {"path": str(tmp_path)}, "scaling": one_core})


def test_what_a_trial_reserves(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling, process, memory, threads = resources_of(recipe, 5 << 30)
    assert (scaling["num_workers"], process, threads) == (0, {"CPU": 1.0}, 1)
    assert memory == (5 << 30) + RUNTIME_BYTES

    def changed(**options: Any) -> Recipe:
        return recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update=options)})

    scaling, process, memory, _ = resources_of(changed(num_workers=2), 5 << 30)
    assert (process, memory) == ({"memory": RUNTIME_BYTES}, 0) and scaling["num_workers"] == 2
    assert scaling["resources_per_worker"]["memory"] == (5 << 30) + RUNTIME_BYTES
    assert nested(changed(num_workers=(1, 2))) and not nested(changed(num_workers=0))
    on_gpu = changed(use_gpu=True, resources_per_worker=None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"GPU": 2.0}}])
    assert resources_of(on_gpu, 5 << 30)[1] == {"CPU": 1.0, "GPU": 1.0}, "whole GPUs where nodes say nothing"
    nodes = [{"Alive": True, "Resources": {"GPU": 2.0, "gpu_memory_mib": 2.0 * 16_000}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert resources_of(on_gpu, 5 << 30)[1] == {
        "CPU": 1.0,
        "GPU": 0.3333,
        "gpu_memory_mib": 5333,
    }
    assert resources_of(on_gpu, 9 << 30)[1] == {"CPU": 1.0, "GPU": 1.0, "gpu_memory_mib": 16_000}
    share = resources_of(on_gpu, int(2.5 * (1 << 30)))[1]["GPU"]
    assert 6 * share <= 1, "as many as that fit"
    assert resources_of(changed(resources_per_worker={"blue": 1.0}), 1)[1] == {"CPU": 1.0, "blue": 1.0}


def node(cores: float, gib: float, name: str = "10.0.0.1") -> dict[str, Any]:
    return {"Alive": True, "NodeManagerAddress": name, "Resources": {"CPU": cores, "memory": gib * (1 << 30)}}


def test_trials_with_workers_fit_beside_each_other(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(nodes: list[dict[str, Any]], budget: int, **options: Any) -> int | None:
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        defaults = {"num_workers": 2, "resources_per_worker": None}
        wanted = recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update=defaults | options)})
        return most_at_once(wanted, admitted_bytes(wanted, budget, told.append))

    told: list[str] = []
    assert at_once([node(16, 64)], 1 << 30) == 1, "two workers that take all cores of the node"
    one_core = {"resources_per_worker": {"CPU": 1.0}}
    assert at_once([node(0, 64), node(4, 64)], 1 << 30, **one_core) == 2, "a head without cores takes nothing away"
    assert not told
    # 4 workers with 10 GiB, 1 GiB each besides, and half a GiB of the process that waits for two of them.
    assert at_once([node(16, 4 * 11.5)], 10 << 30, **one_core) == 2
    assert at_once([node(16, 4 * 11.5 - 0.1)], 10 << 30, **one_core) == 1
    assert at_once([node(16, 13)], 10 << 30, **one_core) == 1
    assert told == ["warning: the budget is more than the cluster has for each worker; trials may take 5.00 GiB"]
    assert at_once([node(1, 13), node(1, 8)], 10 << 30, **one_core) == 1
    assert told[1:] == ["warning: the budget is more than the cluster has for each worker; trials may take 6.50 GiB"]
    with pytest.raises(BudgetError, match=r"2 workers .* do not fit on this cluster, which has room for 1; lower"):
        at_once([node(1, 64)], 1 << 30, **one_core)
    with pytest.raises(BudgetError, match=r"memory: the cluster has for each worker no more than the 1.00 GiB"):
        at_once([node(2, 3)], 1 << 30, **one_core)


def test_a_trial_fits_on_every_node_that_may_get_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    nodes = [node(0, 2), node(8, 64, "10.0.0.2"), node(4, 9, "10.0.0.3")]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert admitted_bytes(recipe, 8 << 30, told.append) == 8 << 30 and not told
    assert admitted_bytes(recipe, 32 << 30, told.append) == 8 << 30
    assert told == ["warning: the budget is more than node 10.0.0.3 has; trials may take 8.00 GiB"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes[:1])
    assert admitted_bytes(recipe, 8 << 30, told.append) == 8 << 30
    assert told[1:] == ["warning: no node has {'CPU': 1.0} yet; trials wait for one"]


def test_the_memory_monitor_also_names_those_that_it_let_live() -> None:
    assert tune.killed_workers(MONITOR.format("728f")) == {"728f"}


def test_a_resumed_trial_is_judged_by_its_step() -> None:
    """Its reports begin anew."""
    recipe = make_recipe({"train": {"steps": 90}})
    asha = tune.early_stopping(recipe, Objective(("eval_loss",)))
    assert asha is not None
    trials = {name: SimpleNamespace(trial_id=name) for name in ("good", "resumed", "bad")}
    for trial in trials.values():
        asha.on_trial_add(None, trial)

    def told(name: str, step: int, loss: float) -> Any:
        return asha.on_trial_result(None, trials[name], {"step": step, "eval_loss": loss, "training_iteration": 1})

    assert [told("good", step, 5 - step / 90) for step in (9, 18, 27)] == ["CONTINUE"] * 3
    assert told("resumed", 27, 4.6) == "CONTINUE", "better than the other one at that step"
    assert told("resumed", 36, 4.65) == "CONTINUE", "judged at 9, 27 and 81 steps only"
    assert told("bad", 9, 4.95) == "STOP"
    assert tune.early_stopping(recipe, Objective(("eval_loss", "peak_bytes"))) is None
    assert tune.early_stopping(recipe, Objective(("data.eval.math/numeric",))) is None  # known at the end only


def test_a_trial_that_was_killed_for_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_storage = Storage.open(str(tmp_path)).child("trial")
    began = {"host": "a", "ray_job": "01", "ray_worker": "f00", "oom_kills": 3}

    def found(**now: Any) -> dict[str, Any] | None:
        monkeypatch.setattr(trial_module, "_circumstances", lambda: {**began, "ray_worker": "ba7", **now})
        return trial_module.earlier_result(run_storage)

    assert found() is None
    run_storage.write_json(trial_module.ATTEMPT, began)
    assert found() is None, "it was killed for something else"
    assert found(oom_kills=4, ray_job="02") is None, "anything may have been killed since that driver"
    assert found(oom_kills=4, host="b") is None
    end = found(oom_kills=4)
    assert end is not None and end["status"] == "infeasible" and "out of memory" in end["problem"]
    assert found() == end


def test_rows_of_an_empty_study_are_none(tmp_path: Path) -> None:
    assert rows_of(open_study(Storage.open(str(tmp_path)), Objective(("eval_loss",)), "x").get_trials()) == []


def test_a_gpu_is_not_planned_for_trials_that_run_without(recipe: Recipe) -> None:
    with pytest.raises(BudgetError, match=r"--gpu H100-80GB: scaling.use_gpu is false, so trials would run on CPU"):
        sweep(recipe, load_space(None, recipe), SweepOptions(1 << 30, gpu="H100-80GB"))


def test_a_metric_that_no_trial_reports_is_named(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="objective 'eval_los': no trial reports that; did you mean 'eval_loss'"):
        sweep(recipe, load_space(None, recipe), SweepOptions(1 << 30, objective=Objective(("eval_los",))))


def test_the_name_of_a_sweep_is_checked_before_it_is_a_directory(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    ended = run_command("sweep", tmp_path / "r.yaml", "--budget", "1GiB", "--name", "../other")
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1 and "--name: name: '../other'" in ended.stderr


def test_a_metric_that_is_named_twice_is_one_objective(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    given: list[SweepOptions] = []

    def stop(recipe: Recipe, space: Any, options: SweepOptions, **rest: Any) -> None:
        given.append(options)
        raise RecipeError("enough")

    monkeypatch.setattr(sweep_module, "sweep", stop)
    run_command("sweep", tmp_path / "r.yaml", "--budget", "1GiB", "--also", "loss, eval_loss,loss")
    assert given[0].objective.metrics == ("eval_loss", "loss")


def job_of(recipe: Recipe, **scaling: Any) -> TrialJob:
    plain = {**recipe.to_dict(), "name": "t-0003", "scaling": {**recipe.to_dict()["scaling"], **scaling}}
    return TrialJob(3, plain, 1000, 0, 0, {"CPU": 1.0}, None, identify(Path(recipe.storage.path)))


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What trials that run in this process tell Ray Tune."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    monkeypatch.setattr(trial_module, "_circumstances", lambda: {"host": "a", "ray_job": "1", "oom_kills": 0})
    return told


def end_of(recipe: Recipe) -> dict[str, Any] | None:
    run = Storage.open(recipe.storage.path).child("t-0003")
    return run.read_record(trial_module.RESULT) if run.exists(trial_module.RESULT) else None


@pytest.mark.parametrize(
    ("error", "final"),
    [(NonFiniteError("the loss is nan"), True), (StorageError("no space"), False), (TrackingError("is down"), False)],
)
def test_only_what_would_come_again_ends_a_trial_for_good(
    recipe: Recipe, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, error: RaymemError, final: bool
) -> None:
    def fails(*given: Any) -> None:
        raise error

    monkeypatch.setattr(trial_module, "_train", fails)
    if final:
        trial_module.run_trial(job_of(recipe).to_config())
        assert reports == [end_of(recipe)] and reports[0]["status"] == "failed"
    else:
        with pytest.raises(type(error)):
            trial_module.run_trial(job_of(recipe).to_config())
        assert end_of(recipe) is None and not reports, "Ray Tune tries it again"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_memory_is_measured_only_where_it_ran_out(
    recipe: Recipe, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    def fails(*given: Any) -> None:
        raise OutOfMemory("out of memory")

    monkeypatch.setattr(trial_module, "_train", fails)
    with pytest.raises(OutOfMemory):
        trial_module.run_trial(job_of(recipe, num_workers=num_workers).to_config())
    end = end_of(recipe)
    assert end is not None and end["status"] == "infeasible"
    assert (end["measured_bytes"] > 0) == (num_workers == 1)


def test_a_trial_tells_its_evaluations_and_the_time_of_all_its_sessions(
    recipe: Recipe, reports: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trains(recipe: Recipe, job: TrialJob, listen: Any) -> Any:
        last = float(recipe.train.steps or 0)
        listen([{"step": 1.0, "loss": 4.0}, {"step": 2.0, "loss": 3.0, "eval_loss": 3.5}])
        listen([{"step": last, "loss": 2.0, "eval_loss": 2.5, "peak_bytes": 900.0}])
        outcome = Outcome(int(last), 3, None, 2.5, None, None, "adapter", earlier_s=5.0)
        return SimpleNamespace(outcome=outcome, train_s=2.0, scores={"data.eval[0]/f1": 0.5})

    monkeypatch.setattr(trial_module, "_train", trains)
    trial_module.run_trial(job_of(recipe).to_config())
    assert [(told["step"], told.get("status")) for told in reports] == [(2.0, None), (4.0, "finished")]
    end = reports[-1]
    assert end == end_of(recipe) and end["train_s"] == 7.0 and end["data.eval[0]/f1"] == 0.5
    assert (end["loss"], end["eval_loss"], end["peak_bytes"]) == (2.0, 2.5, 900.0)


def test_what_a_trial_held_is_given_back_however_it_ends(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(tune, "free_reservation", freed.append)
    follow = tune.Follow(SimpleNamespace(problems={}), Storage.open(str(tmp_path)), "sweep", lambda running: None)  # type: ignore[arg-type]
    checkpoints = tmp_path / "t-0003" / "checkpoints"
    checkpoints.mkdir(parents=True)
    config = job_of(recipe).to_config()
    stopped = SimpleNamespace(trial_id="x", config=config, last_result={"eval_loss": 3.0, "step": 2})
    follow.on_trial_start(0, [], stopped)
    follow.on_trial_complete(0, [], stopped)
    assert freed == ["t-0003-memory"] and not checkpoints.exists()
    checkpoints.mkdir()  # by a worker that was about to end
    follow.on_experiment_end([stopped])
    assert not checkpoints.exists()


def test_the_same_pruned_model_is_made_by_one_trial(tmp_path: Path) -> None:
    storage, done = Storage.open(str(tmp_path)), []

    def prune(number: int) -> None:
        with in_turn(storage, "pruning-x"):
            done.append(("begins", number))
            time.sleep(0.1)
            done.append(("ends", number))

    threads = [threading.Thread(target=prune, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [word for word, _ in done] == ["begins", "ends"] * 2


def test_a_trial_waits_for_the_process_that_still_trains_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result: Any = object()
    tries: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(tries), sleep=lambda seconds: tries.append(100.0))
    monkeypatch.setattr(trial_module, "time", clock)

    def train() -> Any:
        if len(tries) < 2:
            raise RunBusy("another process is training this run")
        return result

    assert trial_module._after_its_predecessor(train) is result

    def never() -> Any:
        raise RunBusy("another process is training this run")

    tries.clear()
    with pytest.raises(RunBusy):
        trial_module._after_its_predecessor(never)
    assert sum(tries) == trial_module.PREDECESSOR_S + 100


def test_a_sweep_that_was_taken_over_stops_at_the_next_step_of_ray_tune(recipe: Recipe, tmp_path: Path) -> None:
    class Lost:
        holder = "mine"

        def check(self, *, ask: bool = True) -> None:
            raise StorageError("the lease on this run was taken by ann")

    storage = Storage.open(str(tmp_path))
    follow = tune.Follow(SimpleNamespace(problems={}), storage, "sweep", lambda running: None)  # type: ignore[arg-type]
    follow.on_step_begin(0, [])
    with holding(storage.child("sweep").root, Lost()), pytest.raises(StorageError, match="was taken by ann"):
        follow.on_step_begin(1, [])


def test_a_sweep_stays_at_the_revision_that_it_began_with(recipe: Recipe, tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path)).child("s")
    space, options = load_space(None, recipe), SweepOptions(1 << 30)
    resumed, facts = sweep_module._same_sweep(folder, recipe, space, options)
    assert (resumed, facts["revision"]) == (False, None)
    folder.write_record(sweep_module._FACTS, {**facts, "revision": "c0ffee"})
    for revision in (None, "c0ffee"):  # what it asked for then, and the commit that this was
        same = at_revision(recipe, revision)
        resumed, again = sweep_module._same_sweep(folder, same, space, options)
        assert resumed and again == {**facts, "revision": "c0ffee"}
    assert sweep_module._began(again) == Began(recipe.model.name, "c0ffee", None)
    with pytest.raises(RecipeError, match="a sweep of this name with another model lies there"):
        sweep_module._same_sweep(folder, at_revision(recipe, "v2"), space, options)


def test_where_there_is_no_room_for_any_process_the_sweep_ends(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def fails(*given: Any) -> None:
        tries.append(1)
        raise RuntimeError("Caught unexpected exception") from ray.exceptions.OutOfMemoryError(MONITOR)

    monkeypatch.setattr(tune, "_fit", fails)
    search: Any = SimpleNamespace(problems={})
    with pytest.raises(ClusterError, match="memory: Ray's memory monitor kills processes of this sweep before they"):
        tune.tune(lambda: search, recipe, Storage.open(str(tmp_path)), 1, None, lambda running: None)
    assert len(tries) == 1 + tune.CRASHES


def test_a_sweep_and_its_trials_stop_where_the_storage_is_gone(recipe: Recipe, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    moved = recipe.model_copy(update={"storage": recipe.storage.model_copy(update={"path": str(root)})})
    follow = tune.Follow(SimpleNamespace(problems={}), Storage.open(str(root)), "sweep", lambda running: None)  # type: ignore[arg-type]
    with held(root):
        follow.on_step_begin(0, [])
        job = job_of(moved)
        root.rename(tmp_path / "away")
        with pytest.raises(StorageError, match="is not the storage that this run began on"):
            follow.on_step_begin(1, [])
    with pytest.raises(StorageError, match="is not the storage that this run began on"):
        trial_module.run_trial(job.to_config())
    assert not root.exists()

"""What runs in a trial's process: one point of a sweep, trained, and told to Ray Tune as it goes.

The process of a trial that trains in it is used again by later trials; after an out-of-memory error or a crash Ray Tune
replaces it. What a trial came to is also written beside its run, so that it is known even if nobody was there to hear
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymem.errors import AdapterError, DataError, ModelError, NonFiniteError, OutOfMemory, RecipeError
from raymem.recipe.axes import register_again, registered
from raymem.recipe.load import parse_recipe
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.sweeps.resources import nested
from raymem.training.reporter import Listener, Row

if TYPE_CHECKING:
    from raymem.runs.resolved import ResolvedRun
    from raymem.runs.results import TrainResult

RESULT = "trial.json"
"""In the directory of a trial's run: its last report, once it has ended."""
ATTEMPT = "attempt.json"
"""Beside it: which process began it, and what that knew."""
FINAL = (NonFiniteError, RecipeError, ModelError, DataError, AdapterError)
"""Another try would end the same way: a learning rate that diverges, say. (A full disk or a server that is down would
not.)"""
REPORTED = ("eval_loss", "loss", "peak_bytes", "tokens_per_s", "elapsed_s", "step")
_OOM_EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
"""Of cgroups, version 2 and 1."""


@dataclass(frozen=True)
class TrialJob:
    """All that a trial's process is told; plain values."""

    number: int
    """Of the proposal in the sweep's journal."""
    recipe: dict[str, Any]
    predicted_bytes: int
    """Peak of a step."""
    memory_bytes: int
    """Host memory that is reserved with Ray while the trial runs; 0 if its workers do that."""
    threads: int
    """Of torch; 0 leaves them to the workers."""
    resources: dict[str, float]
    """Of the process, with Ray."""
    parent_run_id: str | None
    """Id of the sweep's run in the tracking system."""

    def to_config(self) -> dict[str, Any]:
        """As Ray Tune takes it: few values, for what it makes of many is long names."""
        return {"job": json.dumps(asdict(self)), "kinds": json.dumps(registered())}

    @property
    def reservation(self) -> str:
        """Name of the host memory that it holds."""
        return f"{self.recipe['name']}-memory"

    @staticmethod
    def of(config: dict[str, Any]) -> TrialJob:
        """The job in a config, in another process; the driver's kinds are registered there too."""
        register_again(json.loads(config["kinds"]))
        return TrialJob(**json.loads(config["job"]))


def run_trial(config: dict[str, Any]) -> None:
    """The function that Ray Tune runs."""
    from ray import tune

    # Give the thread of a stopped trial up to 120 s to end its tracked run before this process takes the next trial:
    # Ray Tune's default of 2 s may drop that one without a word.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")
    job = TrialJob.of(config)
    recipe = parse_recipe(job.recipe, f"trial {job.number}")
    run = Storage.open(recipe.storage.path).child(recipe.name)
    known = earlier_result(run)
    if known is not None:
        tune.report(known)
        return
    run.write_json(ATTEMPT, _circumstances())
    latest: dict[str, Any] = {"number": job.number}

    def listen(rows: Sequence[Row]) -> None:
        for row in rows:
            latest.update({name: row[name] for name in REPORTED if name in row})
            # The last evaluation is told with the end: a trial that has come so far is not stopped.
            if "eval_loss" in row and row["step"] != recipe.train.steps:
                tune.report(dict(latest))

    if job.threads:
        import torch

        torch.set_num_threads(job.threads)
    try:
        with reserved(job.reservation, job.memory_bytes):
            began = time.perf_counter()
            finished = _train(recipe, job, listen)
            overhead_s = time.perf_counter() - began - finished.train_s
    except OutOfMemory as error:
        # Of a worker elsewhere this process knows no figure.
        measured = 0 if nested(recipe) else measured_at_failure(recipe, error)
        end = {**latest, "status": "infeasible", "measured_bytes": measured, "problem": str(error)}
        run.write_json(RESULT, end)
        raise  # ends this process, whose memory may be in pieces; the next one tells the result
    except FINAL as error:
        end = {**latest, "status": "failed", "problem": str(error)}
        run.write_json(RESULT, end)
        tune.report(end)
        return
    outcome = finished.outcome
    found = {"loss": outcome.loss, "eval_loss": outcome.eval_loss, "peak_bytes": outcome.peak_bytes}
    end = {
        **latest,
        **{name: value for name, value in found.items() if value is not None},
        "train_s": finished.train_s + outcome.earlier_s,
        "overhead_s": overhead_s,
        "status": "finished",
    }
    run.write_json(RESULT, end)
    tune.report(end)


def earlier_result(run: Storage) -> dict[str, Any] | None:
    """What this trial came to in an earlier attempt, or None if it is to be trained (on).

    The kernel kills a process that takes more than its container may; it leaves no word, but a count. That is of all
    that runs in the container, so only an attempt of the same driver is held against it.
    """
    if run.exists(RESULT):
        return dict(run.read_json(RESULT))
    if run.exists(ATTEMPT):
        before, now = run.read_json(ATTEMPT), _circumstances()
        same = all(before.get(name) == now[name] for name in ("host", "ray_job"))
        if same and now["oom_kills"] > before["oom_kills"]:
            found = {"status": "infeasible", "measured_bytes": 0, "problem": "killed: the container was out of memory"}
            run.write_json(RESULT, found)
            return found
    return None


def _train(recipe: Recipe, job: TrialJob, listen: Listener) -> TrainResult:
    """A whole training, on a model that is pruned first if that has to be."""
    from raymem.runs.resolve import resolve
    from raymem.runs.resolved import PlannedModel
    from raymem.runs.train import InSweep, TrainOptions, train

    run = resolve(recipe)
    if isinstance(run.base, PlannedModel):
        run = _on_pruned_model(run)
    return train(run, TrainOptions(listeners=[listen], sweep=InSweep(job.parent_run_id, job.predicted_bytes)))


def _on_pruned_model(run: ResolvedRun) -> ResolvedRun:
    """The run on its pruned model, which is made unless it is there; of trials that need the same, one makes it."""
    from raymem.runs.lock import in_turn
    from raymem.runs.loram import Pipeline
    from raymem.runs.resolved import PlannedModel

    assert isinstance(run.base, PlannedModel)
    pipeline = Pipeline(run.asked, run=run)
    with in_turn(run.storage, f"pruning-{run.base.site.directory.name}"):
        pipeline.prune()
        pipeline.align()
    return pipeline.trainable()


@contextlib.contextmanager
def reserved(name: str, memory_bytes: int) -> Iterator[None]:
    """Hold host memory of this node in Ray's books, waiting until there is as much.

    Ray Tune could reserve it with the trial's process, but processes are used again, by trials that need more or less.
    """
    if not memory_bytes:
        yield
        return
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    free_reservation(name)  # of an earlier attempt that was killed
    node = f"node:{ray.util.get_node_ip_address()}"
    group = placement_group([{"memory": float(memory_bytes), node: 0.001}], name=name)
    try:
        while not group.wait(60):  # `ready()` would start a process only to say so
            pass
        yield
    finally:
        remove_placement_group(group)


def free_reservation(name: str) -> None:
    """Give back what a process that is dead held; nothing if it held none."""
    import ray
    from ray.util.placement_group import get_placement_group, remove_placement_group

    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        remove_placement_group(get_placement_group(name))


def measured_at_failure(recipe: Recipe, error: BaseException) -> int:
    """What the device had given out, with what it was asked for in vain; on CPU what the process takes just then."""
    if recipe.scaling.use_gpu:
        import torch

        wanted = re.search(r"allocate ([\d.]+) (GiB|MiB|KiB)", str(error.__context__ or error))
        unit = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
        more = float(wanted.group(1)) * unit[wanted.group(2)] if wanted else 0.0
        return int(torch.cuda.max_memory_allocated() + more)
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the highest mark, which may be that of an earlier trial
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def _circumstances() -> dict[str, Any]:
    """Which process this is, and where."""
    import ray

    here = ray.get_runtime_context()
    return {
        "host": os.uname().nodename,
        "ray_job": here.get_job_id(),
        "ray_worker": here.get_worker_id(),
        "oom_kills": _oom_kills(),
    }


def _oom_kills() -> int:
    """Processes of this container that the kernel has killed for memory."""
    for file in _OOM_EVENTS:
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in file.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0

"""Plans in a process of its own, and remembers earlier plans."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import raymem
from raymem import errors
from raymem.cache import cache_root, key_of, read_json, source_digest, versions, write_json
from raymem.errors import PlanError
from raymem.memory.devices import gpu_key
from raymem.planner.shapes import circumstances, shipped_models
from raymem.planner.types import Above, Plan, RowFacts
from raymem.recipe.axes import MEMORY_AXES, outside_code, registered
from raymem.recipe.load import MODELS, SMOLLM2, SMOLLM2_ON_HUB, packaged_recipe, read_yaml
from raymem.recipe.schema import Recipe

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0
_PROGRESS_EVERY_S = 20.0
_LIBRARIES = ("torch", "transformers", "peft")
_READ = ("kinds", "linalg", "memory", "methods", "planner", "recipe", "training")
"""The rooms whose code decides what a plan says."""


def plan_recipe(
    recipe: Recipe, rows: RowFacts | None = None, *, gpu: str | None = None, timeout_s: float = TIMEOUT_S
) -> Plan:
    """Predict the memory of one worker of a recipe. No weights are read, and no GPU is touched.

    Args:
        rows: of the recipe's data; by default they are taken for the largest that there can be, which need a mask and
            have every token for a target.
        gpu: name of a GPU (:func:`raymem.memory.devices.gpu_key`); the recipe is then planned for GPUs whatever it
            says.
        timeout_s: for all of it.

    Raises:
        RaymemError: the recipe does not go with its model, the model's config cannot be had, an unknown GPU.
        PlanError: planning takes too long.
    """
    with Planner(gpu=gpu, timeout_s=timeout_s) as planner:
        return planner.plan(recipe, rows)


def plan_many(
    recipes: Sequence[Recipe], *, gpu: str | None = None, timeout_s: float = TIMEOUT_S
) -> list[Plan | Exception]:
    """Plan several recipes in one process; a recipe that cannot be planned gives its error instead.

    Raises:
        BudgetError: unknown GPU.
        PlanError: planning takes too long.
    """
    with Planner(gpu=gpu, timeout_s=timeout_s) as planner:
        return [planner.try_plan(recipe) for recipe in recipes]


class Planner:
    """Plans one recipe after the other, in a process that starts with the first one and stays; not for threads.

    Args:
        gpu: as of :func:`plan_recipe`.
        timeout_s: for one recipe.

    Raises:
        BudgetError: unknown GPU.
    """

    def __init__(self, *, gpu: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._gpu, self._timeout_s = None if gpu is None else gpu_key(gpu), timeout_s
        self._child: PlannerProcess | None = None
        self._abandoned = False

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()
        self._child = None

    def abandon(self) -> None:
        """End what another thread is waiting for, which gets a PlanError; nothing can be planned afterwards."""
        self._abandoned = True
        if self._child is not None:
            self._child.kill()

    @property
    def is_running(self) -> bool:
        """Say whether its process has been started and lives on."""
        return self._child is not None

    def plan(self, recipe: Recipe, rows: RowFacts | None = None) -> Plan:
        """Plan a recipe; see :func:`plan_recipe`."""
        return _or_raise(self.try_plan(recipe, rows))

    def try_plan(self, recipe: Recipe, rows: RowFacts | None = None) -> Plan | Exception:
        """Return a plan, or the error of a recipe that has none. Raises PlanError if it takes too long."""
        return _result(self._answer(_job(recipe, self._gpu, rows)))

    def plan_within(self, recipe: Recipe, limit_bytes: int) -> Plan | Above:
        """Plan like :meth:`plan`, but stops as soon as the device surely must have more than ``limit_bytes``.

        Plans of recipes that need more come back all the same where that shows only at the end, or if they were made
        before.
        """
        answer = self._answer({**_job(recipe, self._gpu), "limit_bytes": limit_bytes})
        if "above" in answer:
            return Above(**answer["above"])
        return _or_raise(_result(answer))

    def warm_up(self, recipe: Recipe) -> None:
        """Start the process and plan in it, known plan or not: what is asked next does not wait for imports."""
        self._new_answer(_job(recipe, self._gpu))

    def _answer(self, job: dict[str, Any]) -> dict[str, Any]:
        answer = _known(_file(job)) or self._new_answer(job)
        if answer.get("config_note"):
            _say_once(answer["config_note"])
        return answer

    def _new_answer(self, job: dict[str, Any]) -> dict[str, Any]:
        answer = self._ask(job)
        if "plan" in answer:
            write_json(_file(job), {**answer, "hub": circumstances()})
        return answer

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a job; if the process dies over it, a rough plan from another process."""
        if self._abandoned:
            raise PlanError("planning was given up")
        child = self._child = self._child or PlannerProcess()
        try:
            answer = child.ask(job, self._timeout_s)
        except PlanError:  # it was ended; the next recipe gets a process of its own, not a rough plan for its death
            self._child = None
            child.close()
            raise
        if answer is not None:
            return answer
        self._child, status = None, child.close()
        if self._abandoned:
            raise PlanError("planning was given up")
        if status > 0:
            raise PlanError(f"the planning process failed: {child.last_stderr_line()}")
        if job["problem"]:
            raise PlanError(f"planning ended with status {status} even without a trace; please report the recipe")
        ended = signal.Signals(-status).name if status < 0 else "status 0"
        return self._ask({**job, "problem": f"the model's code ended the planning process ({ended})"})


@functools.cache
def _say_once(note: str) -> None:
    """Print one line on the terminal, for however many plans."""
    log.warning(note)


def known_plan(recipe: Recipe, rows: RowFacts | None = None, *, gpu: str | None = None) -> Plan | None:
    """Return the plan of a recipe if it is remembered, else None."""
    answer = _known(_file(_job(recipe, None if gpu is None else gpu_key(gpu), rows)))
    return None if answer is None else Plan(**answer["plan"])


def _job(recipe: Recipe, gpu: str | None, rows: RowFacts | None = None) -> dict[str, Any]:
    """Build the question to the process."""
    plannable = _plannable(recipe, gpu)
    job = {"recipe": plannable.to_dict(), "gpu": gpu, "problem": None, "rows": None if rows is None else asdict(rows)}
    return {**job, "kinds": registered(), "code": outside_code(plannable)}


def _file(job: dict[str, Any]) -> Path:
    """Return the file that keeps the answer to a job."""
    return _cache_dir() / f"{_key(job)}.json"


def _plannable(recipe: Recipe, gpu: str | None) -> Recipe:
    """Return the recipe with the config of raymem's own models, and for GPUs if one is named."""
    config = None
    if recipe.model.name in MODELS:
        config = read_yaml(packaged_recipe(MODELS[recipe.model.name]))["model"]["config"]
    elif recipe.model.name == SMOLLM2:
        config = shipped_models()[SMOLLM2_ON_HUB]
    if config is not None:
        model = recipe.model.model_copy(update={"name": None, "config": config, "revision": None, "tokenizer": "demo"})
        recipe = recipe.model_copy(update={"model": model})
    if gpu is not None and not recipe.scaling.use_gpu:
        recipe = recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update={"use_gpu": True})})
    return recipe


class PlannerProcess:
    """Holds the planning process: a JSON line in, one out, through own pipes, since libraries print what they like."""

    def __init__(self) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "6", "OMP_NUM_THREADS": "1"}
        beside_script = os.path.abspath(sys.path[0])  # where a kind from outside may lie
        paths = [str(Path(raymem.__file__).parents[1]), *sys.path[1:], beside_script]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process lives
        read, write = os.pipe()
        self._answers = os.fdopen(read, "rb", buffering=0)
        self._unread = b""
        command = [sys.executable, "-m", "raymem.planner.subprocess_main", str(write)]
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            command, env=environment, stdin=subprocess.PIPE, stdout=self._errors, stderr=self._errors, pass_fds=[write]
        )
        os.close(write)

    def ask(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """Return the answer to a job, or None if the process died.

        Raises:
            PlanError: it takes too long; the process is ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        began = time.monotonic()
        while b"\n" not in self._unread:
            waited_s = time.monotonic() - began
            ready, _, _ = select.select([self._answers], [], [], max(0.0, min(timeout_s - waited_s, _PROGRESS_EVERY_S)))
            if not ready and waited_s < timeout_s:
                log.warning("still planning, %.0f s so far (at most %.0f s)", time.monotonic() - began, timeout_s)
                continue
            if not ready:
                self._process.kill()
                raise PlanError(
                    f"planning took more than {timeout_s:.0f} s and was stopped; plan a recipe with fewer layers or "
                    "less accumulation, or train without a budget"
                )
            received = self._answers.read(1 << 16)
            if not received:
                return None
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)  # type: ignore[no-any-return]

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def last_stderr_line(self) -> str:
        """Return the last line that the process printed."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    def close(self) -> int:
        """End the process and returns its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._answers.close()
        return self._process.returncode


def _result(answer: dict[str, Any]) -> Plan | Exception:
    if "plan" in answer:
        return Plan(**answer["plan"])
    kind, text = answer["error"]
    error: Exception = getattr(errors, kind, PlanError)(text)
    return error


def _or_raise(plan_or_error: Plan | Exception) -> Plan:
    if isinstance(plan_or_error, Exception):
        raise plan_or_error
    return plan_or_error


def _key(job: dict[str, Any]) -> str:
    """Digest everything that a plan depends on."""
    recipe = job["recipe"]
    parts = without_free(recipe)
    config = Path(recipe["model"]["name"] or "") / "config.json"
    if recipe["model"]["name"] is not None and config.is_file():
        parts["config"] = config.read_text()
    package = Path(raymem.__file__).parent
    code = source_digest(*(package / room for room in _READ))
    return key_of([parts, job["gpu"], job["rows"], versions(*_LIBRARIES), code, job.get("code")])


def without_free(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings of a recipe, as a plain dict, that have to do with memory."""
    parts = {section: dict(recipe[section]) for section in ("model", *MEMORY_AXES)}
    for name, axis in MEMORY_AXES.items():
        for option in axis[parts[name]["kind"]].free:
            parts[name].pop(option, None)
    parts["data"] = {key: recipe["data"][key] for key in ("sequence_length", "packing")}
    parts["data"]["evaluated"] = recipe["data"]["eval"] is not None
    parts["train"] = {
        key: recipe["train"][key] for key in ("global_batch", "micro_batch", "precision", "master", "clip_norm")
    }
    parts["scaling"] = {key: recipe["scaling"][key] for key in ("num_workers", "strategy", "use_gpu")}
    return parts


def _cache_dir() -> Path:
    return cache_root() / "plans"


def _known(file: Path) -> dict[str, Any] | None:
    answer: dict[str, Any] | None = read_json(file)
    if answer and answer.get("config_note") and answer.get("hub") != circumstances():
        return None  # perhaps the model itself can be had by now
    return answer

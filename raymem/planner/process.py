"""Planning in a process of its own, with a memory of plans that were made before."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import raymem
from raymem import errors
from raymem.errors import PlanError
from raymem.memory.devices import gpu_named
from raymem.planner.values import Plan
from raymem.training.recipe import Recipe
from raymem.training.recipe_io import MODELS, packaged_recipe, read_yaml

TIMEOUT_S = 600.0
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_READ = ("memory", "planner", "methods", "linalg", "training")
"""Rooms whose code decides what a plan says."""


def plan_recipe(recipe: Recipe, *, gpu: str | None = None, timeout_s: float = TIMEOUT_S) -> Plan:
    """Predict the memory of one worker of a recipe. No weights are read, and no GPU is touched.

    Args:
        gpu: name in :data:`raymem.memory.devices.GPUS`; the recipe is then planned for GPUs whatever it says.
        timeout_s: for all of it.

    Raises:
        RaymemError: the recipe does not go with its model, the model's config cannot be had, an unknown GPU.
        PlanError: planning takes too long.
    """
    plan = plan_many([recipe], gpu=gpu, timeout_s=timeout_s)[0]
    if isinstance(plan, Exception):
        raise plan
    return plan


def plan_many(
    recipes: Sequence[Recipe], *, gpu: str | None = None, timeout_s: float = TIMEOUT_S
) -> list[Plan | Exception]:
    """Plans of several recipes from one process; of a recipe that cannot be planned its error.

    Raises:
        BudgetError: unknown GPU.
        PlanError: planning takes too long.
    """
    if gpu is not None:
        gpu_named(gpu)
    jobs = [{"recipe": _plannable(recipe, gpu).to_dict(), "gpu": gpu, "problem": None} for recipe in recipes]
    files = [_cache_dir() / f"{_key(job)}.json" for job in jobs]
    answers = [_known(file) for file in files]
    missing = [index for index, found in enumerate(answers) if found is None]
    if missing:
        for index, found in zip(missing, _ask([jobs[i] for i in missing], timeout_s), strict=True):
            answers[index] = found
            if "plan" in found:
                _remember(files[index], found)
    return [_result(found) for found in answers if found is not None]


def known_plan(recipe: Recipe) -> Plan | None:
    """The plan of a recipe, if it was made before."""
    found = _known(_cache_dir() / f"{_key({'recipe': _plannable(recipe, None).to_dict(), 'gpu': None})}.json")
    return None if found is None else Plan(**found["plan"])


def _plannable(recipe: Recipe, gpu: str | None) -> Recipe:
    """With the demo models' config, and for GPUs if one is named."""
    if recipe.model.name in MODELS:
        config = read_yaml(packaged_recipe(MODELS[recipe.model.name]))["model"]["config"]
        model = recipe.model.model_copy(update={"name": None, "config": config, "tokenizer": "demo"})
        recipe = recipe.model_copy(update={"model": model})
    if gpu is not None and not recipe.scaling.use_gpu:
        recipe = recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update={"use_gpu": True})})
    return recipe


def _ask(jobs: list[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
    """Answers of a fresh process; where it dies over a job, a rough plan for that one and another process."""
    answers: list[dict[str, Any]] = []
    jobs = [dict(job) for job in jobs]
    while len(answers) < len(jobs):
        waiting = jobs[len(answers) :]
        got, status = _run_child(waiting, timeout_s)
        answers += got
        if len(got) < len(waiting):
            if waiting[len(got)]["problem"]:
                raise PlanError(f"planning ended with status {status} even without a trace; please report the recipe")
            ended = signal.Signals(-status).name if status < 0 else f"status {status}"
            waiting[len(got)]["problem"] = f"the model's code ended the planning process ({ended})"
    return answers


def _run_child(jobs: list[dict[str, Any]], timeout_s: float) -> tuple[list[dict[str, Any]], int]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "KINETO_LOG_LEVEL": "6", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(raymem.__file__).parents[1]), *sys.path[1:]])
    with tempfile.TemporaryDirectory(prefix="raymem-plan-") as folder:
        given, out = Path(folder) / "jobs.json", Path(folder) / "plans.json"
        given.write_text(json.dumps(jobs))
        command = [sys.executable, "-m", "raymem.planner.child", str(given), str(out)]
        try:
            done = subprocess.run(  # noqa: S603 - our own module
                command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise PlanError(
                f"planning took more than {timeout_s:.0f} s and was stopped; plan a recipe with fewer layers or "
                "less accumulation, or train without a budget"
            ) from None
        try:
            return json.loads(out.read_text()), done.returncode
        except (OSError, ValueError):
            if done.returncode > 0:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise PlanError(f"the planning process failed: {last}") from None
            return [], done.returncode


def _result(answer: dict[str, Any]) -> Plan | Exception:
    if "plan" in answer:
        return Plan(**answer["plan"])
    kind, text = answer["error"]
    return getattr(errors, kind, PlanError)(text)


def _key(job: dict[str, Any]) -> str:
    """Digest of everything that a plan depends on."""
    recipe = job["recipe"]
    parts = {section: recipe[section] for section in ("model", "base", "adapter", "activations", "optimizer")}
    parts["data"] = {key: recipe["data"][key] for key in ("sequence_length", "packing")}
    parts["evaluated"] = recipe["data"]["eval"] is not None
    parts["train"] = {
        key: recipe["train"][key] for key in ("global_batch", "micro_batch", "precision", "master", "clip_norm")
    }
    parts["scaling"] = {key: recipe["scaling"][key] for key in ("num_workers", "strategy", "use_gpu")}
    config = Path(recipe["model"]["name"] or "") / "config.json"
    if recipe["model"]["name"] is not None and config.is_file():
        parts["config"] = config.read_text()
    facts = [parts, job["gpu"], {name: _version(name) for name in _LIBRARIES}, _source_digest()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _source_digest() -> str:
    """Of raymem's own code: a development version changes without a number."""
    content = hashlib.sha256()
    package = Path(raymem.__file__).parent
    for room in _READ:
        for path in sorted((package / room).rglob("*.py")):
            content.update(path.read_bytes())
    return content.hexdigest()


def cache_root() -> Path:
    """Where plans and calibration are kept: RAYMEM_CACHE, or raymem's folder in the user's cache directory."""
    base = os.environ.get("RAYMEM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "raymem")
    return Path(base).expanduser()


def _cache_dir() -> Path:
    return cache_root() / "plans"


def _known(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def _remember(file: Path, answer: dict[str, Any]) -> None:
    """A plan that cannot be kept is made again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(answer))
        part.replace(file)
    except OSError:
        return

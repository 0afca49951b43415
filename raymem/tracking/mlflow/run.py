"""The start of a run in MLflow: everything that can fail for the user's sake fails here, before training."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raymem
from raymem.errors import TrackingError
from raymem.recipe.axes import MEMORY_AXES
from raymem.recipe.yaml_text import write
from raymem.storage.errors import explain, system_error
from raymem.storage.folders import make_shared
from raymem.storage.storage import Storage
from raymem.tracking.mlflow.client import brief, connect, limits
from raymem.tracking.mlflow.datasets import log_datasets
from raymem.tracking.mlflow.uri import ARTIFACTS, TrackingAddress, database_file, resolve_tracking
from raymem.tracking.tracker import RunStart

RUN_TAG = "raymem.run_id"
POINT_TAG = "raymem.point."
"""Begins the tags of a trial with what its sweep has chosen, which are the columns to compare trials by."""
_PARAMS_PER_BATCH = 100
_MAX_PARAM_LENGTH = 6000
_VERSIONS = ("torch", "ray", "transformers", "peft")
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable for the driver of a job."""
_EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
"""Without this tag MLflow asks what an experiment is for, or opens it as one of prompts and agents."""


def run_key(storage_path: str, run_name: str) -> str:
    """Identity of a raymem run over restarts: its name on its storage."""
    return hashlib.sha256(f"{storage_path}\n{run_name}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Opened:
    """A run at its server."""

    uri: str
    run_id: str
    group_run_id: str | None
    """The run of the pipeline that it is a stage of."""


def start_run(start: RunStart) -> Opened:
    """Create the MLflow run of a recipe, or continue the one of the same name and storage.

    Raises:
        TrackingError: see :meth:`raymem.tracking.mlflow.tracker.MlflowTracker.start`.
    """
    recipe, tracking = start.recipe, start.recipe["tracking"]
    if tracking["register_as"]:
        _check_alias(tracking["alias"])
    name = recipe["name"]
    address = resolve_tracking(tracking["uri"], start.storage_path)
    with explained(address), limits(timeout_s=10, retries=1):
        client = connect(address.uri)
        _share_artifacts(start.storage_path, address)
        key = run_key(start.storage_path, name)
        origin, point = provenance(start.source), dict(flatten(start.point)) if start.point else {}
        group_run_id = _open_group(client, address, start, origin)
        parent = start.parent_run_id or group_run_id
        tags = {
            **origin,
            "raymem.device": start.device,
            **({"mlflow.parentRunId": parent} if parent else {}),
            **{f"{POINT_TAG}{path}": value for path, value in point.items()},
            **start.tags,
        }
        note = "; ".join(f"{path}: {value}" for path, value in point.items()) or _note(recipe)
        facts = RunFacts(tracking["experiment"], name, tags, dict(flatten(recipe)), note)
        run_id = open_run(client, address, facts, key, resume=start.resume)
        log_datasets(client, run_id, start.datasets)
        text = write(dict(recipe), allow_unicode=True)
        client.log_text(run_id, text, "recipe.yaml")
    return Opened(address.uri, run_id, group_run_id)


def _open_group(client: Any, address: TrackingAddress, start: RunStart, tags: Mapping[str, str]) -> str | None:
    """Create or continue the run of a pipeline, whose children are its stages."""
    if start.group is None:
        return None
    note = "raymem, stages of LoRAM: alignment of the pruned model, and training on it"
    facts = RunFacts(start.recipe["tracking"]["experiment"], start.group, tags, {}, note)
    return open_run(client, address, facts, run_key(start.storage_path, f"{start.group}/stages"), resume=True)


@dataclass(frozen=True)
class RunFacts:
    """What a run has from its beginning."""

    experiment: str
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    note: str
    """Description that a new run begins with; later it is the user's."""


def open_run(client: Any, address: TrackingAddress, facts: RunFacts, key: str, *, resume: bool) -> str:
    """Create a run, or continue the one of the same key; returns its id.

    Raises:
        TrackingError: the experiment is deleted, or keeps its artifacts elsewhere.
    """
    experiment_id = _experiment(client, facts.experiment, address)
    run = _previous(client, experiment_id, key) if resume else None
    tags = {**facts.tags, RUN_TAG: key}
    if run is None:
        note = {"mlflow.note.content": facts.note}
        run = client.create_run(experiment_id, run_name=facts.name, tags={**note, **tags})
    else:
        client.update_run(run.info.run_id, status="RUNNING")
        log_properties(client, run.info.run_id, tags=tags)
    # Parameters of a run are immutable: a resumed run only gains those that it lacks.
    missing = {name: value for name, value in facts.params.items() if name not in run.data.params}
    log_properties(client, run.info.run_id, params=missing)
    return str(run.info.run_id)


def _share_artifacts(storage_path: str, address: TrackingAddress) -> None:
    """Make the directory of all runs' artifacts in a storage, for all of its users."""
    storage = Storage.open(storage_path)
    if storage.is_local and address.artifact_location is not None:
        make_shared(Path(storage.join(ARTIFACTS)))


def check_server(tracking: Mapping[str, Any], storage_path: str) -> str:
    """Ask the tracking server for one experiment; returns words for a report. Files are not created.

    Raises:
        TrackingError: as :func:`start_run`.
    """
    if tracking["register_as"]:
        _check_alias(tracking["alias"])
    address = resolve_tracking(tracking["uri"], storage_path)
    if (path := database_file(address.uri)) is not None:
        return f"{path} " + ("exists" if path.exists() else "will be created")
    check_answers(address)
    return f"{address.uri} answers"


def check_answers(address: TrackingAddress) -> None:
    """Ask a server for one experiment; nothing is created. Raises TrackingError."""
    with explained(address), limits(timeout_s=5, retries=0):
        connect(address.uri).search_experiments(max_results=1)


@contextlib.contextmanager
def explained(address: TrackingAddress) -> Iterator[None]:
    """Turn whatever mlflow raises inside into a TrackingError with a cure."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:  # mlflow, requests, sqlalchemy and boto each have their own
        raise _explain(error, address) from error


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Return nested mappings as ``("train.steps", "30")``, in names and lengths that MLflow takes; lists as JSON."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    yield accepted_name(prefix), text[:_MAX_PARAM_LENGTH]


def accepted_name(name: str) -> str:
    """Return a name of a metric or parameter as MLflow takes it, which refuses ``top@5``, and ``/a`` and ``..``."""
    plain = re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)[:250]
    parts = [part if part.strip(".") else "_" * len(part) for part in plain.split("/") if part]
    return "/".join(parts) or "_"


def _experiment(client: Any, name: str, address: TrackingAddress) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            location, tags = address.artifact_location, dict([_EXPERIMENT_KIND])
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another run made it in between
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"{address.spelling.experiment}: {name!r} was deleted at {address.uri}; restore it "
            f"(mlflow experiments restore -x {experiment.experiment_id}) or choose another name"
        )
    location = str(experiment.artifact_location).removeprefix("file://")
    if address.embedded and location != str(address.artifact_location).removeprefix("file://"):
        raise TrackingError(
            f"{address.spelling.experiment}: {name!r} of {address.uri} keeps its artifacts in {location}, outside of "
            f"{address.spelling.storage}; this storage was moved or copied: move it back, or choose another "
            f"{address.spelling.experiment}"
        )
    _set_kind(client, experiment)
    return str(experiment.experiment_id)


def _previous(client: Any, experiment_id: str, key: str) -> Any:
    runs = client.search_runs(
        [experiment_id], f"tags.`{RUN_TAG}` = '{key}'", max_results=1, order_by=["attributes.start_time DESC"]
    )
    return runs[0] if runs else None


def log_properties(client: Any, run_id: str, *, params: Mapping[str, str] = {}, tags: Mapping[str, str] = {}) -> None:
    """Add parameters and tags to a run."""
    from mlflow.entities import Param, RunTag

    if tags:
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    items = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(items), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=items[start : start + _PARAMS_PER_BATCH])


def provenance(source: Path | None) -> dict[str, str]:
    """Return what started a run, and with which versions.

    Args:
        source: the recipe's file; without it the working directory stands for its own.
    """
    tags = {
        "mlflow.source.name": "raymem" if source is None else source.name,
        "mlflow.source.type": "JOB" if _RAY_JOB in os.environ else "LOCAL",
        "raymem.version": raymem.__version__,
    }
    with contextlib.suppress(KeyError, OSError, ImportError):  # in a container this user may have no name
        tags["mlflow.user"] = getpass.getuser()
    for package in _VERSIONS:
        tags[f"raymem.{package}"] = importlib.metadata.version(package)
    if git := shutil.which("git"):
        where = Path.cwd() if source is None else source.resolve().parent
        command = [git, "-C", str(where), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)  # noqa: S603
            if done.returncode == 0:
                tags["mlflow.source.git.commit"] = done.stdout.strip()
    return tags


def _note(recipe: Mapping[str, Any]) -> str:
    """Return the description of a run that MLflow's page of it shows."""
    model = recipe["model"].get("name") or "random weights"
    kinds = [f"{axis}: {recipe[axis]['kind']}" for axis in MEMORY_AXES if axis in recipe]
    return "; ".join([f"raymem, fine-tuning of {model}", *kinds])


def _set_kind(client: Any, experiment: Any) -> None:
    """Have MLflow's pages show an experiment as one of training, unless its user has chosen another kind."""
    if _EXPERIMENT_KIND[0] not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, *_EXPERIMENT_KIND)


def _check_alias(alias: str) -> None:
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise TrackingError(
            f"tracking.alias: {alias!r} is reserved by MLflow (models:/name/latest and /1 already work); "
            "choose another, for example candidate"
        )
    if not re.fullmatch(r"[\w\-]{1,255}", alias, flags=re.ASCII):
        raise TrackingError(f"tracking.alias: {alias!r} may hold letters, digits, _ and - only; choose another")


def _explain(error: Exception, address: TrackingAddress) -> TrackingError:
    spelling = address.spelling
    if system_error(error) is not None and (database := database_file(address.uri)) is not None:
        cure = f"mend that, set {spelling.uri}, or {spelling.without}"
        return TrackingError(str(explain(error, "write", str(database), where="tracking", cure=cure)))
    text = brief(error)
    if "error code 401" in text or "error code 403" in text or "PERMISSION_DENIED" in text:
        cure = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
    elif "failed with exception" in text or "timeout" in text:
        cure = f"start it, correct {spelling.uri}, or {spelling.without}"
    else:
        cure = f"correct {spelling.uri} or the rights on its artifacts, or {spelling.without}"
    return TrackingError(f"tracking at {address.uri} cannot be used: {text}; {cure}")

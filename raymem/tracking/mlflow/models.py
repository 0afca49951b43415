"""Logs a trained adapter as a model of MLflow, which answers prompts wherever it is loaded, and registers results."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymem.storage.checksums import CHECKSUMS
from raymem.storage.unfinished import temporary

_DIGEST = "raymem.digest"
_BASE_TAGS = (("raymem.base_model", "model.name"), ("raymem.base_revision", "model.revision"))
"""Tags of models and their versions, and the parameters of the run that they are taken from."""
_VERSIONS_TAG = "mlflow.modelVersions"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
_PARAMS = ("model.", "base.", "adapter.")
"""Beginnings of the names of the run's parameters that a model has too."""


def is_adapter(directory: Path) -> bool:
    """Say whether a result is an adapter, which names its base, rather than a whole model."""
    return any(directory.glob("*.safetensors")) and not (directory / "config.json").is_file()


def log_adapter(client: Any, run_id: str, directory: Path) -> Any:
    """Log an adapter as a model of a run, with the run's last metrics; returns MLflow's ``LoggedModel``.

    An adapter that the run has logged already is not logged again.
    """
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    digest = _digest(directory)
    model = _logged_before(client, run, digest)
    if model is None:
        params = {key: value for key, value in run.data.params.items() if key.startswith(_PARAMS) and value != "null"}
        name = re.sub(r"[^\w-]", "-", run.info.run_name or "adapter", flags=re.ASCII)
        tags = {_DIGEST: digest, **base_tags(run.data.params)}
        model = client.create_logged_model(
            run.info.experiment_id, name, source_run_id=run_id, tags=tags, params=params, model_type="adapter"
        )
    model_id = str(model.model_id)
    if str(model.status) == "READY":
        return model
    with temporary("logged-model") as folder:
        local = Path(folder, "model")
        _write(local, directory, model_id)
        client.log_model_artifacts(model_id, str(local))
    _link_metrics(client, run_id, model_id)
    step = max((metric.step for metric in run.data.to_proto().metrics), default=0)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
    return client.finalize_logged_model(model_id, "READY")


def register(client: Any, run_id: str, name: str, result: Any, alias: str | None) -> str:
    """Register a result as a version of a model, under an alias; returns ``name/version``.

    A version that this run has registered of the same result is updated, not doubled.

    Args:
        result: a ``LoggedModel``, or the URI of an artifact.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = base_tags(client.get_run(run_id).data.params)
    sources = [result] if isinstance(result, str) else [f"models:/{result.model_id}", result.artifact_location]
    mine = [
        version
        for version in client.search_model_versions(f"run_id = '{run_id}'")
        if version.name == name and version.source in sources
    ]
    if mine:
        version = max(mine, key=lambda version: int(version.version)).version
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
    else:
        model_id = None if isinstance(result, str) else result.model_id
        version = _new_version(client, name, sources, run_id=run_id, tags=tags, model_id=model_id)
        if model_id is not None:
            _note_version(client, model_id, name, version)
    if alias:
        client.set_registered_model_alias(name, alias, version)
    return f"{name}/{version}"


def _new_version(client: Any, name: str, sources: Sequence[str], **facts: Any) -> str:
    """Create a version of the first source that the registry takes.

    A registry in a database looks for ``models:/<id>`` at the server that its process has named last, which may be
    another one than its own.
    """
    from mlflow.exceptions import MlflowException

    *better, last = sources
    for source in better:
        with contextlib.suppress(MlflowException):
            return str(client.create_model_version(name, source, await_creation_for=0, **facts).version)
    return str(client.create_model_version(name, last, await_creation_for=0, **facts).version)


def _note_version(client: Any, model_id: str, name: str, version: str) -> None:
    """Have the page of a logged model name the version that it is registered as; some releases do so by themselves."""
    noted = json.loads(client.get_logged_model(model_id).tags.get(_VERSIONS_TAG, "[]"))
    if not any(one.get("name") == name and str(one.get("version")) == version for one in noted):
        noted.append({"name": name, "version": int(version)})
        client.set_logged_model_tags(model_id, {_VERSIONS_TAG: json.dumps(noted)})


def base_tags(params: Mapping[str, str]) -> dict[str, str]:
    """Return tags that name the base model, out of a run's parameters."""
    return {tag: params[param] for tag, param in _BASE_TAGS if params.get(param, "null") != "null"}


def _digest(directory: Path) -> str:
    """Return what changes whenever a file of a result does: the digest of its list of digests, or of its files."""
    digest = hashlib.sha256()
    listed = directory / CHECKSUMS
    for path in [listed] if listed.is_file() else sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()[:32]


def _logged_before(client: Any, run: Any, digest: str) -> Any:
    """Return the model that a run has logged, or begun to log, of the same files; None if there is none."""
    models = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}' AND tags.`{_DIGEST}` = '{digest}'"
    )
    return models[0] if models else None


def _write(local: Path, directory: Path, model_id: str) -> None:
    """Write an MLflow model: the adapter, the code that loads it (no pickle), and what must be installed."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec("string")])
    params = ParamSchema([ParamSpec("max_new_tokens", "long", 128), ParamSpec("temperature", "double", 0.0)])
    requirements = [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in _PACKAGES]
    mlflow.pyfunc.save_model(
        str(local),
        mlflow_model=Model(model_id=model_id, model_uuid=model_id),
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"adapter": str(directory)},
        pip_requirements=requirements,
    )
    written = Model.load(str(local))  # with a signature of the type hints, which know of no parameters
    written.signature = ModelSignature(inputs=text, outputs=text, params=params)
    written.save(str(local / "MLmodel"))


def _only_dataset(run: Any, context: str) -> dict[str, str]:
    """Return name and digest of a run's data set for training or evaluation, if there is one and no other."""
    entries = run.inputs.dataset_inputs if run.inputs else []
    found = [entry.dataset for entry in entries if context in (tag.value for tag in entry.tags)]
    return {"dataset_name": found[0].name, "dataset_digest": found[0].digest} if len(found) == 1 else {}


def _link_metrics(client: Any, run_id: str, model_id: str) -> None:
    """Give a model the last values of its run's metrics and, of one data set, what they were measured on."""
    from mlflow.entities import Metric

    run = client.get_run(run_id)
    training, evaluation = (_only_dataset(run, context) for context in ("training", "evaluation"))
    linked = []
    for metric in run.data.to_proto().metrics:
        dataset = evaluation if metric.key.startswith("eval_") else training if metric.key == "loss" else {}
        linked.append(
            Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id=model_id, run_id=run_id, **dataset)
        )
    for start in range(0, len(linked), 1000):
        client.log_batch(run_id, metrics=linked[start : start + 1000])

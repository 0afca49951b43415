"""Reading what ``kubectl kustomize`` makes of ``k8s/``, and the schemas that it is held against."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
KUBERNETES = "1.32"
CRDS = "RAYMEM_KUBERAY_CRDS"

Document = dict[str, Any]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")


@functools.cache
def _built(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path) -> list[Document]:
    """Documents of a kustomization; fresh ones, which a test may change."""
    return documents(_built(folder))


def documents(text: str) -> list[Document]:
    return list(yaml.load_all(text, yaml.CSafeLoader))


def of_kind(found: list[Document], kind: str) -> list[Document]:
    return [document for document in found if document["kind"] == kind]


def cluster_specs(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """(where, spec) of every Ray cluster, alone or in a job."""
    for document in found:
        spec = document.get("spec", {})
        where = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] == "RayCluster":
            yield where, spec
        elif document["kind"] in ("RayJob", "RayCronJob"):
            yield where, spec.get("jobTemplate", spec)["rayClusterSpec"]


def job_specs(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """(where, spec) of every RayJob, also of those that a RayCronJob will make."""
    for document in of_kind(found, "RayJob") + of_kind(found, "RayCronJob"):
        spec = document["spec"]
        yield f"{document['kind']}/{document['metadata']['name']}", spec.get("jobTemplate", spec)


def pod_templates(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """(where, template) of every Pod that will come of the documents."""
    for where, cluster in cluster_specs(found):
        yield f"{where} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{where} {group['groupName']}", group["template"]
    for where, job in job_specs(found):
        yield f"{where} submitter", job["submitterPodTemplate"]
    for document in of_kind(found, "Deployment"):
        yield f"Deployment/{document['metadata']['name']}", document["spec"]["template"]


def containers(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """(where, container) of every container, the autoscaler's included."""
    for where, template in pod_templates(found):
        for container in template["spec"]["containers"] + template["spec"].get("initContainers", []):
            yield f"{where} {container['name']}", container
    for where, cluster in cluster_specs(found):
        if "autoscalerOptions" in cluster:
            yield f"{where} autoscaler", cluster["autoscalerOptions"]


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number."""
    text = str(text)
    for suffix, factor in {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


@functools.cache
def crd_schema(kind: str) -> Document:
    """JSON schema of a KubeRay kind in which an unknown field is an error."""
    folder = os.environ.get(CRDS)
    if not folder:
        pytest.skip(f"{CRDS} names no folder with KubeRay's CRDs (ray.io_rayjobs.yaml, ...)")
    text = (Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(node: Any) -> Any:
    """OpenAPI of a CRD -> JSON schema: what the API server would drop without a word is refused."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: _strict(value) for key, value in node.items() if not key.startswith("x-kubernetes")}
    listed = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if listed and not node.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def validate(document: Document) -> None:
    """Hold a document against its schema, strictly. Raises AssertionError naming it."""
    _validate(json.dumps(document, sort_keys=True))


@functools.cache
def _validate(text: str) -> None:
    """Overlays share most of their documents, and a schema takes a while."""
    import jsonschema
    import kubernetes_validate

    document = json.loads(text)
    where = f"{document['kind']}/{document['metadata']['name']}"
    try:
        if document["apiVersion"] == "ray.io/v1":
            jsonschema.Draft202012Validator(crd_schema(document["kind"])).validate(document)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        raise AssertionError(f"{where}: {error.json_path}: {error.message[:300]}") from None

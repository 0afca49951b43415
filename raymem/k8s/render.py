"""Renders a recipe as Kubernetes manifests: an overlay of ``k8s/`` with image, resources, entrypoint and labels.

Nothing is applied, and no cluster is asked: the manifests are made by ``kubectl kustomize`` from the files that ship
with raymem and from patches that are written here, so that the result is what editing the overlay would give.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raymem.cluster.jobs.entrypoint import entrypoint_of_attempts, usual_command
from raymem.errors import ClusterError, RaymemError
from raymem.k8s import checks, kustomize
from raymem.k8s.overlays import GPU_PRODUCTS, OVERLAYS, Overlay, gpu_of, overlay_named
from raymem.memory.devices import GPUS, MIB
from raymem.recipe.load import load_recipe
from raymem.recipe.schema import Recipe
from raymem.runs.plan import plan_run

RECIPE_FILE = "/etc/raymem/recipe.yaml"
MARGIN = 1.1
"""The request is the figure of one worker times this, for the allocator's fragmentation ..."""
RUNTIME_BYTES = 4 << 30
"""... plus this: Ray's daemons, Python and torch (2 GiB), and shared memory, which counts as the Pod's (2 GiB)."""

_GIB = 1 << 30
_RUN_LABEL = "raymem.io/run"


@dataclass(frozen=True)
class Rendered:
    """Manifests, and the decisions behind them."""

    manifests: str
    kind: str
    """``RayJob``, ``RayCluster`` or ``RayCronJob``."""
    name: str
    figure_bytes: int
    """The memory of one worker, before the margin."""
    request_bytes: int
    """The memory that each worker's Pod asks for."""


def command_of(overlay: str, command: str | None, recipe: Recipe) -> str | None:
    """Return the command of raymem that an overlay will run; None for one that runs no job.

    Raises:
        ClusterError: an unknown overlay, or a command for one that runs no job.
    """
    shape = overlay_named(overlay)
    if shape.job is None:
        if command is not None:
            raise ClusterError(
                f"--command {command}: overlay {overlay} is a cluster that stays and runs no job of its own; leave it "
                "out, and send jobs with raymem submit"
            )
        return None
    return command or shape.command or usual_command(recipe)


def render(
    recipe_path: str | Path,
    *,
    overlay: str,
    overrides: Sequence[str] = (),
    workers: str | None = None,
    gpu: str | None = None,
    image: str | None = None,
    name: str | None = None,
    namespace: str = "raymem",
    storage_class: str | None = None,
    command: str | None = None,
    arguments: Sequence[str] = (),
    cpus: int | None = None,
    worker_memory: str | None = None,
    model_config: Path | None = None,
    node_memory: str | None = None,
    only_job: bool = False,
) -> Rendered:
    """Render manifests that train a recipe with one of the overlays.

    Args:
        overlay: A key of :data:`OVERLAYS`.
        overrides: ``a.b=value``, laid over the recipe.
        workers: ``4``, or ``2-8`` for the elastic overlays; by default the recipe's. Of a sweep, which trials share; of
            a cluster that stays, which it grows to from none.
        gpu: A key of :data:`GPU_PRODUCTS`, or ``A100`` or ``H100``; by default ``H100-80GB`` in the overlays with GPUs.
        image: Image with its tag; by default the overlay's placeholder.
        name: Of the Ray object; by default the recipe's name, with ``-`` where Kubernetes allows neither ``.`` nor
            ``_``; of a cluster that stays the overlay's.
        namespace: Of everything that is rendered.
        storage_class: Of the shared volume; by default the one in ``k8s/base/storage.yaml``.
        command: One of a command of :mod:`raymem.cluster.jobs.entrypoint`; by default :func:`command_of`.
        arguments: What else the command takes; the command line checks them.
        cpus: CPU cores of one worker.
        worker_memory: Memory that one worker needs (``40Gi``), where it cannot be worked out here.
        model_config: ``config.json`` of the model, or a folder with it, where this machine cannot fetch it.
        node_memory: Memory of the nodes (``64Gi``), against which the request is checked.
        only_job: Leave out what the overlay brings besides the job (storage, tracking, network policies).

    Raises:
        RecipeError: the recipe with its overrides is not valid.
        ClusterError: an unknown overlay or GPU, a bad name, a path that Pods cannot see, or more memory than there is.
    """
    shape = overlay_named(overlay)
    kind = gpu_of(gpu, overlay)
    command = command_of(overlay, command, load_recipe(recipe_path, overrides))
    line = None if command is None else entrypoint_of_attempts(command, RECIPE_FILE, arguments)
    recipe, counts = _scaled(
        recipe_path, overrides, workers, shape, overlay, cpus, gpu=kind is not None, is_sweep=command == "sweep"
    )
    checks.check_namespace(namespace)
    if storage_class is not None:
        checks.check_storage_class(storage_class, recipe)
    if line is None:
        found = name or "raymem-interactive"
        job = checks.object_name(found, recipe, is_cron=False)
    else:
        job = checks.object_name(name, recipe, is_cron=shape.kind == "RayCronJob")
        checks.check_paths(recipe)
    if worker_memory:
        figure = checks.quantity_bytes(worker_memory, "--worker-memory")
    else:
        figure = worker_memory_bytes(recipe, kind, model_config)
    request = memory_request_bytes(figure)
    if kind is not None:
        checks.check_room(figure, GPUS[kind].capacity_bytes, f"a {kind}", "--gpu")
    if node_memory is not None:
        checks.check_room(request, checks.quantity_bytes(node_memory, "--node-memory"), "a node", "--node-memory")
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [f"../overlays/{overlay}"],
        "patches": [
            {
                "target": {"kind": shape.kind},
                "options": {"allowNameChange": True},
                "patch": json.dumps(_patch(shape, job, recipe, counts, kind, line, cpus, request, command)),
            }
        ],
    }
    if storage_class is not None:
        chosen = [{"op": "replace", "path": "/spec/storageClassName", "value": storage_class}]
        shared = {"kind": "PersistentVolumeClaim", "name": "raymem-shared"}
        kustomization["patches"].append({"target": shared, "patch": json.dumps(chosen)})
    if image is not None:
        placeholder = kustomize.overlay_file(overlay)["images"][0]["newName"]
        kustomization["images"] = [{"name": placeholder, **checks.image_parts(image)}]
    # Before the overlay's own, which copy what these change.
    first = (["gpu"] if kind is not None and shape.gpu is None else []) + (
        ["object-store"] if "://" in recipe.storage.path else []
    )
    documents = list(yaml.safe_load_all(kustomize.build(overlay, first, kustomization)))
    if line is not None:  # ahead of the Pods that mount it
        ray_object = next(i for i, document in enumerate(documents) if document["kind"] == shape.kind)
        documents.insert(ray_object, _config_map(job, namespace, recipe))
    if only_job:
        documents = [d for d in documents if d["metadata"]["name"] in (job, f"{job}-recipe")]
    return Rendered(kustomize.to_yaml(*documents), shape.kind, job, figure, request)


def worker_memory_bytes(recipe: Recipe, gpu: str | None, model_config: Path | None = None) -> int:
    """Return the memory that one worker's device must have, by the planner.

    Args:
        model_config: ``config.json`` of the model, or a folder with it; None if the model's name leads to it.

    Raises:
        ClusterError: it cannot be planned on this machine.
    """
    with tempfile.TemporaryDirectory(prefix="raymem-config-") as folder:
        try:
            if model_config is not None:
                file = model_config / "config.json" if model_config.is_dir() else model_config
                shutil.copy(file, Path(folder) / "config.json")
                model = recipe.model.model_copy(update={"name": folder, "revision": None})
                recipe = recipe.model_copy(update={"model": model})
            return plan_run(recipe, gpu=gpu)[1].capacity_bytes
        except OSError as error:
            raise ClusterError(
                f"--model-config {model_config}: {error.strerror}; give the config.json of the model"
            ) from None
        except RaymemError as error:
            raise ClusterError(
                f"the memory of a worker cannot be planned here ({error}); give the model's config.json with "
                "--model-config, or say the memory with --worker-memory, for example 40Gi"
            ) from error


def memory_request_bytes(figure_bytes: int) -> int:
    """Return the memory request of a worker's Pod: the figure with its margin, in whole GiB."""
    return math.ceil((figure_bytes * MARGIN + RUNTIME_BYTES) / _GIB) * _GIB


def _config_map(job: str, namespace: str, recipe: Recipe) -> dict[str, Any]:
    labels = {"app.kubernetes.io/part-of": "raymem", _RUN_LABEL: job}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job}-recipe", "namespace": namespace, "labels": labels},
        "data": {"recipe.yaml": kustomize.to_yaml(recipe.to_dict())},
    }


def _scaled(
    path: str | Path, overrides: Sequence[str], workers: str | None, shape: Overlay, overlay: str, cpus: int | None,
    *, gpu: bool, is_sweep: bool,
) -> tuple[Recipe, tuple[int, int]]:  # fmt: skip
    """Return the recipe as it will run in the cluster, and the smallest and largest number of Pods for its workers."""
    recipe = load_recipe(path, overrides)
    own = recipe.scaling.num_workers
    stays = shape.job is None
    if workers is None:
        least, most = own if isinstance(own, tuple) else (max(own, 1), max(own, 1))
    else:
        bounds = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", workers)
        if not bounds or (bounds[2] and int(bounds[2]) < int(bounds[1])):
            raise ClusterError(f"--workers {workers}: write a number from 1, or min-max such as 2-8")
        least, most = int(bounds[1]), int(bounds[2] or bounds[1])
    if least != most and not shape.elastic:
        elastic = " or ".join(name for name, other in OVERLAYS.items() if other.elastic and other.job is not None)
        raise ClusterError(
            f"--workers {least}-{most}: overlay {overlay} has a fixed number of workers; give one number, or use "
            f"--overlay {elastic}"
        )
    own_share = dict(recipe.scaling.resources_per_worker or {})
    # Said in the recipe, so that exactly one worker goes into a Pod, whatever nodes there are when the driver looks.
    share = {"CPU": 1.0, "GPU": 1.0, **own_share} if gpu else {"CPU": own_share.get("CPU", float(cpus or 2))}
    if cpus is not None and share["CPU"] > cpus:
        raise ClusterError(
            f"--cpus {cpus}: scaling.resources_per_worker gives each worker {share['CPU']:g} CPU; raise one or lower "
            "the other"
        )
    count = str(least) if least == most else f"[{least}, {most}]"
    scaling = [
        *([] if is_sweep else [f"scaling.num_workers={count}"]),  # a trial keeps its own number, beside other trials
        f"scaling.use_gpu={json.dumps(gpu)}",
        f"scaling.resources_per_worker={json.dumps(share)}",
    ]
    recipe = load_recipe(path, [*overrides, *scaling])
    return recipe, (0 if stays and least == most else least, most)


def _patch(
    shape: Overlay,
    job: str,
    recipe: Recipe,
    counts: tuple[int, int],
    kind: str | None,
    line: str | None,
    cpus: int | None,
    request_bytes: int,
    command: str | None,
) -> list[dict[str, Any]]:
    """Return the JSON patch that makes the overlay's Ray object that of the recipe."""
    head, group = f"{shape.cluster}/headGroupSpec/template", f"{shape.cluster}/workerGroupSpecs/0"
    share = recipe.scaling.resources_per_worker or {}
    cores = cpus or max(math.ceil(share["CPU"]), 1 if kind is None else 4)
    amounts = {"cpu": str(cores), "memory": f"{request_bytes // _GIB}Gi"}
    if kind is not None:
        amounts["nvidia.com/gpu"] = str(math.ceil(share["GPU"]))
    values: dict[str, Any] = {
        "/metadata/name": job,
        f"{group}/replicas": counts[0],
        f"{group}/minReplicas": counts[0],
        f"{group}/maxReplicas": counts[1],
        f"{group}/template/spec/containers/0/resources": {"requests": amounts, "limits": amounts},
    }
    if kind is not None:
        values[f"{group}/template/spec/nodeSelector/nvidia.com~1gpu.product"] = GPU_PRODUCTS[kind]
    if kind is not None and command == "sweep":  # so that small trials share a GPU
        advertised = json.dumps({"gpu_memory_mib": GPUS[kind].capacity_bytes // MIB})
        values[f"{group}/rayStartParams/resources"] = json.dumps(advertised)
    if line is not None:
        values[f"{shape.job}/entrypoint"] = line
        for labelled in ("", head, f"{group}/template", f"{shape.job}/submitterPodTemplate"):
            values[f"{labelled}/metadata/labels/{_RUN_LABEL.replace('/', '~1')}"] = job
        values[f"{head}/spec/volumes/-"] = {"name": "recipe", "configMap": {"name": f"{job}-recipe"}}
        mount = {"name": "recipe", "mountPath": str(Path(RECIPE_FILE).parent), "readOnly": True}
        values[f"{head}/spec/containers/0/volumeMounts/-"] = mount
    # To add a member replaces one that is there.
    return [{"op": "add", "path": path, "value": value} for path, value in values.items()]

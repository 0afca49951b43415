"""Renders a recipe as Kubernetes manifests: an overlay of ``k8s/`` with image, resources, entrypoint and labels.

Nothing is applied, and no cluster is asked: the manifests are made by ``kubectl kustomize`` from the files that ship
with raymem and from patches that are written here, so that the result is what editing the overlay would give.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from raymem.cluster.jobs.entrypoint import entrypoint_of_attempts, usual_command
from raymem.errors import ClusterError, RaymemError
from raymem.memory.devices import ALIASES, GPUS
from raymem.recipe.load import MODELS, load_recipe
from raymem.recipe.schema import Recipe
from raymem.runs.plan import plan_run

MAX_NAME = 47
"""KubeRay's limit for the name of a RayJob: it appends 6 characters for the cluster and 10 for that cluster's service,
and Kubernetes allows 63 for the name of a service."""
MOUNT = "/shared"
"""The path of the shared volume in every Pod."""
RECIPE_FILE = "/etc/raymem/recipe.yaml"
MARGIN = 1.1
"""The request is the figure of one worker times this, for the allocator's fragmentation ..."""
RUNTIME_BYTES = 4 << 30
"""... plus this: Ray's daemons, Python and torch (2 GiB), and shared memory, which counts as the Pod's (2 GiB)."""

_GIB = 1 << 30
_JOB = "raymem-finetune"
_WORKERS = "/spec/rayClusterSpec/workerGroupSpecs/0"
_HEAD = "/spec/rayClusterSpec/headGroupSpec/template"


GPU_PRODUCTS = {
    "T4": "Tesla-T4",
    "V100-16GB": "Tesla-V100-SXM2-16GB",
    "V100-32GB": "Tesla-V100-SXM2-32GB",
    "A10G": "NVIDIA-A10G",
    "L4": "NVIDIA-L4",
    "L40S": "NVIDIA-L40S",
    "A100-40GB": "NVIDIA-A100-SXM4-40GB",
    "A100-80GB": "NVIDIA-A100-SXM4-80GB",
    "H100-80GB": "NVIDIA-H100-80GB-HBM3",
    "H200": "NVIDIA-H200",
}
"""Maps a name in :data:`raymem.memory.devices.GPUS` to the value of the node label ``nvidia.com/gpu.product``, which
NVIDIA's feature discovery sets."""


@dataclass(frozen=True)
class Overlay:
    """The workers of an overlay."""

    gpu: bool
    elastic: bool = False


OVERLAYS = {
    "cpu-demo": Overlay(gpu=False),
    "gpu": Overlay(gpu=True),
    "gpu-spot-elastic": Overlay(gpu=True, elastic=True),
    "kueue": Overlay(gpu=True),
}


@dataclass(frozen=True)
class Rendered:
    """Manifests, and the decisions behind them."""

    manifests: str
    name: str
    figure_bytes: int
    """The memory of one worker, before the margin."""
    request_bytes: int
    """The memory that each worker's Pod asks for."""


def render(
    recipe_path: str | Path,
    *,
    overlay: str,
    overrides: Sequence[str] = (),
    workers: str | None = None,
    gpu: str | None = None,
    image: str | None = None,
    name: str | None = None,
    command: str | None = None,
    arguments: Sequence[str] = (),
    cpus: int | None = None,
    worker_memory: str | None = None,
    node_memory: str | None = None,
    only_job: bool = False,
) -> Rendered:
    """Render manifests that train a recipe with one of the overlays.

    Args:
        overlay: A key of :data:`OVERLAYS`.
        overrides: ``a.b=value``, laid over the recipe.
        workers: ``4``, or ``2-8`` for the elastic overlay; by default the recipe's. Of a sweep, which trials share.
        gpu: A key of :data:`GPU_PRODUCTS`, or ``A100`` or ``H100``; by default ``H100-80GB`` in the overlays with GPUs.
        image: Image with its tag; by default the overlay's placeholder.
        name: Of the RayJob; by default the recipe's name, with ``-`` where Kubernetes allows neither ``.`` nor ``_``.
        command: One of a command of :mod:`raymem.cluster.jobs.entrypoint`; by default its ``usual_command``.
        arguments: What else the command takes; the command line checks them.
        cpus: CPU cores of one worker.
        worker_memory: Memory that one worker needs (``40Gi``), where it cannot be worked out here.
        node_memory: Memory of the nodes (``64Gi``), against which the request is checked.
        only_job: Leave out what the overlay brings besides the job (storage, tracking, network policies).

    Raises:
        RecipeError: the recipe with its overrides is not valid.
        ClusterError: an unknown overlay or GPU, a bad name, a path that Pods cannot see, or more memory than there is.
    """
    shape = _one_of(overlay, OVERLAYS, "--overlay")
    kind = _gpu(gpu, shape, overlay)
    command = command or usual_command(load_recipe(recipe_path, overrides))
    line = entrypoint_of_attempts(command, RECIPE_FILE, arguments)
    recipe, counts = _scaled(recipe_path, overrides, workers, shape, overlay, cpus, is_sweep=command == "sweep")
    job = _job_name(name, recipe)
    _check_paths(recipe)
    figure = _quantity(worker_memory, "--worker-memory") if worker_memory else worker_memory_bytes(recipe, kind)
    request = memory_request_bytes(figure)
    if kind is not None:
        _check_room(figure, GPUS[kind].capacity_bytes, f"a {kind}", "--gpu")
    if node_memory is not None:
        _check_room(request, _quantity(node_memory, "--node-memory"), "a node", "--node-memory")
    remote = "://" in recipe.storage.path
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "raymem",
        "resources": [f"../overlays/{overlay}", "recipe.yaml"],
        "components": ["../components/object-store"] if remote else [],
        "patches": [
            {
                "target": {"kind": "RayJob", "name": _JOB},
                "options": {"allowNameChange": True},
                "patch": json.dumps(_patch(job, recipe, counts, kind, line, cpus, request)),
            }
        ],
    }
    if image is not None:
        kustomization["images"] = [{"name": _placeholder(overlay), **_image(image)}]
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job}-recipe", "labels": {"app.kubernetes.io/part-of": "raymem", "raymem.io/run": job}},
        "data": {"recipe.yaml": yaml.safe_dump(recipe.to_dict(), sort_keys=False)},
    }
    text = _kustomize(kustomization, {"recipe.yaml": yaml.safe_dump(config, sort_keys=False)})
    if only_job:
        documents = [d for d in yaml.safe_load_all(text) if d["metadata"]["name"] in (job, f"{job}-recipe")]
        text = yaml.safe_dump_all(documents, sort_keys=False)
    return Rendered(text, job, figure, request)


def worker_memory_bytes(recipe: Recipe, gpu: str | None) -> int:
    """Return the memory that one worker's device must have, by the planner.

    Raises:
        ClusterError: it cannot be planned on this machine.
    """
    try:
        return plan_run(recipe, gpu=gpu)[1].capacity_bytes
    except RaymemError as error:
        raise ClusterError(
            f"the memory of a worker cannot be planned here ({error}); say it with --worker-memory, for example 40Gi"
        ) from error


def memory_request_bytes(figure_bytes: int) -> int:
    """Return the memory request of a worker's Pod: the figure with its margin, in whole GiB."""
    return math.ceil((figure_bytes * MARGIN + RUNTIME_BYTES) / _GIB) * _GIB


def manifests_dir() -> Path:
    """Return the folder ``k8s`` of this installation."""
    installed = Path(str(resources.files("raymem"))) / "manifests"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "k8s"


def _one_of(name: str, table: dict[str, Any], option: str) -> Any:
    if name not in table:
        raise ClusterError(f"{option} {name}: is not one of {', '.join(table)}; choose one of them")
    return table[name]


def _gpu(gpu: str | None, shape: Overlay, overlay: str) -> str | None:
    if not shape.gpu:
        if gpu is not None:
            raise ClusterError(f"--gpu {gpu}: overlay {overlay} has no GPUs; leave it out, or use --overlay gpu")
        return None
    kind = ALIASES.get(gpu or "H100", gpu or "")
    if kind not in GPU_PRODUCTS:
        raise ClusterError(
            f"--gpu {gpu}: is not in the table ({', '.join(GPU_PRODUCTS)}; short: {', '.join(ALIASES)}); choose the "
            "one with the same memory and edit nodeSelector in the result"
        )
    return kind


def _scaled(
    path: str | Path, overrides: Sequence[str], workers: str | None, shape: Overlay, overlay: str, cpus: int | None,
    *, is_sweep: bool,
) -> tuple[Recipe, tuple[int, int]]:  # fmt: skip
    """Return the recipe as it will run in the cluster, and the smallest and largest number of Pods for its workers."""
    recipe = load_recipe(path, overrides)
    own = recipe.scaling.num_workers
    if workers is None:
        least, most = own if isinstance(own, tuple) else (max(own, 1), max(own, 1))
    else:
        bounds = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", workers)
        if not bounds or (bounds[2] and int(bounds[2]) < int(bounds[1])):
            raise ClusterError(f"--workers {workers}: write a number from 1, or min-max such as 2-8")
        least, most = int(bounds[1]), int(bounds[2] or bounds[1])
    if least != most and not shape.elastic:
        raise ClusterError(
            f"--workers {least}-{most}: overlay {overlay} has a fixed number of workers; give one number, or use "
            "--overlay gpu-spot-elastic"
        )
    own_share = dict(recipe.scaling.resources_per_worker or {})
    # Said in the recipe, so that exactly one worker goes into a Pod, whatever nodes there are when the driver looks.
    share = {"CPU": 1.0, "GPU": 1.0, **own_share} if shape.gpu else {"CPU": own_share.get("CPU", float(cpus or 2))}
    if cpus is not None and share["CPU"] > cpus:
        raise ClusterError(
            f"--cpus {cpus}: scaling.resources_per_worker gives each worker {share['CPU']:g} CPU; raise one or lower "
            "the other"
        )
    count = str(least) if least == most else f"[{least}, {most}]"
    scaling = [
        *([] if is_sweep else [f"scaling.num_workers={count}"]),  # a trial keeps its own number, beside other trials
        f"scaling.use_gpu={json.dumps(shape.gpu)}",
        f"scaling.resources_per_worker={json.dumps(share)}",
    ]
    recipe = load_recipe(path, [*overrides, *scaling])
    return recipe, (least, most)


def _job_name(name: str | None, recipe: Recipe) -> str:
    job = name or re.sub(r"[._]", "-", recipe.name.lower())
    where = f"--name {job}" if name else f"name: {recipe.name} gives the RayJob name {job}, which"
    cure = "give another one with --name"
    if len(job) > MAX_NAME:
        raise ClusterError(f"{where} has {len(job)} characters, KubeRay allows {MAX_NAME}; {cure}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job):
        raise ClusterError(
            f"{where} is not a name for Kubernetes (a-z, 0-9 and -, from a letter to a letter or digit); {cure}"
        )
    return job


def _check_paths(recipe: Recipe) -> None:
    """Refuse paths that only this machine sees: the driver and each worker are Pods of their own, on any node."""
    raw = recipe.to_dict()
    storage = raw["storage"]["path"]
    if not _visible(storage):
        raise ClusterError(
            f"storage.path: {storage} is a directory of one machine, and the run has several nodes (the head and its "
            f"workers); set it to the shared volume (--set storage.path={MOUNT}/runs), s3:// or gs://"
        )
    paths = {f"model.{key}": raw["model"][key] for key in ("name", "tokenizer")}
    paths["adapter.init_from"] = raw["adapter"].get("init_from")
    for split in ("train", "eval"):
        paths |= {f"data.{split}[{i}].path": s["path"] for i, s in enumerate(raw["data"][split] or ())}
    for where, path in paths.items():
        if path is not None and path.startswith("/") and not _visible(path):
            raise ClusterError(
                f"{where}: {path} is a path of this machine, which the Pods do not see; copy it to the shared volume "
                f"and give {MOUNT}/..., or give a Hugging Face id"
            )
    demos = {recipe.model.name, recipe.model.tokenizer} & {*MODELS}
    if "://" in storage and demos:
        raise ClusterError(
            f"model: {demos.pop()} is built in the storage path and needs a directory, not {storage}; set "
            f"storage.path={MOUNT}/runs, or give a Hugging Face id"
        )


def _visible(path: str) -> bool:
    return "://" in path or Path(path).is_relative_to(MOUNT)


def _check_room(needed: int, available: int, what: str, option: str) -> None:
    if needed > available:
        raise ClusterError(
            f"{option}: a worker needs {needed / _GIB:.1f} GiB and {what} has {available / _GIB:.1f} GiB; lower "
            "train.micro_batch or data.sequence_length, use activations: checkpoint or loract, base.quantize: nf4, "
            "scaling.strategy: fsdp2 with more workers, or larger machines"
        )


def _quantity(text: str, option: str) -> int:
    """Parse a Kubernetes quantity such as ``64Gi`` into bytes."""
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)(Mi|Gi|Ti|M|G|T)", text)
    if not amount:
        raise ClusterError(f"{option} {text}: is no amount of memory; write for example 64Gi")
    power = {"M": 2, "G": 3, "T": 4}[amount[2][0]]
    return int(float(amount[1]) * (1024 if amount[2].endswith("i") else 1000) ** power)


def _patch(
    job: str,
    recipe: Recipe,
    counts: tuple[int, int],
    kind: str | None,
    line: str,
    cpus: int | None,
    request_bytes: int,
) -> list[dict[str, Any]]:
    """Return the JSON patch that makes the overlay's RayJob that of the recipe."""
    share = recipe.scaling.resources_per_worker or {}
    cores = cpus or max(math.ceil(share["CPU"]), 1 if kind is None else 4)
    amounts = {"cpu": str(cores), "memory": f"{request_bytes // _GIB}Gi"}
    if kind is not None:
        amounts["nvidia.com/gpu"] = str(math.ceil(share["GPU"]))
    labelled = ("", _HEAD, f"{_WORKERS}/template", "/spec/submitterPodTemplate")
    patch: list[dict[str, Any]] = [
        {"op": "add", "path": f"{path}/metadata/labels/raymem.io~1run", "value": job} for path in labelled
    ]
    values: dict[str, Any] = {
        "/metadata/name": job,
        "/spec/entrypoint": line,
        f"{_WORKERS}/replicas": counts[0],
        f"{_WORKERS}/minReplicas": counts[0],
        f"{_WORKERS}/maxReplicas": counts[1],
        f"{_WORKERS}/template/spec/containers/0/resources": {"requests": amounts, "limits": amounts},
    }
    if kind is not None:
        values[f"{_WORKERS}/template/spec/nodeSelector/nvidia.com~1gpu.product"] = GPU_PRODUCTS[kind]
    patch += [{"op": "replace", "path": path, "value": value} for path, value in values.items()]
    volume = {"name": "recipe", "configMap": {"name": f"{job}-recipe"}}
    mount = {"name": "recipe", "mountPath": str(Path(RECIPE_FILE).parent), "readOnly": True}
    patch.append({"op": "add", "path": f"{_HEAD}/spec/volumes/-", "value": volume})
    patch.append({"op": "add", "path": f"{_HEAD}/spec/containers/0/volumeMounts/-", "value": mount})
    return patch


def _placeholder(overlay: str) -> str:
    """Return the name of the image that the overlay itself puts in."""
    raw = yaml.safe_load((manifests_dir() / "overlays" / overlay / "kustomization.yaml").read_text())
    return str(raw["images"][0]["newName"])


def _image(image: str) -> dict[str, str]:
    name, at, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if at:
        return {"newName": repository if colon and "/" not in tag else name, "digest": digest}
    if not colon or "/" in tag or tag == "latest":
        raise ClusterError(
            f"--image {image}: needs a tag that stays (not latest), since every node and every attempt must run the "
            "same; write registry/name:tag or registry/name@sha256:..."
        )
    return {"newName": repository, "newTag": tag}


def _kustomize(kustomization: dict[str, Any], files: dict[str, str]) -> str:
    """Build a kustomization that lies beside a copy of ``k8s/``: kustomize takes bases by relative paths only."""
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if shutil.which(command[0]) is None:
        raise ClusterError(
            "neither kubectl nor kustomize is on the PATH, and one of them puts the manifests together; install "
            "kubectl (https://kubernetes.io/docs/tasks/tools)"
        )
    with tempfile.TemporaryDirectory(prefix="raymem-k8s-") as folder:
        tree = Path(folder) / "k8s"
        shutil.copytree(manifests_dir(), tree)
        (tree / "render").mkdir()
        for name, text in {"kustomization.yaml": yaml.safe_dump(kustomization), **files}.items():
            (tree / "render" / name).write_text(text)
        try:
            done = subprocess.run(  # noqa: S603 - a fixed command on files of our own
                [*command, str(tree / "render")], capture_output=True, text=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"{' '.join(command)} cannot be run: {error}; try it by hand on k8s/overlays") from None
    if done.returncode != 0:
        raise ClusterError(
            f"{' '.join(command)} refused the manifests: {' '.join(done.stderr.split())[:500]}; "
            "use kubectl 1.27 or later"
        )
    return done.stdout

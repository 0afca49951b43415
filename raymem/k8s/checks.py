"""Refuses what Kubernetes would refuse late, or what Pods could not see: names, images, amounts, paths."""

from __future__ import annotations

import re
from pathlib import Path

from raymem.errors import ClusterError
from raymem.recipe.load import MODELS
from raymem.recipe.schema import Recipe

MAX_NAME = 47
"""KubeRay's limit for the name of a RayJob: it appends 6 characters for the cluster and 10 for that cluster's service,
and Kubernetes allows 63 for the name of a service."""
CRON_SUFFIX = 11
"""Characters that are kept free in the name of a RayCronJob for those of its jobs, as Kubernetes does for a CronJob."""
MOUNT = "/shared"
"""The path of the shared volume in every Pod."""

_GIB = 1 << 30
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"


def object_name(name: str | None, recipe: Recipe, *, is_cron: bool) -> str:
    """Return the name of the Ray object: the given one, or the recipe's as Kubernetes takes it.

    Raises:
        ClusterError: Kubernetes or KubeRay would refuse it.
    """
    found = name or re.sub(r"[._]", "-", recipe.name.lower())
    where = f"--name {found}" if name else f"name: {recipe.name} gives the RayJob name {found}, which"
    cure, most = "give another one with --name", MAX_NAME - CRON_SUFFIX if is_cron else MAX_NAME
    if len(found) > most:
        raise ClusterError(f"{where} has {len(found)} characters, KubeRay allows {most}; {cure}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found):
        raise ClusterError(
            f"{where} is not a name for Kubernetes (a-z, 0-9 and -, from a letter to a letter or digit); {cure}"
        )
    return found


def check_namespace(namespace: str) -> None:
    """Raise ClusterError if a namespace cannot have that name."""
    if len(namespace) > 63 or not re.fullmatch(_LABEL, namespace):
        raise ClusterError(
            f"--namespace {namespace}: is not a name for a namespace (up to 63 of a-z, 0-9 and -, from a letter or "
            "digit to a letter or digit); choose another"
        )


def check_storage_class(name: str, recipe: Recipe) -> None:
    """Raise ClusterError if a storage class cannot have that name, or there is no volume that would be of it."""
    if "://" in recipe.storage.path:
        raise ClusterError(
            f"--storage-class {name}: storage.path is {recipe.storage.path}, so that there is no shared volume; leave "
            "it out"
        )
    if len(name) > 253 or not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", name):
        raise ClusterError(
            f"--storage-class {name}: is not a name for a storage class; `kubectl get storageclass` lists yours"
        )


def check_paths(recipe: Recipe) -> None:
    """Refuse paths that only this machine sees: the driver and each worker are Pods of their own, on any node.

    Raises:
        ClusterError: names the first of them.
    """
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


def check_room(needed: int, available: int, what: str, option: str) -> None:
    """Raise ClusterError if a worker needs more bytes than ``what`` has."""
    if needed > available:
        raise ClusterError(
            f"{option}: a worker needs {needed / _GIB:.1f} GiB and {what} has {available / _GIB:.1f} GiB; lower "
            "train.micro_batch or data.sequence_length, use activations: checkpoint or loract, base.quantize: nf4, "
            "scaling.strategy: fsdp2 with more workers, or larger machines"
        )


def quantity_bytes(text: str, option: str) -> int:
    """Parse a Kubernetes quantity such as ``64Gi`` into bytes. Raises ClusterError."""
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)(Mi|Gi|Ti|M|G|T)", text)
    if not amount:
        raise ClusterError(f"{option} {text}: is no amount of memory; write for example 64Gi")
    power = {"M": 2, "G": 3, "T": 4}[amount[2][0]]
    return int(float(amount[1]) * (1024 if amount[2].endswith("i") else 1000) ** power)


def image_parts(image: str) -> dict[str, str]:
    """Return an image as a kustomization names it. Raises ClusterError: its tag may move."""
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


def _visible(path: str) -> bool:
    return "://" in path or Path(path).is_relative_to(MOUNT)

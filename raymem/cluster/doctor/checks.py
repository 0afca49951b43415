"""Finds in one go everything that can be known to fail before a run starts, for ``raymem doctor``.

Only plain :class:`Check` values leave this module; the command line renders them.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

from raymem.cluster.doctor.local import (
    Check,
    check_auth,
    check_devices,
    check_home,
    check_kinds,
    check_model,
    check_storage_here,
    check_versions,
)
from raymem.cluster.jobs.client import TokenRefused, cluster_version, connect_jobs, is_dashboard, knock
from raymem.errors import ClusterError, RaymemError, StorageError
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.storage.unfinished import scratch
from raymem.tracking import check_tracking

__all__ = ["Check", "check_storage_shared", "run_doctor"]

_NODE_TIMEOUT_S = 60.0
_APPEAR_TIMEOUT_S = 5.0
"""A network file system may show a new file to another node only after some seconds."""


def run_doctor(recipe: Recipe | None = None, *, address: str | None = None) -> list[Check]:
    """Make all checks, in the order of a report. Nothing is raised: a failure is a line with its cure.

    Args:
        recipe: Adds its model, storage, tracking and devices; without one only the installation and the cluster are
            looked at.
        address: ``host:port`` of a running cluster (checked from one of its nodes) or its dashboard, ``http://...``;
            by default RAY_ADDRESS and RAY_API_SERVER_ADDRESS.
    """
    wants_gpu = recipe is not None and recipe.scaling.use_gpu
    checks = [*check_versions(), *check_kinds(), *check_devices(wants_gpu), check_home()]
    storage_path = recipe.storage.path if recipe else None
    if storage_path:
        checks += check_storage_here(storage_path)
    if recipe:
        checks += check_model(recipe)
    dashboard = address if address and ("://" in address or is_dashboard(address)) else None
    cluster = address if address and not dashboard else None
    if address is None:
        dashboard, cluster = os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS")
    checks += check_auth(cluster or dashboard)
    refused = False
    if dashboard:
        check, refused = _check_dashboard(dashboard)
        checks.append(check)
    if cluster and refused:  # Ray would retry for 20 s, and blame the network
        detail = f"{cluster}: not tried, its dashboard refused the token"
        checks.append(Check("Ray", False, detail, "first mend what Ray jobs says"))
    elif cluster:
        checks += _check_cluster(cluster, storage_path)
    if not dashboard and not cluster:
        checks.append(Check("Ray", True, "no cluster named by --address or RAY_ADDRESS: a local Ray will be started"))
    if recipe and storage_path:
        try:
            checks.append(Check("tracking", True, check_tracking(recipe.to_dict()["tracking"], storage_path)))
        except RaymemError as error:
            checks.append(_failed("tracking", error))
    return checks


def check_storage_shared(storage_path: str) -> int:
    """Prove that every node of the connected cluster sees the storage path, by passing a file in each direction.

    Returns:
        The number of nodes.

    Raises:
        StorageError: this machine or a node cannot write there, or a node sees another directory of that name.
        ClusterError: a node does not answer, or cannot import raymem.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    storage = Storage.open(storage_path)
    storage.check_writable()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if set(nodes) == {ray.get_runtime_context().get_node_id()}:
        return 1
    token = uuid.uuid4().hex
    with scratch(storage, "check") as folder:
        storage.write_json(f"{folder}/driver", token)
        visit = ray.remote(_visit)
        pending = {
            node: visit.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(storage_path, folder, token, node)
            for node in nodes
        }
        for node, reference in pending.items():
            where = f"node {nodes[node]} ({node[:8]})"
            try:
                problem = _answer(reference, where)
            except ray.exceptions.TaskUnschedulableError:  # it is being drained, or gone: no worker will run there
                continue
            if problem is None and not _appears(storage, f"{folder}/{node}", token):
                problem = "writes there what this machine does not see"
            if problem is not None:
                raise StorageError(
                    f"storage.path: {storage_path} is not one place for all nodes: {where} {problem}; mount the same "
                    "directory on every node (NFS, a ReadWriteMany volume), or use s3:// or gs://"
                )
    return len(nodes)


def _visit(storage_path: str, folder: str, token: str, node: str) -> str | None:
    """Run on a node: read the driver's file and leave one. Returns the problem, if any."""
    try:
        storage = Storage.open(storage_path)
        if not _appears(storage, f"{folder}/driver", token):
            return "does not see what this machine writes there"
        storage.write_json(f"{folder}/{node}", token)
    except StorageError as error:
        return f"says: {error}"
    return None


def _appears(storage: Storage, name: str, token: str) -> bool:
    deadline = time.monotonic() + _APPEAR_TIMEOUT_S
    while not storage.exists(name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return bool(storage.read_json(name) == token)


def _answer(reference: Any, where: str) -> str | None:
    import ray

    try:
        problem: str | None = ray.get(reference, timeout=_NODE_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        raise ClusterError(
            f"{where} did not run a small task within {_NODE_TIMEOUT_S:.0f} s; look at its raylet.log, or remove it"
        ) from None
    except ray.exceptions.TaskUnschedulableError:
        raise
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())[-300:]
        raise ClusterError(
            f"{where} cannot run raymem's tasks: {text}; install the same raymem and packages on every node"
        ) from error
    return problem


def _check_dashboard(address: str) -> tuple[Check, bool]:
    """Return the check, and whether it failed for want of the right token."""
    import ray

    try:
        version = cluster_version(connect_jobs(address))
    except ClusterError as error:
        return _failed("Ray jobs", error), isinstance(error, TokenRefused)
    if version != ray.__version__:
        detail = f"{address} runs Ray {version}, here is {ray.__version__}"
        cure = f"pip install 'ray[default,train,tune]=={version}', or change the cluster"
        return Check("Ray jobs", False, detail, cure), False
    return Check("Ray jobs", True, f"{address} answers, Ray {version}"), False


def _check_cluster(address: str, storage_path: str | None) -> list[Check]:
    import ray

    ours = not ray.is_initialized()
    try:
        if ours:
            if address != "auto":
                knock(address, "RAY_ADDRESS or --address")
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ClusterError as error:
        return [_failed("Ray", error)]
    except Exception as error:  # RuntimeError, ConnectionError, ValueError and Ray's own
        text = " ".join(str(error).split())[:300]
        cure = (
            "export RAY_AUTH_MODE=token with the cluster's token, use its Ray version, and run this on one of its nodes"
        )
        return [Check("Ray", False, f"{address}: {text}", cure)]
    try:
        alive = sum(1 for node in ray.nodes() if node["Alive"])
        have = ray.cluster_resources()
        detail = (
            f"{address}: {alive} nodes, {have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU, Ray {ray.__version__}"
        )
        checks = [Check("Ray", True, detail)]
        if storage_path:
            try:
                count = check_storage_shared(storage_path)
                checks.append(Check("shared storage", True, f"all {count} nodes read and write {storage_path}"))
            except RaymemError as error:
                checks.append(_failed("shared storage", error))
        return checks
    finally:
        if ours:
            ray.shutdown()


def _failed(name: str, error: RaymemError) -> Check:
    problem, _, cure = str(error).rpartition("; ")
    return Check(name, False, problem or cure, cure if problem else "")

"""Joins the cluster of ``RAY_ADDRESS``, or starts a local one that is private to this process."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading

import ray

from raymem.cluster.jobs.client import knock
from raymem.errors import ClusterError
from raymem.recipe.schema import ScalingSection

_QUIET = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_event_stats": "0"}
"""Turns off Ray's collection for its dashboard: on a laptop nobody looks, and it costs cores that train."""


def connect(scaling: ScalingSection) -> None:
    """Make Ray usable in this process; does nothing if it already is.

    With ``RAY_ADDRESS`` set (as in every job that a cluster runs) that cluster is joined. Otherwise a local one is
    started on the loopback interface, with a token that exists in this process's environment only.

    Raises:
        ClusterError: the cluster cannot be reached, or ``scaling`` asks for more than it can ever have.
    """
    # The controller polls its workers; the default of 2 s would also be the least time between two reports.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not ray.is_initialized():
        verbose = logging.getLogger("raymem").isEnabledFor(logging.DEBUG)
        options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
        address = os.environ.get("RAY_ADDRESS")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            if address:
                if address != "auto":
                    knock(address, "RAY_ADDRESS")
                ray.init(address=address, **options)
            else:
                _private_token()
                for name, value in _QUIET.items():
                    os.environ.setdefault(name, value)
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor; nobody takes this node
                ray.init(address="local", include_dashboard=False, **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            where = f"RAY_ADDRESS={address}" if address else "a local cluster"
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ClusterError(
                f"{where}: Ray cannot be reached ({reason}); check the address, that the head is up, and with token "
                "authentication RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH; `raymem doctor` looks at each"
            ) from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm or signal.SIG_DFL)  # Ray's own would exit with status 15
    _check_room(scaling)


def _private_token() -> None:
    """Give the local cluster a token of its own.

    Ray would otherwise write one into the home directory, readable by all, or fail where that is read-only. The mode
    itself is left to Ray, which turns authentication on for local clusters unless RAY_AUTH_MODE says otherwise.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def worker_resources(scaling: ScalingSection) -> dict[str, float]:
    """Return the Ray resources of one worker: as the recipe says, or one GPU, or an equal share of all CPU cores."""
    if scaling.resources_per_worker is not None:
        return dict(scaling.resources_per_worker)
    if scaling.use_gpu:
        return {"GPU": 1.0, "CPU": 1.0}
    most = scaling.num_workers[1] if isinstance(scaling.num_workers, tuple) else scaling.num_workers
    cores = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    # The largest whole share at which that many workers still fit beside each other.
    share = max(1, int(max(cores)))
    while share > 1 and sum(int(c // share) for c in cores) < most:
        share -= 1
    return {"CPU": float(share)}


def _check_room(scaling: ScalingSection) -> None:
    """Refuse at once a request that would wait for resources for ever; an autoscaling cluster may still grow."""
    if os.environ.get("RAY_ADDRESS"):
        return
    needed = worker_resources(scaling)
    least = scaling.num_workers[0] if isinstance(scaling.num_workers, tuple) else scaling.num_workers
    total = ray.cluster_resources()
    for kind, amount in needed.items():
        if amount * least > total.get(kind, 0.0):
            raise ClusterError(
                f"scaling: {least} workers with {amount:g} {kind} each need {amount * least:g}, this machine has "
                f"{total.get(kind, 0.0):g}; lower scaling.num_workers or scaling.resources_per_worker"
                f"{', or set scaling.use_gpu: false' if kind == 'GPU' else ''}"
            )

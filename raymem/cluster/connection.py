"""Joins the cluster of ``RAY_ADDRESS``, or starts a local one that is private to this process."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator

import ray

from raymem.cluster import local
from raymem.cluster.jobs.client import knock
from raymem.errors import ClusterError, RaymemError
from raymem.private_apis import ray_constants, ray_utils, ray_worker
from raymem.recipe.schema import ScalingSection
from raymem.text import cut

log = logging.getLogger(__name__)

_HEAD_CHECK_EVERY_S = 5.0


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
        try:
            with _own_signals():
                if address:
                    if address != "auto":
                        knock(address, "RAY_ADDRESS")
                    ray.init(address=address, **options)
                else:
                    local.start(**options)
        except ClusterError:
            raise
        except Exception as error:  # ConnectionError, RuntimeError, ValueError, Ray's own, and bare ones
            raise ClusterError(_not_connected(error, address)) from None
    _check_room(scaling)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Leave signals to this process while Ray starts.

    Ray would answer SIGTERM in Python, by ending with status 15, and in C++, where abseil's handler for crashes prints
    a stack first. Python's faulthandler, which Ray turns on too, still shows where a process has crashed.
    """
    in_python = ray_utils.set_sigterm_handler
    # The lowest releases have no such handler in C++.
    in_cpp = getattr(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", False)
    ray_utils.set_sigterm_handler = lambda handler: None
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler, ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = in_python, in_cpp


def _not_connected(error: Exception, address: str | None) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if address:
        return (
            f"RAY_ADDRESS={address}: Ray cannot be reached ({reason}); check the address, that the head is up, and "
            "with token authentication RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH; `raymem doctor` looks at each"
        )
    return (
        f"a local cluster: Ray did not start ({reason}); this machine may be too busy or short of memory or disk: try "
        "again when it is less so, or set scaling.num_workers: 0 to train without Ray"
    )


@contextlib.contextmanager
def named_losses(what: str) -> Iterator[None]:
    """Raise a user's error of a task as it is, and say in one sentence what it means that Ray has lost something.

    Raises:
        ClusterError: a process of Ray or a node has gone, for which Ray itself tried no longer.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaymemError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())
        raise ClusterError(
            f"{what} was lost with a process of Ray or its node ({type(error).__name__}: {cut(text, 300)}); what is "
            "done is kept: run the same command again, on a machine with more memory if it ran out"
        ) from error


class HeadCheck:
    """Says that the head of the cluster has gone: a minute later Ray ends this process from within, without an error.

    Args:
        address: of the head, as ``host:port``.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._where = (host.strip("[]"), int(port))
        self._next, self._missed = time.monotonic(), 0

    def look(self) -> None:
        """Try to connect, now and then; a head that is missed for the third time in a row has gone."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _HEAD_CHECK_EVERY_S
        try:
            socket.create_connection(self._where, timeout=_HEAD_CHECK_EVERY_S).close()
            self._missed = 0
        except OSError as error:
            self._missed += 1
            if self._missed == 3:
                log.warning(
                    "Ray's head at %s:%d does not answer (%s); this process ends in a minute if it does not come back. "
                    "The last checkpoint is kept: run the same command again to resume, on a machine with more memory "
                    "if it ran out",
                    *self._where,
                    error,
                )


def session_directory() -> str:
    """Return the directory of Ray's session on this node, which goes with a local cluster."""
    return str(ray_worker.global_worker.node.get_session_dir_path())


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

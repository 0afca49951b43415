"""Starts a Ray cluster of this process's own: on loopback only, with a token, in a directory that goes with it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from raymem.private_apis import ray_constants, ray_utils

log = logging.getLogger(__name__)

_QUIET = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0", "RAY_event_stats": "0"}
"""Turns off Ray's collection for its dashboard: on a laptop nobody looks, and it costs cores that train."""
_ATTEMPTS = 3
"""Tries to start; a limit of Ray's, which has no setting, is too short for a busy machine."""
_PREFIX = "raymem-ray-"
_OWNER = "owner"
"""A file that the owner of a directory holds locked, for as long as its process lives."""
_MARK = "RAYMEM_RAY_DIRECTORY"
"""An environment variable of every process of the cluster, whatever it calls itself."""


def start(**options: Any) -> None:
    """Start the cluster and make this process its driver.

    Args:
        options: of ``ray.init``.
    """
    _private_token()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor; nobody takes this node
    remove_abandoned()
    for attempt in range(_ATTEMPTS):
        directory = _own_directory()
        try:
            with _on_loopback(), _in_sessions_of_their_own(), _environment(_MARK, str(directory)):
                ray.init(address="local", include_dashboard=False, _temp_dir=str(directory), **options)
            return
        except Exception as error:
            ray.shutdown()
            _remove(directory)
            if "timed out during startup" not in str(error) or attempt == _ATTEMPTS - 1:
                raise
            log.warning("Ray did not start within its limit of 30 s, as on a busy machine; it is started again")


def _private_token() -> None:
    """Give the cluster a token that exists in this process's environment only.

    Ray would otherwise write one into the home directory, readable by all, or fail where that is read-only. The mode
    itself is left to Ray, which turns authentication on for local clusters unless RAY_AUTH_MODE says otherwise.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Make Ray's processes listen on 127.0.0.1 only.

    Ray has a switch for this, which is on where it cannot make clusters (macOS, Windows); elsewhere it takes the
    machine's outer address, even if it is told 127.0.0.1, and listens on every interface.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        with _environment(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0"):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _in_sessions_of_their_own() -> Iterator[None]:
    """Keep signals to this command's process group, as from a terminal or ``timeout``, from Ray's processes.

    They would end at once, and whatever this process still asks Ray for on its way out would wait for a minute. Ray
    calls the function that is replaced here in each process before it becomes one of Ray's.
    """
    fate_shared = ray_utils.set_kill_on_parent_death_linux

    def detached() -> None:
        os.setsid()
        fate_shared()

    ray_utils.set_kill_on_parent_death_linux = detached
    try:
        yield
    finally:
        ray_utils.set_kill_on_parent_death_linux = fate_shared


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for the processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


_own: Path | None = None


def _own_directory() -> Path:
    """Return this process's directory for Ray's sockets and logs; it goes when the process ends."""
    global _own
    if _own is None or not _own.is_dir():
        _own = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_base()))
        # Locked before it has its name: whoever finds it must not think that it was left behind.
        descriptor, name = tempfile.mkstemp(dir=_own)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.rename(name, _own / _OWNER)
        atexit.register(_end, _own, os.getpid())
    return _own


def has_own() -> bool:
    """Whether this process has started a cluster, or begun to."""
    return _own is not None


def end_at_once() -> None:
    """Kill the cluster of this process, which has one, and remove its directory; this process must end then."""
    assert _own is not None
    _remove(_own)


def leave_to_caller() -> None:
    """Do nothing about the cluster at exit: whoever calls this ends it."""
    atexit.unregister(_end)
    atexit.unregister(ray.shutdown)


def _end(directory: Path, pid: int) -> None:
    if os.getpid() == pid:  # a fork is not the owner
        ray.shutdown()
        _remove(directory)


def _remove(directory: Path) -> None:
    """End the processes of a cluster that is over, and remove its directory."""
    owner = directory / _OWNER
    for _ in range(20):  # processes that are ending still write
        for pid in _processes_of(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            for path in set(directory.iterdir()) - {owner}:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            owner.unlink()  # last: without it nobody would look at the rest again
            directory.rmdir()
            return
        time.sleep(0.1)


def _base() -> Path:
    """Return where directories are made: paths of sockets may have 107 bytes, and many a TMPDIR is longer."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp"))  # noqa: S108 - mkdtemp makes it ours alone


def remove_abandoned() -> None:
    """Remove what drivers of this user left that were killed: directories, and processes that outlived them."""
    for directory in _base().glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.stat().st_uid != os.geteuid():
                continue
            with (directory / _OWNER).open() as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its owner lives
                _remove(directory)
                log.info("removed %s, which a driver that was killed had left", directory)


def _processes_of(directory: Path) -> Iterator[int]:
    """Find the processes of the cluster that has this directory."""
    mark = os.fsencode(f"{_MARK}={directory}")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in process.joinpath("environ").read_bytes().split(b"\0"):
                yield int(process.name)

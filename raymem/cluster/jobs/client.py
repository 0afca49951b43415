"""Connects to Ray's job server, with failures that say what to do."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from raymem.errors import ClusterError
from raymem.storage.uris import secret_in

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_CONNECT_TIMEOUT_S = 5.0
_AUTH_CURE = (
    "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=<file with the cluster's token, mode 0600> "
    "(the person who started the cluster has it, or `kubectl get secret`)"
)


class TokenRefused(ClusterError):
    """The cluster wants a token, and got none or another one."""


def job_address(address: str | None) -> tuple[str | None, str]:
    """Return the address that counts, and its origin: the argument, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or none."""
    if address:
        return address, "--address"
    for name in _ADDRESS_VARIABLES:
        if value := os.environ.get(name):
            return value, name
    return None, "a cluster on this machine"


def connect_jobs(address: str | None = None) -> Any:
    """Return a ``JobSubmissionClient``.

    Args:
        address: ``http://head:8265``, or ``host:port`` of the cluster's GCS. Unlike in Ray itself it wins over the
            environment.

    Raises:
        ClusterError: nothing answers there, or the token is missing or wrong.
    """
    resolved, source = job_address(address)
    if resolved is not None:
        if resolved.startswith("ray://"):
            raise ClusterError(
                f"{source}: {resolved} is a Ray Client address, which cannot take jobs; "
                "give the dashboard's, http://<head>:8265"
            )
        if resolved != "auto":
            knock(resolved, source)
        if is_dashboard(resolved):
            resolved = f"http://{resolved}"
    where = f"{resolved} (from {source})" if resolved else source
    with _only_this_address(resolved), explained(where):
        return _job_client(resolved)


def cluster_version(client: Any) -> str:
    """Return Ray's version on the cluster. Raises ClusterError."""
    with explained(client.get_address()):
        answer = client._do_request("GET", "/api/version")  # get_version() gives the version of the API instead
        return str(answer.json()["ray_version"])


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn errors of Ray's client into a ClusterError with a cure."""
    from ray import exceptions

    refused = getattr(exceptions, "AuthenticationError", ())  # Ray 2.51 knows no tokens
    try:
        yield
    except ClusterError:
        raise
    except refused as error:
        wrong = "Authentication failed" in str(error)
        raise TokenRefused(
            f"Ray cluster {where} {'refused the token' if wrong else 'wants a token and got none'}; {_AUTH_CURE}"
        ) from error
    except (OSError, exceptions.RayError) as error:
        raise ClusterError(f"no Ray cluster answers: {where}; {_cure(error)}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:300]
        raise ClusterError(f"Ray cluster {where} refused: {text}; check that this is a Ray dashboard") from error


def _cure(error: BaseException) -> str:
    return (
        f"{' '.join(str(error).split())[:200]}; start one (ray start --head), or give its dashboard with "
        "--address http://<head>:8265 or RAY_API_SERVER_ADDRESS"
    )


def knock(address: str, source: str) -> None:
    """Open a TCP connection first: Ray's own requests have no time limit. Raises ClusterError."""
    if found := secret_in(address if "://" in address else f"http://{address}"):
        raise ClusterError(f"{source}: {found} would be logged; take it out of the address and set RAY_AUTH_TOKEN")
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        port = None
    if not parts.hostname or port is None or parts.scheme not in ("", "http", "https"):
        raise ClusterError(f"{source}: {address!r} is no address; write http://<head>:8265")
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address} (from {source}): {_cure(error)}") from error


def is_dashboard(address: str) -> bool:
    """Say whether ``host:port`` speaks HTTP. Ray takes any such address for a GCS, and hangs for 40 s if it is none."""
    if "://" in address or ":" not in address:
        return False
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"http://{address}/api/authentication_mode", timeout=_CONNECT_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


@contextlib.contextmanager
def _only_this_address(address: str | None) -> Iterator[None]:
    """Hide Ray's environment variables while the client is made, since Ray lets them override an explicit argument."""
    saved = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if address and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _job_client(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    # These set their own level to INFO, and tell about defaults, uploads and closed sockets.
    for module in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.ERROR)
    return JobSubmissionClient(address)

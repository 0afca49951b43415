"""A real Ray head with token authentication, on free loopback ports, that ends with the test session."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.helpers.ray_processes import RayHead


def read_authentication_again() -> None:
    """Ray reads its authentication from the environment once per process."""
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    if hasattr(raylet, "AuthenticationTokenLoader"):  # Ray 2.51 knows no tokens
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """The head of this test session."""
    from tests.helpers.ray_processes import running_head

    with running_head() as head:
        yield head


@pytest.fixture
def login(ray_head: RayHead) -> Iterator[Callable[..., None]]:
    """Set Ray's authentication in this process."""
    with pytest.MonkeyPatch.context() as patch:

        def login(mode: str = "token", token_path: Path | None = ray_head.token_path) -> None:
            for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
                patch.delenv(name, raising=False)
            patch.setenv("RAY_AUTH_MODE", mode)
            patch.setenv("HOME", str(ray_head.home))
            if token_path:
                patch.setenv("RAY_AUTH_TOKEN_PATH", str(token_path))
            read_authentication_again()

        yield login
    read_authentication_again()


@pytest.fixture(scope="module")
def cluster(ray_head: RayHead) -> Iterator[RayHead]:
    """This process as a driver of the session's cluster."""
    import ray
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a worker with one CPU has
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_head.client_env().items():
            patch.setenv(name, value)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        read_authentication_again()
        ray.init(address=ray_head.gcs, log_to_driver=False, logging_level="ERROR")
        yield ray_head
        ray.shutdown()
    torch.set_num_threads(threads)

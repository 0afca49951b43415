"""Lets the workers of a local cluster meet in a file: torch's own meeting point listens on every interface."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import tempfile
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig

from raymem import stopping
from raymem.cluster.connection import session_directory
from raymem.private_apis import TorchBackend, set_torch_distributed_env_vars


class Rendezvous(TorchConfig):  # type: ignore[misc]
    """Ray Train's process group, without an open port if all workers are on this machine's loopback interface."""

    @property
    def backend_cls(self) -> type[_LoopbackBackend]:
        return _LoopbackBackend


class _LoopbackBackend(TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set up the group; runs in the controller."""
        worker_group.execute(save_before_sigterm)
        if ray.util.get_node_ip_address() != "127.0.0.1":
            super().on_start(worker_group, backend_config)
            return
        folder = tempfile.mkdtemp(prefix="meet-", dir=session_directory())
        worker_group.execute(set_torch_distributed_env_vars)
        size = len(worker_group)
        ray.get([
            worker_group.execute_single_async(
                rank, join, f"{folder}/store", backend_config.backend, rank, size, backend_config.timeout_s
            )
            for rank in range(size)
        ])  # fmt: skip


def save_before_sigterm() -> None:
    """Let SIGTERM end this worker's process once its step is saved; runs in each worker, in its main thread."""
    at_once = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: Any) -> None:
        if not stopping.ask() and callable(at_once):
            at_once(number, frame)

    signal.signal(signal.SIGTERM, end)


def join(store: str, backend: str, rank: int, size: int, timeout_s: int) -> None:
    """Join the group; runs in each worker."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    meeting = dist.FileStore(store, size)  # type: ignore[attr-defined]
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=timeout)

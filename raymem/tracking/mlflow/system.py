"""Samples how busy the driver's machine is, with MLflow's own monitors and for its page of system metrics."""

from __future__ import annotations

import logging
import time
from typing import Any

_log = logging.getLogger("raymem.tracking")

SAMPLE_EVERY_S = 10.0


class SystemMetrics:
    """CPU, memory, disk and network of this machine, and its GPUs where ``nvidia-ml-py`` is installed.

    It is sampled when metrics come rather than by a thread, so that its values wait with the others while the server is
    away.
    """

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self._monitors.append(GPUMonitor())
        except Exception as error:  # the library, the driver or a GPU is missing
            _log.info("tracking.system_metrics: without GPUs (%s)", error)
        self._next = 0.0

    def sample(self) -> dict[str, float]:
        """Return metrics by name if ten seconds have passed since the last ones, else nothing."""
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + SAMPLE_EVERY_S
        metrics: dict[str, float] = {}
        for monitor in list(self._monitors):
            try:
                monitor.collect_metrics()
                metrics |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            except Exception as error:  # a sandbox without /proc, a GPU that has gone: worth no run
                self._monitors.remove(monitor)
                _log.warning("tracking.system_metrics: %s fails and is left out: %s", type(monitor).__name__, error)
            monitor.clear_metrics()
        return metrics

"""Imported once by the server that forks the sessions of the harness: whatever a command imports sooner or later."""

from __future__ import annotations

import gc
import importlib

import raymem.testing.preloaded  # noqa: F401 - the libraries of training

gc.disable()
for name in (
    "raymem.cli.main",
    "raymem.runs.train",
    "raymem.runs.evaluate",
    "raymem.runs.loram.pipeline",
    "raymem.cluster.backend",
    "raymem.cluster.connection",
    "raymem.cluster.train.controller",
    "raymem.cluster.doctor.checks",
    "mlflow",
    "tests.faults.sessions",
    "tests.helpers.ray_fixtures",
):
    importlib.import_module(name)
gc.enable()
gc.freeze()

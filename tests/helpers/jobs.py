"""Stands for a head that takes jobs, where only what is sent to it counts."""

from __future__ import annotations

from typing import Any

import pytest


def jobs_sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let ``raymem submit`` find a head without jobs; returns the arguments of each job that is sent, as they come."""
    sent: list[dict[str, Any]] = []

    class Client:
        def get_address(self) -> str:
            return "http://head"

        def list_jobs(self) -> list[Any]:
            return []

        def submit_job(self, **arguments: Any) -> str:
            sent.append(arguments)
            return str(arguments["submission_id"])

    monkeypatch.setattr("raymem.cluster.jobs.submit.connect_jobs", lambda address: Client())
    return sent

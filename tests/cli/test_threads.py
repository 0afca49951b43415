"""How threads of torch wait: asleep, unless this process computes alone on quiet cores, or the user says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raymem.cli import threads


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_is_ours", False)


def waiting() -> tuple[str | None, str | None]:
    return os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")


@pytest.mark.parametrize(("others", "expected"), [(0.0, (None, threads.SPINS)), (0.9, ("PASSIVE", None))])
def test_they_spin_on_quiet_cores_only(
    others: float, expected: tuple[str | None, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_cores_of_others", lambda: others)
    threads.sleep_while_waiting()
    assert waiting() == ("PASSIVE", None)
    threads.spin_on_quiet_cores()
    assert waiting() == expected


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_says_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ACTIVE")
    monkeypatch.setattr(threads, "_cores_of_others", lambda: 0.0)
    threads.sleep_while_waiting()
    threads.spin_on_quiet_cores()
    assert {one: os.environ.get(one) for one in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}[name] == "ACTIVE"
    assert waiting().count(None) == 1


def test_a_busy_process_is_seen() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        assert max(threads._cores_of_others() for _ in range(5)) > threads._QUIET
    finally:
        busy.kill()
        busy.wait()


def test_where_it_cannot_be_told_they_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "cpu")
    assert threads._cores_of_others() == 1.0

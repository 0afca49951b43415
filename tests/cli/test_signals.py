"""What a command says and exits with when a signal ends it; tests/e2e/test_tracked_run.py signals whole runs."""

from __future__ import annotations

import signal

import pytest

from raymem.cli import console, signals


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, action: None)
    monkeypatch.setattr(signals, "_received", [])


@pytest.mark.parametrize("seen", [SystemExit(143), SystemExit(), KeyboardInterrupt()], ids=repr)
def test_the_signal_counts_whatever_became_of_its_exception(seen: KeyboardInterrupt | SystemExit) -> None:
    """Ray's waits turn it into a bare SystemExit, which would be status 1 without a word."""
    with pytest.raises(SystemExit) as raised:
        signals._stop(signal.SIGTERM, None)
    assert raised.value.code == 143
    with console.err.capture() as words:
        end = signals.say_and_exit(seen, "it goes on")
    assert isinstance(end, SystemExit) and end.code == 143
    assert words.get() == "stopped by SIGTERM; it goes on\n"


def test_an_exit_without_a_signal_is_not_touched() -> None:
    plain = SystemExit(7)
    with console.err.capture() as words:
        assert signals.say_and_exit(plain, "it goes on") is plain
    assert words.get() == ""


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == signal.SIGHUP else None)
    monkeypatch.setattr(signal, "signal", lambda number, action: installed.append(number))
    signals.unwind_on_signals()
    assert installed == [signal.SIGTERM]

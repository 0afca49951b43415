"""What a command says and exits with when a signal ends it; whole runs are signalled in tests/e2e/test_signals.py."""

from __future__ import annotations

import signal
import sys
import types
from typing import Any

import pytest

from raymem.cli import console, signals
from raymem.cli.main import run_app
from raymem.cli.signals import goes_on

CURE = "it goes on"


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_ending", signals._Ending())


@pytest.mark.parametrize("seen", [None, SystemExit(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "interrupted")], ids=str
)
def test_the_signal_counts_whatever_became_of_its_exception(
    seen: BaseException | None, number: signal.Signals, words: str
) -> None:
    """Ray's waits turn it into a bare SystemExit, which would be status 1 without a word."""

    def work() -> None:
        try:
            signals._stop(number, None)
        except SystemExit as stop:
            raise (seen or stop) from None

    with console.err.capture() as said, pytest.raises(SystemExit) as raised, goes_on(CURE):
        work()
    assert (raised.value.code, said.get()) == (128 + number, f"{words}; {CURE}\n")
    with console.err.capture() as again:
        assert signals.end(raised.value) == 128 + number
    assert again.get() == "", "one sentence"


def test_an_exit_without_a_signal_is_not_touched() -> None:
    with console.err.capture() as words, pytest.raises(SystemExit) as raised, goes_on(CURE):
        raise SystemExit(7)
    assert signals.end(raised.value) == raised.value.code == 7
    assert words.get() == ""


def test_a_command_that_leaves_nothing_half_done_says_what_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymem.recipe.load.recipe_schema", lambda: signals._stop(signal.SIGINT, None))
    with console.err.capture() as words:
        assert run_app("schema") == 130
    assert words.get() == "interrupted\n"


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was done to a cluster of the command's own, and with which status its process ended."""
    done: list[object] = []
    cluster: Any = types.ModuleType("raymem.cluster.local")
    cluster.has_own = lambda: True
    cluster.leave_to_caller = lambda: done.append("left to us")
    cluster.end_at_once = lambda: done.append("ended")
    monkeypatch.setitem(sys.modules, "raymem.cluster.local", cluster)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: done.append("functions at exit"))

    def leave(code: int) -> None:
        done.append(code)
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    return done


def test_a_cluster_of_the_commands_own_is_killed_when_a_signal_ends_it(done: list[object]) -> None:
    with pytest.raises(SystemExit):
        signals._stop(signal.SIGTERM, None)
    with pytest.raises(SystemExit):
        signals.leave(143)
    assert done == ["left to us", "functions at exit", "ended", 143]


def test_without_a_signal_it_ends_as_it_does(done: list[object]) -> None:
    with pytest.raises(SystemExit) as raised:
        signals.leave(1)
    assert (raised.value.code, done) == (1, [])


def test_only_a_second_ctrl_c_cuts_the_ending_short(done: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """It kills the command's own cluster, says the sentence and leaves."""
    clock = 100.0
    monkeypatch.setattr("time.monotonic", lambda: clock)

    def work() -> None:
        nonlocal clock
        try:
            signals._stop(signal.SIGINT, None)
        finally:
            signals._stop(signal.SIGINT, None)  # the same one, passed on by a parent
            clock += 5
            signals._stop(signal.SIGTERM, None)
            assert done == []
            signals._stop(signal.SIGINT, None)

    with console.err.capture() as words, pytest.raises(SystemExit), goes_on(CURE):
        work()
    assert done == ["ended", 130]
    assert words.get() == f"interrupted; {CURE}\n"


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == signal.SIGHUP else None)
    monkeypatch.setattr(signal, "signal", lambda number, action: installed.append(number))
    signals.unwind_on_signals()
    assert installed == [signal.SIGINT, signal.SIGTERM]

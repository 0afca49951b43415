"""What a terminal and a pipe show while a run or a sweep is under way."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from raymem.cli import console
from raymem.cli.console import Pace, TrainingDisplay, duration
from raymem.cli.sweep import SweepDisplay
from raymem.sweeps.report import SweepRow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def shown_on(monkeypatch: pytest.MonkeyPatch, width: int | None, height: int = 24) -> io.StringIO:
    """Give the console a terminal of ``width`` columns, or a pipe."""
    text = io.StringIO()
    terminal = width is not None
    out = Console(
        file=text, width=width or 80, height=height, force_terminal=terminal, highlight=False, soft_wrap=True,
        color_system=None,
    )  # fmt: skip
    monkeypatch.setattr(console, "out", out)
    return text


def row(step: int, elapsed_s: float, **more: float) -> dict[str, float]:
    plain = {"step": float(step), "loss": 4.5, "lr": 1.25e-4, "tokens_per_s": 1234.0, "elapsed_s": elapsed_s}
    return {**plain, **more}


def test_a_pipe_gets_the_facts_at_a_sensible_rate(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    text = shown_on(monkeypatch, None)
    with TrainingDisplay() as display:
        display.status("loading the weights")
        display.begin(200)
        for step in range(1, 201):
            clock[0] += 1.0
            evaluation = {"eval_loss": 4.25, "eval_perplexity": 70.1} if step == 100 else {}
            metered = {"peak_bytes": 460.0 * 2**20} if step == 2 else {}
            display.show([row(step, step - 0.5, **evaluation, **metered)])
    lines = text.getvalue().splitlines()
    assert lines[:2] == ["loading the weights", "step 1/200  loss 4.500  lr 0.000125  1234 tokens/s"]
    assert lines[2] == "step 11/200  loss 4.500  lr 0.000125  1234 tokens/s  peak 460.00 MiB  3:09 to go"
    assert (
        "step 100/200  loss 4.500  lr 0.000125  1234 tokens/s  eval 4.250 (ppl 70.1)  peak 460.00 MiB  1:40 to go"
        in lines
    )
    assert lines[-1] == "step 200/200  loss 4.500  lr 0.000125  1234 tokens/s  peak 460.00 MiB"
    assert len(lines) == 2 + 200 // 10, "every ten seconds"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_cuts_nothing(width: int, monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    shown_on(monkeypatch, width)
    display = TrainingDisplay()
    display.begin(1_000_000)
    for step in range(500_001, 500_010):
        figures = {"loss": 11.5, "eval_loss": 11.25, "eval_perplexity": 76879.92, "peak_bytes": 1023.94 * 2**20}
        display.show([row(step, step * 3.0, tokens_per_s=123456.0) | figures])
    with console.out.capture() as shown:
        console.out.print(display._renewed(), soft_wrap=False)
    lines = shown.get().splitlines()
    assert all(len(line) <= width for line in lines)
    parts = ["step 500009/1000000", "loss 11.500", "lr 0.000125", "123456 tokens/s", "eval 11.250 (ppl 7.688e+04)"]
    for part in [*parts, "peak 1023.94 MiB"]:
        assert any(part in line for line in lines), part


def test_what_stays_on_a_terminal_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown_on(monkeypatch, 80)
    with TrainingDisplay() as display:
        display.status("loading the weights")
        display.begin(2)
        display.show([row(1, 1.0)])
        display.show([row(2, 2.0)])
        display.status("exporting [the] result")
    last = text.getvalue()[text.getvalue().rindex("step 2/2") :]
    assert "exporting [the] result" in last
    assert last.count("step") == 1


def test_time_to_go_is_that_of_usual_steps_and_of_their_pauses(clock: list[float]) -> None:
    pace = Pace()
    elapsed = 300.0  # the first step compiled
    for step in range(1, 101):
        metered = {"peak_bytes": 1.0} if step in (2, 3) else {}
        elapsed += 50.0 if metered else 2.0
        elapsed += 30.0 if step % 20 == 1 and step > 1 else 0.0  # an evaluation behind every 20th
        pace.add(row(step, elapsed, **metered))
        if step == 5:
            assert pace.left_s(5, 1000) is None, "two usual steps are not enough"
        if step == 15:
            assert pace.left_s(15, 1000) == pytest.approx(985 * 2.0)
    # 97 steps of 2 s, and 4 pauses of 30 s among them.
    assert pace.left_s(100, 1000) == pytest.approx(900 * (2.0 + 4 * 30 / 97), rel=0.01)
    clock[0] += 100
    assert pace.left_s(100, 1000) == pytest.approx(900 * (2.0 + 4 * 30 / 97) - 100, rel=0.01)
    assert pace.left_s(100, None) is None


def test_steps_that_are_taken_again_do_not_disturb_it(clock: list[float]) -> None:
    pace = Pace()
    for step in [*range(1, 11), *range(6, 16)]:  # the workers were started again
        pace.add(row(step, step * 2.0))
    assert pace.left_s(15, 25) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3753, "1:02:33"), (187200, "2 d 4 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


POINT = {"adapter.kind": "moram", "adapter.rank": 16, "adapter.density": 0.0123456, "optimizer.lr": 0.000345}


def trial(number: int, status: str, **more: Any) -> SweepRow:
    facts = {"metrics": {}, "predicted_bytes": 30 << 20, "measured_bytes": None, "overhead_s": None, "problem": None}
    return SweepRow(**{"number": number, "status": status, "point": POINT, **facts, **more})


ENDED = {"metrics": {"eval_loss": 4.5678}, "measured_bytes": 31 << 20}


def test_a_sweep_counts_what_has_ended_and_tells_each_trial_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown_on(monkeypatch, None)
    with SweepDisplay("eval_loss", 6) as display:
        display.show([trial(0, "refused"), trial(1, "running")])
        display.show([trial(0, "refused"), trial(1, "running"), trial(2, "running"), trial(3, "refused")])
        display.show([trial(0, "refused"), trial(1, "finished", **ENDED), trial(2, "stopped"), trial(3, "refused")])
        display.show([trial(1, "finished", **ENDED), trial(2, "stopped"), trial(3, "refused"), trial(4, "running")])
    point = "adapter.kind=moram adapter.rank=16 adapter.density=0.0123 optimizer.lr=0.000345"
    assert text.getvalue().splitlines() == [
        f"[0/6 done, 1 running, 1 refused] trial 1 running  predicted 30.00 MiB  {point}",
        f"[0/6 done, 2 running, 2 refused] trial 2 running  predicted 30.00 MiB  {point}",
        f"[1/6 done, 1 running, 2 refused] trial 1 finished  eval_loss 4.5678  peak 31.00 MiB  {point}",
        f"[2/6 done, 0 running, 2 refused] trial 2 stopped  predicted 30.00 MiB  {point}",
        f"[2/6 done, 1 running, 1 refused] trial 4 running  predicted 30.00 MiB  {point}",
    ]


def test_a_resumed_sweep_does_not_tell_what_was_done_before_as_if_it_were_new(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown_on(monkeypatch, None)
    before = [trial(0, "finished", **ENDED), trial(1, "finished", **ENDED), trial(2, "waiting")]
    with SweepDisplay("eval_loss", 4) as display:
        display.show([*before, trial(3, "running")])
        display.show([*before[:2], trial(2, "running"), trial(3, "finished", **ENDED)])
    lines = [line.partition("  ")[0] for line in text.getvalue().splitlines()]
    assert lines == [
        "going on: 2 of 4 trials are done",
        "[2/4 done, 1 running, 0 refused] trial 3 running",
        "[2/4 done, 2 running, 0 refused] trial 2 running",
        "[3/4 done, 1 running, 0 refused] trial 3 finished",
    ]


def test_the_table_of_a_sweep_has_whole_numbers_and_running_trials_at_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown_on(monkeypatch, 80)
    rows = [trial(1, "running"), *(trial(n, "infeasible", **ENDED) for n in range(1002, 1030)), trial(1030, "waiting")]
    display = SweepDisplay("tokens_per_s", 50)
    rows += [trial(1031, "finished", metrics={"tokens_per_s": 12345.678}, measured_bytes=1023 << 20)]
    with console.out.capture() as shown:
        console.out.print(display._table([*rows, trial(1032, "refused")]), soft_wrap=False)
    lines = shown.get().splitlines()
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines)
    assert "29/50 done (28 infeasible, 1 finished), 1 running, 1 waiting, 1 refused" in lines[0]
    assert any(line.split()[:2] == ["1", "running"] for line in lines)
    assert any(line.split()[:5] == ["1031", "finished", "12345.6780", "1023.00", "MiB"] for line in lines)
    (start,) = {line.index("point") for line in lines if "point" in line}
    assert "optimizer.lr=0.000345" in "".join(line[start:].strip() for line in lines)

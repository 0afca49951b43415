"""The report of a soak: what was struck how often, and what came of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "fault", "rounds", "recovered", "stopped with a named error, then recovered", "failed", "identical",
    "lost steps (median, most)", "seconds from fault to result (median, most)",
)  # fmt: skip


def read_records(file: Path) -> list[dict[str, Any]]:
    """The rounds of a soak so far; of a seed that was played twice the last."""
    lines = file.read_text().splitlines() if file.exists() else []
    return list({raw["seed"]: raw for raw in map(json.loads, lines)}.values())


def write_report(records: Sequence[dict[str, Any]], facts: dict[str, str]) -> str:
    """The report as Markdown."""
    played = [raw for raw in records if raw["outcome"] != "missed"]
    kinds = sorted({raw["kind"] for raw in played})
    failed = [raw for raw in played if raw["outcome"] == "failed"]
    lines = ["# Soak: faults in the middle of real runs", ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    lines += [
        f"* {len(played)} rounds with {len(kinds)} kinds of fault; {len(failed)} failed, "
        f"{sum(raw['identical'] for raw in played)} ended bit-identical to the undisturbed run",
        f"* another {len(records) - len(played)} rounds were over before their fault struck, and count for nothing",
        "",
        "A round is a real run of a tiny model, into which one fault is injected at a random moment. The same command "
        "is given again, as a user would, until it succeeds. *Recovered*: nobody had to do anything but that. *Stopped "
        "with a named error*: a session ended with a sentence and an exit status above 0, what it named was mended, "
        "and the same command went on. *Failed*: another result, a traceback, a hang, or something left behind.",
        "",
        _table(COLUMNS, [_row(kind, [raw for raw in played if raw["kind"] == kind]) for kind in kinds]),
        "",
        "## Runs",
        "",
        _table(("method, workers, strategy, storage", "rounds", "failed"), _by_case(played)),
        "",
    ]
    if failed:
        lines += ["## Failures", ""]
        lines += [
            f"* seed {raw['seed']}, {raw['kind']} ({raw['detail'] or 'no detail'}), {raw['case']}, at {raw['moment']}: "
            f"{'; '.join(raw['problems'])}"
            for raw in failed
        ]
        lines += [""]
    return "\n".join(lines)


def _row(kind: str, raws: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    def count(outcome: str) -> str:
        return str(sum(raw["outcome"] == outcome for raw in raws))

    return (
        kind, str(len(raws)), count("recovered"), count("stopped"), count("failed"),
        str(sum(raw["identical"] for raw in raws)),
        _spread([raw["lost_steps"] for raw in raws], "{:.0f}"), _spread([raw["recovery_s"] for raw in raws], "{:.1f}"),
    )  # fmt: skip


def _spread(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{form.format(statistics.median(known))}, {form.format(max(known))}" if known else "-"


def _by_case(raws: Sequence[dict[str, Any]]) -> list[Sequence[str]]:
    cases = sorted({raw["case"] for raw in raws})
    rows: list[Sequence[str]] = []
    for case in cases:
        ours = [raw for raw in raws if raw["case"] == case]
        rows.append((case, str(len(ours)), str(sum(raw["outcome"] == "failed" for raw in ours))))
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

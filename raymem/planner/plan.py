"""Turns a recorded session into a plan: peaks per term and phase, and the memory that the device must have."""

from __future__ import annotations

from collections import Counter
from typing import Any

from raymem.memory import allocator, devices
from raymem.memory.trace import CATEGORIES, PHASES, Change, Phase, live_at, peak_of
from raymem.planner.tracing.step_trace import MEASURED, StepTrace
from raymem.planner.types import Plan, Target

_POINTS = 600
_TOP = 12


def make_plan(session: StepTrace, target: Target, gpu: str | None) -> Plan:
    """Evaluate a recorded session."""
    changes = _of_device(session.changes, target)
    relevant = {id(change) for change in changes if change.step != 1}
    peak = peak_of(changes, wanted=lambda change: id(change) in relevant)
    steps = peak_of(changes, wanted=lambda c: c.step == MEASURED and c.phase in ("forward", "backward", "step"))
    phases: dict[str, dict[str, int]] = {}
    for phase in PHASES:
        phase_peak = peak_of(changes, wanted=lambda c, phase=phase: c.phase == phase and id(c) in relevant)  # type: ignore[misc]
        if phase_peak.num_bytes:
            phases[phase] = {**_complete(phase_peak.by_category), "peak_bytes": phase_peak.num_bytes}
    held = _device_needs(changes, session.rehearsed, target, gpu, peak.num_bytes)
    host_terms = _host_terms(session.changes)
    return Plan(
        device=target.kind,
        gpu=gpu,
        num_workers=target.num_workers,
        traced=True,
        note=None,
        peak_bytes=peak.num_bytes,
        step_peak_bytes=steps.num_bytes,
        terms=_complete(peak.by_category),
        term_peaks=_term_peaks(changes),
        phases=phases,
        state=session.state,
        top=_top(changes, peak.at),
        timeline=_timeline(changes, peak.at),
        loss_note=session.loss_note,
        trained=session.trained,
        host_bytes=sum(host_terms.values()),
        host_terms=host_terms,
        **held,
    )


def _of_device(changes: list[Change], target: Target) -> list[Change]:
    """Select the changes of the device's memory; a CPU's is that of the host."""
    return changes if target.kind == "cpu" else [change for change in changes if not change.record.on_host]


def _host_terms(changes: list[Change]) -> dict[str, int]:
    """Return the bytes of each term on the host when they are the most, leaving out the step that does not count."""
    sums: Counter[str] = Counter()
    most: dict[str, int] = {}
    total = highest = 0
    for change in changes:
        if change.record.on_host:
            sums[change.record.category] += change.num_bytes
            total += change.num_bytes
        if change.step != 1 and total > highest:
            highest, most = total, _complete(sums)
    return most


def _term_peaks(changes: list[Change]) -> dict[str, int]:
    """Return the highest value of each term by itself, leaving out the step that does not count."""
    sums, most = dict.fromkeys(CATEGORIES, 0), dict.fromkeys(CATEGORIES, 0)
    for change in changes:
        category = change.record.category
        sums[category] += change.num_bytes
        if change.step != 1 and sums[category] > most[category]:
            most[category] = sums[category]
    return {name: max(most[name], sums[name]) for name in CATEGORIES}  # what step 1 made and is still there counts


def _complete(by_category: Any) -> dict[str, int]:
    return {category: by_category.get(category, 0) for category in CATEGORIES}


def _device_needs(
    changes: list[Change], rehearsed: bool, target: Target, gpu: str | None, peak_bytes: int
) -> dict[str, Any]:
    if target.kind == "cpu":
        same = dict.fromkeys(("reserved_bytes", "capacity_bytes", "expandable_bytes"), peak_bytes)
        return {**same, "outside_bytes": 0}
    outside = outside_bytes(target, gpu)
    program = allocator_events(changes, devices.gpu_facts(gpu).cublas_bytes, rehearsed=rehearsed)
    unlimited = allocator.replay(program)
    return {
        "reserved_bytes": unlimited.peak_reserved_bytes,
        "capacity_bytes": allocator.smallest_capacity(program, unlimited) + outside,
        "expandable_bytes": allocator.replay(program, expandable=True).peak_reserved_bytes,
        "outside_bytes": outside,
    }


def outside_bytes(target: Target, gpu: str | None) -> int:
    """Return the bytes of CUDA context and NCCL."""
    if target.kind == "cpu":
        return 0
    return devices.gpu_facts(gpu).context_bytes + (devices.NCCL_BYTES if target.num_workers > 1 else 0)


def allocator_events(changes: list[Change], cublas_bytes: int, *, rehearsed: bool) -> list[allocator.Event]:
    """Write a session's changes of the device as a program for the allocator model.

    Where step 1 was not taken, its place is filled by what step 2 allocates and frees, with the optimizer state coming
    between backward and update: the allocator's cache is then as warm as in a run.
    """
    before = [_event(c) for c in changes if c.step == 0]
    # One workspace for the thread that runs forward, one for that of backward.
    before += [(-1, cublas_bytes), (-2, cublas_bytes)]
    first = [c for c in changes if c.step == 1]
    measured = [c for c in changes if c.step > 1]
    if rehearsed:
        return before + [_event(c) for c in first] + [_event(c) for c in measured]
    in_step = [c for c in measured if c.phase in ("forward", "backward", "step")]
    update = next((i for i, c in enumerate(in_step) if c.phase == "step"), len(in_step))
    state = [_event(c) for c in first if c.record.category == "optimizer" and c.num_bytes > 0]
    state_keys = {key for key, _ in state}
    rehearsal: list[allocator.Event] = []
    open_keys: set[int] = set()
    for index, change in enumerate(in_step):
        if index == update:
            rehearsal += state
        key = -3 - change.record.key
        if change.num_bytes > 0:
            rehearsal.append((key, change.num_bytes))
            open_keys.add(key)
        elif key in open_keys:
            rehearsal.append((key, 0))
            open_keys.remove(key)
    if update == len(in_step):
        rehearsal += state
    rehearsal += [(key, 0) for key in sorted(open_keys)]
    alive = state_keys | {key for key, _ in before}
    following = []
    for change in measured:  # what step 1 alone left behind is not there
        if change.num_bytes > 0:
            alive.add(change.record.key)
        elif change.record.key not in alive:
            continue
        following.append(_event(change))
    return before + rehearsal + following


def _event(change: Change) -> allocator.Event:
    return change.record.key, max(0, change.num_bytes)


def _top(changes: list[Change], at: int) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for live in live_at(changes, at):
        groups.setdefault((live.name, live.category, live.operation), []).append(live.num_bytes)
    ranked = sorted(groups.items(), key=lambda item: -sum(item[1]))[:_TOP]
    return [
        {"name": name, "category": category, "operation": operation, "bytes": sum(sizes), "count": len(sizes)}
        for (name, category, operation), sizes in ranked
    ]


def _timeline(changes: list[Change], peak_at: int) -> list[dict[str, Any]]:
    """Sample the measured step, with the highest point of every stretch, so that no peak is lost."""
    sums: Counter[str] = Counter()
    start = next((i for i, c in enumerate(changes) if c.step == MEASURED), 0)
    every = max(1, (len(changes) - start) // _POINTS)
    points: list[dict[str, Any]] = []
    highest = -1
    best: dict[str, int] = {}
    phase: Phase = "load"
    total = 0
    for index, change in enumerate(changes):
        sums[change.record.category] += change.num_bytes
        total += change.num_bytes
        if index < start:
            continue
        if change.phase != phase or (index - start) % every == 0:
            if highest >= 0:
                points.append({"phase": phase, **best})
            highest, phase = -1, change.phase
        if total > highest:
            highest, best = total, _complete(sums)
    if highest >= 0:
        points.append({"phase": phase, **best})
    return points

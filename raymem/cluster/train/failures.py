"""Says in one sentence why a worker group failed for good, and how often it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray.train

from raymem.private_apis import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from raymem.recipe.schema import ScalingSection
from raymem.text import cut

START_ATTEMPTS = 10
"""The number of tries, of up to a minute each, to get resources; an autoscaler needs some minutes to bring a node."""


@dataclass(frozen=True)
class Again:
    """How work goes on after a failure, in words."""

    start: str
    """Where a group that starts again goes on."""
    kept: str
    """What is left if it does not; may be empty."""
    cure: str


TRAINING = Again(
    "from the last checkpoint",
    "; the last checkpoint is kept",
    "the last checkpoint is kept: run the same command again to resume, with --verbose for the workers' output",
)
CALL = Again("from the beginning", "", "run the same command again, with --verbose for the workers' output")


def explain(
    failure: BaseException, failures: Sequence[int], hung: Mapping[int, str], scaling: ScalingSection,
    again: Again = TRAINING,
) -> str:  # fmt: skip
    """Return the error for a group that Ray Train gave up.

    Args:
        failure: what Ray Train raised.
        failures: the rank that each failure of the group began with, see :func:`first_rank`.
        hung: by process id, what the watchdog said before it killed the process.
        again: how the work goes on.
    """
    if not isinstance(failure, ray.train.WorkerGroupError):
        return _not_started(getattr(failure, "controller_failure", failure), again)
    causes = failure.worker_failures
    rank = first_rank(causes)
    said = [sentence for pid, sentence in hung.items() if f"pid: {pid}\n" in str(causes[rank])]
    ranks = Counter(failures or [rank])
    times = f"{ranks.total()} time{'s' * (ranks.total() > 1)}"
    if len(ranks) > 1:
        times += f" ({', '.join(f'worker {rank}: {count}' for rank, count in sorted(ranks.items()))})"
    return (
        f"scaling: the workers failed {times}, one more than scaling.max_failures={scaling.max_failures} allows, "
        f"at last {said[0] if said else f'worker {rank} with: {last_line(causes[rank])}'}; {again.cure}"
    )


def first_rank(causes: Mapping[int, BaseException]) -> int:
    """Return the rank that failed by itself, of those that failed together: others have only lost their connection."""
    return min(causes, key=lambda rank: (any(word in str(causes[rank]) for word in ("gloo", "NCCL")), rank))


def last_line(error: BaseException) -> str:
    """Return the end of an error's text, where Ray puts the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _not_started(cause: BaseException, again: Again) -> str:
    tries = START_ATTEMPTS + 1
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        return (
            f"scaling: the cluster had no room for {cause.num_workers} workers in {tries} tries of a minute each; "
            "lower scaling.num_workers or scaling.resources_per_worker, or add nodes (`ray status` shows what they "
            f"have){again.kept}"
        )
    if isinstance(cause, WorkerGroupStartupFailedError):
        reason = last_line(cause.__cause__ or cause)
        return f"scaling: the workers died {tries} times while they started, at last with: {reason}; {again.cure}"
    reason = f"{type(cause).__name__}: {cut(' '.join(str(cause).split()), 300)}"
    return f"scaling: Ray Train could not start or lead the workers ({reason}); {again.cure}"

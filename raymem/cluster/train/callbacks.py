"""Listens to Ray Train in its controller, and passes on what it learns to the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.train

from raymem.cluster.train.events import Restarted, Rows, Scheduled
from raymem.cluster.train.failures import first_rank, last_line
from raymem.private_apis import ControllerCallback, ResizingState, WorkerGroupCallback
from raymem.text import cut

SAVE_FIRST_S = 300.0
"""The longest wait for a checkpoint before a group gets another size; without one it goes on from the one before."""
_LOOK_EVERY_S = 0.2


class ReportCallback(ray.train.UserCallback):  # type: ignore[misc]
    """Hands each report to the mailbox."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        rows, replayed = metrics[0].get("rows", []), metrics[0].get("replayed", 0)
        # Waited for, so that a mailbox that has died ends the run: rows would be lost without a word.
        ray.get(self._mailbox.push.remote(Rows(rows, replayed)))


class FailureCallback(ray.train.UserCallback):  # type: ignore[misc]
    """Counts the failures of a group in the mailbox."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        self._mailbox.failed.remote(first_rank(worker_exceptions))


class GroupCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Tells the mailbox when the group of workers is asked for, and why it is started again.

    Ray ends the processes of an elastic group that is to grow, so a group that saves is asked for a checkpoint first.

    Args:
        saves: the group trains a run.
    """

    def __init__(self, mailbox: Any, *, saves: bool) -> None:
        self._mailbox, self._saves = mailbox, saves

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._mailbox.push.remote(Scheduled(worker_group_context.num_workers))

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):
            self._resize(current_state.scaling_decision.num_workers)
        # Of all states only those of a failure from which the group goes on have an error and are not the end.
        error = getattr(current_state, "training_failed_error", None)
        if error is not None and not current_state.is_terminal():
            self._mailbox.push.remote(Restarted(reason_of(error)))

    def _resize(self, num_workers: int) -> None:
        """Have the group save before it ends; Ray takes no reports meanwhile, of which each worker can leave one."""
        try:
            saved = None
            if self._saves:
                request, deadline = ray.get(self._mailbox.ask_to_save.remote()), time.monotonic() + SAVE_FIRST_S
                while (saved := ray.get(self._mailbox.answer.remote(request))) is None and time.monotonic() < deadline:
                    time.sleep(_LOOK_EVERY_S)
            self._mailbox.regrouped.remote(num_workers, None if saved is None else saved[0])
        except ray.exceptions.RayError:
            pass  # the driver has gone, and so will this run


def reason_of(error: Any) -> str:
    """Say in a few words why the group is started again.

    Args:
        error: a ``TrainingFailedError`` of Ray Train.
    """
    if not isinstance(error, ray.train.WorkerGroupError):
        return f"the workers did not start: {_short(getattr(error, 'controller_failure', error))}"
    rank = first_rank(error.worker_failures)
    return f"worker {rank} failed: {_short(error.worker_failures[rank])}"


def _short(error: BaseException) -> str:
    return cut(last_line(error), 300)

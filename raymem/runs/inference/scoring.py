"""Judges a model's own answers beside its training: of copies that are made on the way, and of the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from raymem.methods.probe import first_line
from raymem.runs.backend import Started
from raymem.runs.evaluate import evaluate_run, evaluation_config, evaluation_task
from raymem.runs.record import SCORES
from raymem.runs.resolved import ResolvedRun
from raymem.training.artifacts.export import COPIES, artifact_name, copy_name
from raymem.training.artifacts.facts import FACTS
from raymem.training.data.packed.shards import Prepared
from raymem.training.reporter import Row, Status

log = logging.getLogger(__name__)


class Scoring:
    """The scores of one run.

    A worker exports a copy after each step that is due, see ``train.score_every``. When the row of the step comes, a
    task is started that judges the copy, which is deleted afterwards. A run that goes on judges the copies that were
    left. What cannot be judged is said, and costs the training nothing.

    Args:
        data: the evaluation data.
        log_rows: gets a row of each step that was judged: ``step`` and the metrics.
        status: told the same in words.
    """

    def __init__(
        self, run: ResolvedRun, data: Prepared, log_rows: Callable[[Sequence[Row]], None], status: Status
    ) -> None:  # fmt: skip
        self._run, self._data, self._log_rows, self._status = run, data, log_rows, status
        self._every = run.recipe.train.score_every
        self._started: dict[int, Started[Any]] = {}
        self._scores: dict[str, dict[str, float]] = {}

    def resume(self, start: int) -> list[Row]:
        """Go on with a run that has taken ``start`` steps; return the rows of what was judged before."""
        folder = self._run.run
        if start and folder.exists(SCORES):
            earlier = folder.read_record(SCORES)
            self._scores = {step: scores for step, scores in earlier.items() if int(step) <= start}
        for name in folder.list_dirs(COPIES):
            step = int(name.removeprefix("step_"))
            if step > start or str(step) in self._scores:
                folder.delete_dir(copy_name(step), last=None)
            else:
                self._start(step)
        return [{"step": float(step), **scores} for step, scores in self._scores.items()]

    def listen(self, rows: Sequence[Row]) -> None:
        """Start what is due, and take what is done; this is a listener of the training."""
        for row in rows:
            step = int(row["step"])
            if self._every is not None and step % self._every == 0:
                self._start(step)
        for step in [step for step, task in self._started.items() if task.is_done()]:
            self._take(step)

    def finish(self, artifact: str, step: int) -> Row:
        """Judge the result, after the copies that are left; return its metrics.

        Args:
            step: the run's last one, at which they are noted.

        Raises:
            Exception: the result cannot be judged; code of models may raise anything.
        """
        if self._started:
            self._status(f"judging the answers of step {', '.join(map(str, self._started))}")
        for left in list(self._started):
            self._take(left)
        self._status("judging the answers of the result")
        scores = evaluate_run(self._run, artifact, self._data, status=self._status).result.judged
        self._note(step, scores)
        return scores

    def stop(self) -> None:
        """End the tasks; their copies stay for the next session."""
        while self._started:
            self._started.popitem()[1].cancel()

    def _start(self, step: int) -> None:
        name = f"{copy_name(step)}/{artifact_name(self._run.recipe)}"
        if step in self._started or str(step) in self._scores or not self._run.run.exists(f"{name}/{FACTS}"):
            return
        config = evaluation_config(self._run.recipe, self._run.run.join(name), self._data)
        self._started[step] = self._run.backend.start(evaluation_task, config)

    def _take(self, step: int) -> None:
        try:
            evaluation, _ = self._started.pop(step).result()
        except Exception as error:  # code of models may raise anything
            cause = getattr(error, "cause", None) or error  # Ray's error begins with the name of the task
            log.warning("the answers of step %d could not be judged: %s", step, first_line(cause))
        else:
            self._note(step, evaluation.judged)
        self._run.run.delete_dir(copy_name(step), last=None)

    def _note(self, step: int, scores: Row) -> None:
        self._scores[str(step)] = dict(scores)
        self._run.run.write_record(SCORES, self._scores)
        self._log_rows([{"step": float(step), **scores}])
        self._status(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))

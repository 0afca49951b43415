"""Runs the one training loop: every method, DistEnv and launcher runs through it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from raymem import stopping
from raymem.errors import NonFiniteError, OutOfMemory
from raymem.linalg.local import local
from raymem.memory.meter import PeakMeter, resident_tensors, storage_bytes
from raymem.memory.oom import is_out_of_memory
from raymem.methods.sentences import first_step
from raymem.recipe.schema import Recipe
from raymem.seeds import derive
from raymem.storage.storage import Storage
from raymem.training.artifacts.export import copy_name, export_final
from raymem.training.checkpoint import FOLDER, Checkpoints
from raymem.training.data.batches import Batch, global_targets, rank_batches
from raymem.training.data.packed.dataset import PackedRows
from raymem.training.data.packed.sampler import RowIds, Sampler
from raymem.training.data.packed.shards import Prepared
from raymem.training.dist_env import DistEnv, bucket_bytes, replicate
from raymem.training.evaluate import Evaluation, evaluate, evaluation_rows
from raymem.training.history import History
from raymem.training.hooks import hooks_of, metrics_of, resume_hooks, states_of, view_of
from raymem.training.manifest import Manifest
from raymem.training.model.build import build_model
from raymem.training.optim import build_updater, lr_factor
from raymem.training.reporter import Reporter, Row, Wanted
from raymem.training.resume_rules import check_identity, identity_of
from raymem.training.step import finite_guard, train_step

log = logging.getLogger(__name__)

METERED_STEPS = (2, 3)
"""The steps whose peak is measured: the first creates the optimizer state, so only later ones are complete. Where none
of their rows needed an attention mask, which takes memory of its own, the next step with such a row is measured too."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a finished run in plain values, sent from worker to driver."""

    steps: int
    started_at: int
    """First step of this session: above 0 if it resumed."""
    loss: float | None
    """Training loss of the last step; None if the run was already complete."""
    eval_loss: float | None
    eval_perplexity: float | None
    peak_bytes: int | None
    """The highest peak over all ranks, also of earlier sessions."""
    artifact: str
    """Path or URI of the final adapter or model directory."""
    earlier_s: float = 0.0
    """Seconds of the sessions that this one went on from."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run(
    recipe: Recipe, dist_env: DistEnv, run_storage: Storage, train_data: Prepared, eval_data: Prepared | None,
    reporter: Reporter, *, metered_steps: Collection[int] = METERED_STEPS, predicted_peak_bytes: int | None = None,
) -> Outcome:  # fmt: skip
    """Train a recipe to its end from wherever its last checkpoint stands. Collective over all ranks.

    Args:
        metered_steps: numbers of the steps of this session, from 1, whose peak memory is measured, see
            :data:`METERED_STEPS`; that makes a step of a tiny model many times slower. None: no step is measured.
        predicted_peak_bytes: goes into the facts about the result.

    Raises:
        RaymemError: see the rooms that it calls; on any error the last good checkpoint stays.
    """
    session = _Session(recipe, dist_env, run_storage, train_data, eval_data, reporter, metered_steps)
    session.predicted_peak_bytes = predicted_peak_bytes
    return session.run()


def total_steps(recipe: Recipe, train_data: Prepared) -> int:
    """Return the number of steps of a run; one that is longer already stays what it is."""
    return steps_of(recipe, sampler_of(recipe, PackedRows(train_data.directories)))


def sampler_of(recipe: Recipe, rows: PackedRows) -> Sampler:
    """Return what draws the rows of each step of a run."""
    return Sampler(recipe.seed, rows.sizes_and_weights, recipe.train.global_batch)


def steps_of(recipe: Recipe, sampler: Sampler) -> int:
    """Return the number of steps of a run whose rows a sampler draws."""
    return recipe.train.steps or sampler.steps_for(recipe.train.epochs or 1.0)


class _Session:
    """A process's part in a run, from (re)start to end."""

    def __init__(
        self, recipe: Recipe, dist_env: DistEnv, run_storage: Storage, train_data: Prepared, eval_data: Prepared | None,
        reporter: Reporter, metered_steps: Collection[int],
    ) -> None:  # fmt: skip
        self.metered_steps, self.mask_is_metered = metered_steps, False
        self.predicted_peak_bytes: int | None = None
        self.recipe, self.dist_env, self.run_storage, self.reporter = recipe, dist_env, run_storage, reporter
        self.identity = identity_of(recipe, train_data)
        self.checkpoints = Checkpoints(run_storage, dist_env)
        self.history = History(run_storage)
        self.rows = PackedRows(train_data.directories)
        self.eval_rows = None if eval_data is None else evaluation_rows(eval_data)
        self.sampler = sampler_of(recipe, self.rows)
        self.total_steps = steps_of(recipe, self.sampler)
        tenth = -(-self.total_steps // 10)
        self.eval_every = recipe.train.eval_every or tenth
        self.save_every = recipe.train.save_every or tenth
        self.mixed = recipe.train.precision == "bf16_mixed"
        self.peak_bytes: int | None = None
        self.eval_loss: float | None = None
        self.recent: list[Row] = []
        self.last_row: Row = {}
        self.earlier_s = self.upload_wait_s = 0.0
        self.began = time.perf_counter()

    def run(self) -> Outcome:
        self._doing("loading the weights")
        self._seed(step=0)
        self.unwrapped = build_model(self.recipe, self.dist_env)
        self.updater = build_updater(self.unwrapped, self.recipe)
        self.hooks = hooks_of(self.recipe, self.unwrapped)
        self.view = view_of(self.unwrapped, self._micro_batches, mixed=self.mixed, doing=self._doing)
        start = self._resume()
        self.dist_env.on_main(lambda: self.history.begin(start))
        self.total_steps = max(start, self.total_steps)  # a run that is longer already stays what it is
        self.model = self.unwrapped if self.dist_env.sharded else replicate(self.unwrapped, self.dist_env)
        row: Row = {}
        with stopping.heard(), self.checkpoints:
            for step in range(start, self.total_steps):
                row = self._take(step, start)
        self.reporter.flush()
        self._doing("exporting the result")
        exported = self._load_best() if self.recipe.storage.keep == "best" else self.total_steps
        facts = {
            "step": exported,
            "loss": self.last_row.get("loss"),
            "eval_loss": self.eval_loss,
            "peak_bytes": self.peak_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
        }
        artifact = export_final(self.unwrapped, self.recipe, self.dist_env, self.run_storage, facts)
        return Outcome(
            steps=self.total_steps,
            started_at=start,
            loss=row.get("loss"),
            eval_loss=self.eval_loss,
            eval_perplexity=None if self.eval_loss is None else Evaluation(self.eval_loss, 1).perplexity,
            peak_bytes=self.peak_bytes,
            artifact=artifact,
            earlier_s=self.earlier_s,
        )

    def _take(self, step: int, start: int) -> Row:
        """Take one step, and do what is due after it.

        Raises:
            Stopped: the run was asked to end; the step is saved.
        """
        # The first step of a session also compiles and allocates: nobody knows how long that takes.
        if step == start:
            self._doing(f"taking step {step + 1}, the first of this session")
        else:
            self.reporter.progress(f"step {step + 1}")
        with first_step(self.unwrapped, is_first=step == start), self._failures_named(step):
            self._seed(step)
            for hook in self.hooks:
                hook.before_step(step, self.view)
            row = self._step(step, first=start)
        done = step + 1
        if self._is_evaluated(done):
            row |= self._evaluate(done)
        if (every := self.recipe.train.score_every) and done % every == 0 and done < self.total_steps:
            self.reporter.progress(f"the copy of step {done}", brief=False)
            at = self.run_storage.child(copy_name(done))  # whole before the driver learns of the step
            export_final(self.unwrapped, self.recipe, self.dist_env, at, {"step": done})
        self.recent.append(row)
        self.last_row = row
        if self.dist_env.is_main:
            self.history.add(row)
        self.reporter.log(row)
        self.checkpoints.look()
        wanted = self.reporter.wanted()
        if wanted is not Wanted.NOTHING or self._due(done, self.save_every):
            self._save(done)
        if wanted is not Wanted.NOTHING or done == self.total_steps:
            self._await_upload()
        if wanted is Wanted.STOP and done < self.total_steps:
            raise stopping.Stopped(done)
        if wanted is Wanted.SAVE:
            self.reporter.saved(done)
        return row

    def _doing(self, what: str) -> None:
        """Tell people what begins that takes as long as it takes."""
        self.reporter.progress(what, brief=False, told=True)

    def _resume(self) -> int:
        manifest = self.checkpoints.latest()
        self.checkpoints.clear_unfinished(0 if manifest is None else manifest.step)
        if manifest is None:
            return 0
        checkpoint_path = self.run_storage.join(FOLDER)
        check_identity(manifest.identity, self.identity, checkpoint_path)
        self.updater.allocate_state()
        self.checkpoints.load(manifest, self.updater.state())
        resume_hooks(self.hooks, manifest.hooks, self.view, checkpoint_path)
        self.eval_loss = manifest.eval_loss
        self.peak_bytes, self.earlier_s = manifest.peak_bytes, manifest.elapsed_s
        log.info("resuming from step %d (%s)", manifest.step, checkpoint_path)
        self.reporter.replay(manifest.rows)
        if manifest.rows:
            self.last_row = manifest.rows[-1]
        return manifest.step

    def _load_best(self) -> int:
        """Put the kept weights of lowest evaluation loss into the model; returns their step."""
        best = self.checkpoints.best()
        assert best is not None, "the last step is always saved"
        if best.step != self.total_steps:
            self.checkpoints.load(best, self.updater.state())
            log.info("the checkpoint of step %d has the lowest evaluation loss and is the result", best.step)
        self.checkpoints.drop_copy()  # a worker of Ray ends without tidying up
        self.eval_loss = best.eval_loss
        self.last_row = best.rows[-1] if best.rows else {}
        return best.step

    def _step(self, step: int, first: int) -> Row:
        """Take one optimizer step and return its metrics."""
        began = time.perf_counter()
        self._seed(step)
        train = self.recipe.train
        ids = self.sampler.ids(step)
        lr = self.recipe.optimizer.lr * lr_factor(step, self.total_steps, train.schedule, train.warmup)
        nth = step - first + 1
        is_metered = self._is_metered(nth, ids)
        with self._metered(nth) if is_metered else contextlib.nullcontext():
            result = train_step(
                self.model,
                [batch for batch, _ in self._micro_batches(step)],
                global_targets(self.rows, ids),
                self.updater,
                step,
                lr,
                clip_norm=train.clip_norm,
                mixed=self.mixed,
                guard=finite_guard,
            )
        row = {
            "step": float(step + 1),
            "loss": float(result.loss),
            "grad_norm": float(result.grad_norm),
            "lr": lr,
            "tokens_per_s": float(self.rows.lengths[ids].sum()) / (time.perf_counter() - began),
            "elapsed_s": self._elapsed_s(),
            "epoch": (step + 1) * train.global_batch / self.sampler.epoch_size,
        }
        if self.upload_wait_s:
            row["upload_wait_s"], self.upload_wait_s = self.upload_wait_s, 0.0
        if is_metered:
            assert self.peak_bytes is not None
            row["peak_bytes"] = float(self.peak_bytes)
            row |= self._held_bytes()
        return row | metrics_of(self.hooks, step, taken=row)

    @contextlib.contextmanager
    def _failures_named(self, step: int) -> Iterator[None]:
        """Say where and with what settings memory or finite numbers ended."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"out of memory at step {step + 1} on rank {self.dist_env.rank} with train.micro_batch="
                f"{self.recipe.train.rows_per_pass} and data.sequence_length={self.recipe.data.sequence_length}: "
                "lower train.micro_batch (the result stays the same), or set activations: checkpoint"
            ) from None
        except NonFiniteError as error:
            saved = self.checkpoints.latest()
            kept = f"the checkpoint of step {saved.step} is kept" if saved else "there is no checkpoint yet"
            raise NonFiniteError(
                f"{error} at step {step + 1}; nothing of that step was saved and {kept}: lower optimizer.lr, "
                "raise train.warmup or look at the data, then run again"
            ) from None

    def _micro_batches(self, step: int) -> list[tuple[Batch, int]]:
        """Return this rank's micro-batches of a step, each with the target tokens of the global batch."""
        ids, micro_batch = self.sampler.ids(step), self.recipe.train.rows_per_pass
        share = rank_batches(self.rows, ids, self.dist_env.rank, self.dist_env.world_size, micro_batch)
        return [(batch.to(self.dist_env.device), global_targets(self.rows, ids)) for batch in share]

    def _evaluate(self, done: int) -> Row:
        assert self.eval_rows is not None
        evaluation = evaluate(
            self.model, self.eval_rows, self.dist_env, micro_batch=self.recipe.train.rows_per_pass, mixed=self.mixed,
            progress=lambda: self.reporter.progress(f"the evaluation after step {done}"),
        )  # fmt: skip
        self.eval_loss = evaluation.loss
        return evaluation.metrics

    def _save(self, done: int) -> None:
        eval_loss = self.eval_loss if self._is_evaluated(done) else None
        self._await_upload()
        # Delivered before the checkpoint is: whatever the last report did not carry is in the manifest.
        self.reporter.flush()
        self.reporter.progress(f"the checkpoint of step {done}", brief=False)
        manifest = Manifest(
            done, self.identity, self.recipe.to_dict(), eval_loss, self.recent, states_of(self.hooks),
            self.peak_bytes, self._elapsed_s(),
        )  # fmt: skip
        storage = self.recipe.storage
        state, write_history = self.updater.state(), self.history.writer()
        self.checkpoints.start(manifest, state, storage.keep, storage.num_to_keep, write_history)
        self.recent = []

    def _await_upload(self) -> None:
        """Wait until the checkpoint that is being uploaded counts, and say so if it does not yet."""
        step, began = self.checkpoints.uploading, time.perf_counter()
        if step is not None:
            self._doing(f"waiting until the checkpoint of step {step} is uploaded")
            self.checkpoints.finish()
            self.upload_wait_s = time.perf_counter() - began

    def _elapsed_s(self) -> float:
        return self.earlier_s + time.perf_counter() - self.began

    def _is_evaluated(self, done: int) -> bool:
        if self.eval_rows is None:
            return False
        # Every checkpoint that is ranked needs a loss of its own.
        ranked = self.recipe.storage.keep == "best" and self._due(done, self.save_every)
        return ranked or self._due(done, self.eval_every)

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.total_steps

    def _seed(self, step: int) -> None:
        """Seed the global stream, from which dropout draws, by step and rank: a function of the position."""
        torch.manual_seed(derive(self.recipe.seed, "dropout", step, self.dist_env.rank))

    def _is_metered(self, nth: int, ids: RowIds) -> bool:
        """Say whether the ``nth`` step of this session is measured, all ranks alike."""
        if not self.metered_steps or nth == 1:
            return nth in self.metered_steps
        # Gradients of the step are there from its second micro-batch on.
        first_batches = self.dist_env.world_size * self.recipe.train.rows_per_pass
        shows_mask = not self.mask_is_metered and self.rows.needs_mask(
            ids if len(ids) <= first_batches else ids[first_batches:]
        )
        is_metered = nth in self.metered_steps or (shows_mask and nth > max(self.metered_steps))
        self.mask_is_metered |= shows_mask and is_metered
        return is_metered

    @contextlib.contextmanager
    def _metered(self, nth: int) -> Iterator[None]:
        """Measure the footprint of the ``nth`` step of this session."""
        # In its second step DDP allocates the buckets anew, ordered by what it saw: the window counts them itself.
        hidden = bucket_bytes(self.model) if nth > 2 else 0
        with PeakMeter(self.dist_env.device, self._resident, hidden) as meter:
            yield
        assert meter.peak is not None
        self.peak_bytes = max(self.peak_bytes or 0, self.dist_env.max_over_ranks(meter.peak.allocated_bytes))

    def _held_bytes(self) -> Row:
        """Measure what this rank keeps on its device between steps, by the planner's terms."""
        state = self.updater.state()
        moments = [tensor for name, tensor in state.items() if name.startswith("optimizer.")]
        trained = [tensor for name, tensor in state.items() if name.startswith(("weights.", "master."))]

        def here(tensors: Iterable[torch.Tensor]) -> float:
            kind = self.dist_env.device.type  # what is offloaded is not there
            return float(storage_bytes(tensor for tensor in tensors if local(tensor).device.type == kind))

        frozen = here(resident_tensors(self.unwrapped, trained)) - here(trained)
        return {
            "held_bytes/weights": frozen,
            "held_bytes/trainable": here(trained),
            "held_bytes/optimizer": here(moments),
        }

    def _resident(self) -> Iterator[torch.Tensor]:
        return resident_tensors(self.unwrapped, self.updater.state().values())

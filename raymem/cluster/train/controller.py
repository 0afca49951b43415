"""Trains on Ray Train: builds the trainer, watches it, and returns the outcome or raises the user's own error."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from raymem.cluster.connection import worker_resources
from raymem.cluster.train.progress import MetricsPoller, ReportCallback, new_mailbox
from raymem.cluster.train.worker import config_of, train_worker
from raymem.errors import ClusterError
from raymem.recipe.axes import registered
from raymem.tracking import Tracker
from raymem.training.job import PreparedRun
from raymem.training.loop import Outcome
from raymem.training.reporter import Listener

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
START_ATTEMPTS = 10
"""The number of tries, of up to a minute each, to get resources; an autoscaler needs some minutes to bring a node."""


def train_workers(prepared: PreparedRun, tracker: Tracker, listeners: Sequence[Listener]) -> Outcome:
    """Run the worker group to its end; Ray restarts it after crashes, and the loop resumes from its checkpoints.

    raymem writes, finds and prunes checkpoints itself, so that local and Ray runs share them; Ray is not told of
    them, since its controller stops when one that it knows has been pruned.

    Raises:
        RaymemError: what a worker raised for the user.
        ClusterError: workers kept crashing, or never started.
    """
    recipe, scaling = prepared.recipe, prepared.recipe.scaling
    resources = worker_resources(scaling)
    mailbox = new_mailbox()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            **config_of(prepared),
            "threads": max(1, int(resources.get("CPU", 1))),
            "mailbox": mailbox,
        },
        # Both backends, so that host objects can be exchanged on GPU runs too.
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo",
            timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds()),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers, use_gpu=scaling.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=recipe.name,
            storage_path=prepared.storage.root,
            storage_filesystem=None if prepared.storage.is_local else prepared.storage.filesystem,
            callbacks=[ReportCallback((recipe.tracking.kind, tracker.spec(), registered()), mailbox)],
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=START_ATTEMPTS
            ),
        ),
    )
    with MetricsPoller(mailbox, listeners):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as failure:
            if (error := ray.get(mailbox.error.remote())) is not None:
                raise error from None
            raise ClusterError(_explain(failure, scaling.max_failures)) from failure
        except SystemExit:  # Ray's answer to Ctrl-C, and what its waits make of another signal
            raise KeyboardInterrupt from None
    if (error := ray.get(mailbox.error.remote())) is not None:
        raise error
    return Outcome(**result.return_value)


def _explain(failure: BaseException, max_failures: int) -> str:
    """Return the error for a worker group that failed, in one line."""
    causes = getattr(failure, "worker_failures", None) or {0: getattr(failure, "controller_failure", failure)}
    rank, cause = next(iter(sorted(causes.items())))
    lines = [line for line in str(cause).strip().splitlines() if line.strip()] or [type(cause).__name__]
    return (
        f"scaling: worker {rank} failed more than max_failures={max_failures} times, at last with: "
        f"{lines[-1].strip()}; the last checkpoint is kept: run the same command again to resume, "
        "with --verbose for the workers' output"
    )

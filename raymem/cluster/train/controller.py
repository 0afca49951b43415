"""Trains on Ray Train: builds the trainer, watches it, and returns the outcome or raises the user's own error."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import ray
import ray.train
from ray.train.torch import TorchTrainer

from raymem.cluster.connection import named_losses, session_directory, worker_resources
from raymem.cluster.train.failures import START_ATTEMPTS, explain
from raymem.cluster.train.progress import MetricsPoller, ReportCallback, new_mailbox
from raymem.cluster.train.rendezvous import Rendezvous
from raymem.cluster.train.watchdog import Watch, collective_timeout_s
from raymem.cluster.train.worker import config_of, train_worker
from raymem.errors import ClusterError
from raymem.recipe.axes import registered
from raymem.tracking import Tracker
from raymem.training.job import PreparedRun
from raymem.training.loop import Outcome
from raymem.training.reporter import Listener


def train_workers(prepared: PreparedRun, tracker: Tracker, listeners: Sequence[Listener]) -> Outcome:
    """Run the worker group to its end; Ray restarts it after crashes, and the loop resumes from its checkpoints.

    raymem writes, finds and prunes checkpoints itself, so that local and Ray runs share them; Ray is not told of
    them, since its controller stops when one that it knows has been pruned. What it would write into the storage, such
    as a marker, goes into the directory of its session.

    Raises:
        RaymemError: what a worker raised for the user.
        ClusterError: workers kept crashing, or never started.
    """
    recipe, scaling = prepared.recipe, prepared.recipe.scaling
    resources = worker_resources(scaling)
    mailbox = new_mailbox()
    waiting_s = int(collective_timeout_s(scaling.hang_timeout_s))
    # Ray's own check of processes that do not answer; the watchdog's comes before it and says more.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(waiting_s)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            **config_of(prepared),
            "threads": max(1, int(resources.get("CPU", 1))),
            "mailbox": mailbox,
        },
        # Both backends, so that host objects can be exchanged on GPU runs too.
        torch_config=Rendezvous(
            backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo",
            timeout_s=waiting_s,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers, use_gpu=scaling.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=recipe.name,
            storage_path=tempfile.mkdtemp(prefix="train-", dir=session_directory()),
            callbacks=[ReportCallback((recipe.tracking.kind, tracker.spec(), registered()), mailbox)],
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=START_ATTEMPTS
            ),
        ),
    )
    with named_losses("the run"), MetricsPoller(mailbox, listeners), Watch(mailbox, scaling.hang_timeout_s) as watch:
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as failure:
            if (error := ray.get(mailbox.error.remote())) is not None:
                raise error from None
            failures = ray.get(mailbox.failures.remote())
            raise ClusterError(explain(failure, failures, watch.killed, scaling)) from failure
        except SystemExit:  # Ray's answer to Ctrl-C, and what its waits make of another signal
            raise KeyboardInterrupt from None
        if (error := ray.get(mailbox.error.remote())) is not None:
            raise error
    return Outcome(**result.return_value)

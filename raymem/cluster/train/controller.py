"""Trains on Ray Train: builds the trainer, watches it, and returns the outcome or raises the user's own error."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from raymem.cluster.connection import named_losses, session_directory, worker_resources
from raymem.cluster.train.callbacks import GroupCallback, ReportCallback
from raymem.cluster.train.failures import START_ATTEMPTS, explain
from raymem.cluster.train.follow import Follow
from raymem.cluster.train.mailbox import new_mailbox
from raymem.cluster.train.rendezvous import Rendezvous
from raymem.cluster.train.watchdog import Watch, collective_timeout_s
from raymem.cluster.train.worker import STOPPED_AT, config_of, train_worker
from raymem.errors import ClusterError
from raymem.recipe.axes import registered
from raymem.stopping import Stopped
from raymem.tracking import Tracker
from raymem.training.job import PreparedRun
from raymem.training.loop import Outcome
from raymem.training.reporter import Audience


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer, which a Ctrl-C ends like any other signal.

    Its own answer to Ctrl-C waits for the controller to end the workers, is silent meanwhile, and does not hear a
    second one; workers end with their driver anyway.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def train_workers(prepared: PreparedRun, tracker: Tracker, audience: Audience) -> Outcome:
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
    trainer = _Trainer(
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
            callbacks=[
                ReportCallback((recipe.tracking.kind, tracker.spec(), registered()), mailbox),
                GroupCallback(mailbox),
            ],
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=START_ATTEMPTS
            ),
        ),
    )
    audience.status("starting Ray Train")
    follow = Follow(mailbox, audience, scaling)
    with named_losses("the run"), follow, Watch(mailbox, scaling.hang_timeout_s) as watch:
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as failure:
            if (error := ray.get(mailbox.error.remote())) is not None:
                raise error from None
            failures = ray.get(mailbox.failures.remote())
            raise ClusterError(explain(failure, failures, watch.killed, scaling)) from failure
        except SystemExit:  # what Ray's waits make of a signal
            raise KeyboardInterrupt from None
        if (error := ray.get(mailbox.error.remote())) is not None:
            raise error
    if STOPPED_AT in result.return_value:
        raise Stopped(result.return_value[STOPPED_AT])
    return Outcome(**result.return_value)

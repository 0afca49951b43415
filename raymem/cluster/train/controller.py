"""Runs groups of workers on Ray Train: builds the trainer, watches it, and returns the outcome or raises the user's own
error."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from raymem.cluster.connection import named_losses, session_directory, worker_resources
from raymem.cluster.train.callbacks import FailureCallback, GroupCallback, ReportCallback
from raymem.cluster.train.failures import START_ATTEMPTS, TRAINING, Again, explain
from raymem.cluster.train.follow import Follow
from raymem.cluster.train.mailbox import new_mailbox
from raymem.cluster.train.rendezvous import Rendezvous
from raymem.cluster.train.watchdog import Watch, collective_timeout_s
from raymem.cluster.train.worker import STOPPED_AT, config_of, train_worker
from raymem.errors import ClusterError
from raymem.recipe.schema import ScalingSection
from raymem.stopping import Stopped
from raymem.training.checkpoint import FOLDER
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


def train_workers(prepared: PreparedRun, audience: Audience) -> Outcome:
    """Train with a group of workers; Ray restarts it after crashes, and the loop resumes from its checkpoints.

    raymem writes, finds and prunes checkpoints itself, so that local and Ray runs share them; Ray is not told of
    them, since its controller stops when one that it knows has been pruned.

    Raises:
        RaymemError: what a worker raised for the user.
        ClusterError: workers kept crashing, or never started.
    """
    recipe, mailbox = prepared.recipe, new_mailbox(prepared.run.join(FOLDER))
    value = run_workers(
        train_worker, config_of(prepared), recipe.scaling, mailbox, audience,
        name=recipe.name, what="the run", again=TRAINING, callbacks=[ReportCallback(mailbox)],
    )  # fmt: skip
    if STOPPED_AT in value:
        raise Stopped(value[STOPPED_AT])
    return Outcome(**value)


def run_workers(
    worker: Callable[[dict[str, Any]], Any], config: dict[str, Any], scaling: ScalingSection, mailbox: Any,
    audience: Audience, *, name: str, what: str, again: Again, callbacks: Sequence[ray.train.UserCallback] = (),
) -> Any:  # fmt: skip
    """Run a group of workers to its end, and return what rank 0 returned; Ray starts it again after crashes.

    What Ray would write into the storage, such as a marker, goes into the directory of its session.

    Args:
        worker: the function of each worker; gets ``config`` with ``threads`` and the ``mailbox``.
        name: of the group, for Ray.
        what: that is lost if a process of Ray itself is; for people.
        again: how the work goes on after a failure.

    Raises:
        RaymemError: what a worker sent to the mailbox.
        ClusterError: workers kept crashing, or never started.
    """
    resources = worker_resources(scaling)
    waiting_s = int(collective_timeout_s(scaling.hang_timeout_s))
    # Ray's own check of processes that do not answer; the watchdog's comes before it and says more.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(waiting_s)
    trainer = _Trainer(
        worker,
        train_loop_config={**config, "threads": max(1, int(resources.get("CPU", 1))), "mailbox": mailbox},
        # Both backends, so that host objects can be exchanged on GPU runs too.
        torch_config=Rendezvous(
            backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo",
            timeout_s=waiting_s,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers, use_gpu=scaling.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=tempfile.mkdtemp(prefix="train-", dir=session_directory()),
            callbacks=[*callbacks, FailureCallback(mailbox), GroupCallback(mailbox, saves=again is TRAINING)],
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=START_ATTEMPTS
            ),
        ),
    )
    audience.status("starting Ray Train")
    follow = Follow(mailbox, audience, scaling, again)
    with named_losses(what), follow, Watch(mailbox, scaling.hang_timeout_s, again.start) as watch:
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as failure:
            if (error := ray.get(mailbox.error.remote())) is not None:
                raise error from None
            failures = ray.get(mailbox.failures.remote())
            raise ClusterError(explain(failure, failures, watch.killed, scaling, again)) from failure
        except SystemExit:  # what Ray's waits make of a signal
            raise KeyboardInterrupt from None
        if (error := ray.get(mailbox.error.remote())) is not None:
            raise error
    return result.return_value

"""Calls a function on every worker of a group that shares a model."""

from __future__ import annotations

from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch

from raymem.cluster.train.controller import run_workers
from raymem.cluster.train.failures import CALL
from raymem.cluster.train.mailbox import new_mailbox, warnings_to_driver
from raymem.cluster.train.pulse import Pulse
from raymem.errors import RaymemError, TransientStorageError
from raymem.memory.heap import give_freed_memory_back
from raymem.recipe.axes import register_again, registered
from raymem.recipe.schema import ScalingSection
from raymem.training.dist_env import DistEnv
from raymem.training.job import GroupTask
from raymem.training.reporter import Audience, Status

Value = TypeVar("Value")


def call_on_workers(
    function: GroupTask[Value], config: dict[str, Any], scaling: ScalingSection, status: Status
) -> Value:  # fmt: skip
    """Call ``function`` on each rank of a new group, and return what rank 0 returned; after a crash all is done again.

    Args:
        function: of a module that the workers can import.

    Raises:
        RaymemError: what it raised for the user, on any rank.
        ClusterError: workers kept crashing, or never started.
    """
    call = {"function": function, "config": config, "scaling": scaling.model_dump(), "kinds": registered()}
    name = getattr(function, "__name__", "group")
    value: Value = run_workers(
        call_worker, call, scaling, new_mailbox(), Audience(status=status),
        name=name, what="the work of the group", again=CALL,
    )  # fmt: skip
    return value


def call_worker(call: dict[str, Any]) -> Any:
    """Make this rank's call; this is the entry point of a worker.

    Returns:
        The function's value; None if the group ended for good before and Ray merely retried.
    """
    mailbox = call["mailbox"]
    if ray.get(mailbox.error.remote()) is not None:
        return None
    register_again(call["kinds"])
    scaling = ScalingSection.model_validate(call["scaling"])
    if not scaling.use_gpu:
        torch.set_num_threads(call["threads"])
        give_freed_memory_back()  # the process ends with the call
    context = ray.train.get_context()
    rank = context.get_world_rank()
    device = ray.train.torch.get_device() if scaling.use_gpu else None
    pulse = Pulse(mailbox, rank, scaling.hang_timeout_s)

    def doing(what: str, *, brief: bool = True, told: bool = False) -> None:
        pulse.progress(what, brief, told)

    try:
        with pulse, warnings_to_driver(mailbox, rank):
            value = call["function"](call["config"], DistEnv.of(scaling, context.get_local_rank(), device), doing)
            return value if rank == 0 else None
    except TransientStorageError:
        raise  # a crash: Ray starts the group again, when the storage may be back
    except RaymemError as error:
        ray.get(mailbox.fail.remote(error))
        raise

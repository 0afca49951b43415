"""Work of raymem in processes that may not take more than so much memory; at the top of a module, for Ray's workers.

The limit is RLIMIT_DATA: it counts what a process writes to and shares with nobody. A limit of the address space would
also count the files of a model, which are mapped whole and read by parts, and Ray's store of objects; the highest mark
of resident memory cannot be limited at all; and a cgroup needs rights that tests do not have everywhere.
"""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

import torch.distributed as dist

from raymem.errors import DataError
from raymem.runs.evaluate import evaluation_task
from raymem.runs.inference.generate import generation_task
from raymem.training.dist_env import DistEnv
from raymem.training.job import Doing
from tests.helpers.resident import status_bytes


def limited_evaluation(config: dict[str, Any], dist_env: DistEnv, doing: Doing) -> Any:
    """Evaluate under ``config["limit_bytes"]``, once a tiny model was evaluated without: imports are not limited."""
    return _limited(evaluation_task, config, dist_env, doing)


def limited_generation(config: dict[str, Any], dist_env: DistEnv, doing: Doing) -> Any:
    return _limited(generation_task, config, dist_env, doing)


def _limited(task: Any, config: dict[str, Any], dist_env: DistEnv, doing: Doing) -> Any:
    task(config["tiny"], dist_env, doing)
    limit = status_bytes("VmData") + config["limit_bytes"]
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        return task(config["large"], dist_env, doing)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def die_on_rank_1(config: dict[str, Any], dist_env: DistEnv, doing: Doing) -> int:
    """Kill the process of rank 1 while the others wait for it."""
    if dist_env.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist_env.barrier()
    return dist_env.world_size


def refuse_on_rank_1(config: dict[str, Any], dist_env: DistEnv, doing: Doing) -> int:
    """Raise a user's error on rank 1 while the others wait for it."""
    if dist_env.rank == 1:
        raise DataError("mine: 1 is wrong; take 2")
    dist_env.barrier()
    return dist_env.world_size


def ranks(config: dict[str, Any], dist_env: DistEnv, doing: Doing) -> dict[str, Any]:
    """What the group looks like to this rank."""
    doing("looking", told=True)
    everyone: list[Any] = [None] * dist_env.world_size
    dist.all_gather_object(everyone, (dist_env.rank, os.getpid()))
    return {"rank": dist_env.rank, "everyone": everyone, "strategy": dist_env.strategy, **config}

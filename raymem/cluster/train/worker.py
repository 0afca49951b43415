"""Runs a Ray Train worker's share of the one training loop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raymem.cluster.train.mailbox import warnings_to_driver
from raymem.cluster.train.progress import RayReporter
from raymem.cluster.train.pulse import Pulse
from raymem.errors import RaymemError, TransientStorageError
from raymem.recipe.axes import register_again, registered
from raymem.recipe.schema import Recipe
from raymem.stopping import Stopped
from raymem.storage.identity import held, identify
from raymem.storage.leases.cells import run_cell
from raymem.storage.leases.held import holder_of
from raymem.storage.leases.lease import watched
from raymem.storage.storage import Storage
from raymem.training.data.packed.shared import localise, to_dict
from raymem.training.dist_env import DistEnv
from raymem.training.job import PreparedRun
from raymem.training.loop import run

STOPPED_AT = "stopped_at"
"""The key of the step at which a run was stopped."""


def config_of(prepared: PreparedRun) -> dict[str, Any]:
    """Return the plain data that :func:`train_worker` takes."""
    return {
        "recipe": prepared.recipe.to_dict(),
        "kinds": registered(),
        "run": prepared.run.path,
        "lease": holder_of(prepared.run.root),
        "storage_id": identify(Path(prepared.storage.root)) if prepared.storage.is_local else None,
        "train_data": to_dict(prepared.train_data),
        "eval_data": prepared.eval_data and to_dict(prepared.eval_data),
        "predicted_peak_bytes": prepared.predicted_peak_bytes,
    }


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """Train; this is the entry point of a worker.

    Args:
        config: what :func:`config_of` makes on the driver; of raymem's own driver also ``threads`` and the ``mailbox``
            for errors.

    Returns:
        :meth:`raymem.training.loop.Outcome.to_dict`; if the driver wanted the run to end, the last step under
        :data:`STOPPED_AT`, which is saved; None if the run ended for good before and Ray merely retried.
    """
    mailbox = config.get("mailbox")
    if mailbox is not None and ray.get(mailbox.error.remote()) is not None:
        return None
    register_again(config["kinds"])
    recipe = Recipe.model_validate(config["recipe"])
    if not recipe.scaling.use_gpu and "threads" in config:
        torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if recipe.scaling.use_gpu else None
    rank = context.get_world_rank()
    pulse = Pulse(mailbox, rank, recipe.scaling.hang_timeout_s)
    try:
        with pulse, nullcontext() if mailbox is None else warnings_to_driver(mailbox, rank):
            dist_env = DistEnv.current(recipe, context.get_local_rank(), device)
            storage = recipe.storage.open()
            with (
                held(Path(storage.root), config["storage_id"]) if storage.is_local else nullcontext(),
                _watched(storage, recipe.name, config["lease"]),
            ):
                train_data = localise(config["train_data"], storage)
                eval_data = config["eval_data"] and localise(config["eval_data"], storage)
                run_storage = Storage.open(config["run"], storage.retry_for_s)
                reporter = RayReporter(dist_env, pulse, mailbox)
                predicted = config["predicted_peak_bytes"]
                outcome = run(
                    recipe, dist_env, run_storage, train_data, eval_data, reporter, predicted_peak_bytes=predicted
                )
                return outcome.to_dict()
    except Stopped as stop:
        return {STOPPED_AT: stop.step}
    except TransientStorageError:
        raise  # a crash: Ray starts the group again, when the storage may be back
    except RaymemError as error:
        if mailbox is not None:
            ray.get(mailbox.fail.remote(error))
        raise


def _watched(storage: Storage, name: str, holder: str | None) -> AbstractContextManager[None]:
    """Return the context in which this worker stops once its driver has lost the run; without a lease it never does."""
    if holder is None:
        return nullcontext()
    run = storage.child(name)
    return watched(run_cell(storage, name), run.path, run.root, holder)

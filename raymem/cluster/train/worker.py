"""What every Ray Train worker runs: its share of the one training loop."""

from __future__ import annotations

from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raymem.cluster.train.progress import RayReporter
from raymem.errors import RaymemError
from raymem.recipe.schema import Recipe
from raymem.storage.storage import Storage
from raymem.training.data.shared import localise
from raymem.training.dist_env import Layout
from raymem.training.loop import run


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """Entry point of a worker.

    Args:
        config: plain data from the driver: ``recipe``, ``run`` (path or URI of the run), ``train_data`` and
            ``eval_data`` (:func:`raymem.training.data.shared.to_dict`), ``threads``, ``mailbox``.

    Returns:
        :meth:`raymem.training.loop.Outcome.to_dict`; None if the run ended for good before and Ray merely retried.
    """
    mailbox = config["mailbox"]
    if ray.get(mailbox.error.remote()) is not None:
        return None
    recipe = Recipe.model_validate(config["recipe"])
    if not recipe.scaling.use_gpu:
        torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if recipe.scaling.use_gpu else None
    try:
        layout = Layout.current(recipe, context.get_local_rank(), device)
        storage = Storage.open(recipe.storage.path)
        train_data = localise(config["train_data"], storage)
        eval_data = config["eval_data"] and localise(config["eval_data"], storage)
        return run(recipe, layout, Storage.open(config["run"]), train_data, eval_data, RayReporter(layout)).to_dict()
    except RaymemError as error:
        ray.get(mailbox.fail.remote(error))
        raise

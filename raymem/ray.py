"""What one's own Ray Train ``TorchTrainer`` imports from raymem: tracking, a check of memory, or a whole recipe.

::

    TorchTrainer(
        train_loop,
        scaling_config=scaling,
        run_config=ray.train.RunConfig(name="mine", callbacks=[MLflowCallback("mine", "http://mlflow:5000")]),
    ).fit()

    budget_check(scaling, raymem.plan_module(...))  # before fit(): does a worker have the memory?

    TorchTrainer(train_worker, train_loop_config=worker_config("my.yaml"), scaling_config=...).fit()

The trainer is the user's, with its scaling, failure handling and callbacks. With ``train_worker`` the loop and its
checkpoints are raymem's, and a run of the same name on the same storage is resumed, by this or by ``raymem train``.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from raymem.api import RecipeLike, load_recipe
from raymem.cluster.train.progress import paced_reporter
from raymem.cluster.train.worker import config_of, train_worker
from raymem.cluster.trainers.budget import budget_check
from raymem.cluster.trainers.mlflow_callback import MLflowCallback
from raymem.errors import RecipeError
from raymem.runs.prepare import prepare
from raymem.runs.resolve import note_start, resolve
from raymem.runs.train import build_demo

__all__ = ["MLflowCallback", "budget_check", "paced_reporter", "train_worker", "worker_config"]

log = logging.getLogger(__name__)


def worker_config(recipe: RecipeLike) -> dict[str, Any]:
    """Check a recipe, prepare its data, and return what every worker needs, as plain data.

    Of ``scaling``, only ``use_gpu`` and ``strategy`` count for the workers: the trainer's ``ScalingConfig`` says how
    many there are and what each gets. Rows of metrics go through ``ray.train.report``; what the recipe says of
    ``tracking`` does not count, so give the trainer an :class:`MLflowCallback`. Nobody watches for ranks that hang
    (``scaling.hang_timeout``).

    Raises:
        RecipeError: it asks for what ``raymem train`` does beside the workers: judging answers, pushing the result.
        RaymemError: the recipe, its model or its data cannot be used.
    """
    loaded = load_recipe(recipe)
    for setting, value, cure in (
        ("train.score_every", loaded.train.score_every, "raymem evaluate judges the result"),
        ("export.push_to_hub", loaded.export.push_to_hub, "raymem push uploads the result"),
    ):
        if value is not None:
            raise RecipeError(f"{setting}: {value} is the work of raymem train, not of workers; leave it out: {cure}")
    run = resolve(loaded, build_demo=partial(build_demo, status=log.info))
    prepared = prepare(run, status=log.info)
    run.storage.check_writable()
    note_start(run)
    return config_of(prepared)

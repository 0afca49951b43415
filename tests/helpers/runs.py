"""Recipes of Ray runs that take a second once they have started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raymem.recipe.schema import Recipe
from tests.helpers.support import make_recipe, run_fragment, train


def ray_recipe(model: Path, examples: Path, storage: Path, name: str, **sections: Any) -> Recipe:
    """40 steps of LoRA with dropout (so that random streams matter), a checkpoint every 4."""
    steps = {"steps": 40, "global_batch": 8, "micro_batch": 2, "eval_every": 10, "save_every": 4, "warmup": 0}
    return make_recipe(
        {
            "name": name,
            "adapter": {"dropout": 0.1},
            "train": steps,
            "scaling": {"resources_per_worker": {"CPU": 1}},
        },
        run_fragment(examples, storage, evaluated=True),
        sections,
        model=model,
    )


def train_here(recipe: Recipe) -> list[float]:
    """Train in this process, or group of processes, without Ray; returns the losses."""
    _, rows = train(recipe)
    return [row["loss"] for row in rows]


MONITOR = """1 worker(s) were killed due to the node running low on memory. Memory on the node was 4.15GB used / 4.2GB limit
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(0393): job ID=01, task name=ImplicitFunc.__init__, pid=32699, actual memory used=2.16GB, worker ID={})
(Actor(21aa): job ID=01, task name=ImplicitFunc.__init__, pid=32700, actual memory used=0.11GB, worker ID=d50a)
]"""  # noqa: E501 - as Ray 2.60 writes it

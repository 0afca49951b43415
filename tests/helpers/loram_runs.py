"""A LoRAM recipe that takes seconds, and what its stages leave."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from raymem.recipe.schema import Recipe
from raymem.runs.loram.pipeline import Pipeline
from tests.helpers.support import make_recipe, run_fragment

STAGES = ("prune", "align", "train", "recover", "evaluate")
BASE: dict[str, Any] = {
    "kind": "loram",
    "criterion": "taylor",
    "layer_ratios": [0.5, 0.75],
    "calibration_texts": 4,
    "calibration_length": 16,
}
ALIGN = {"train": {"steps": 2, "global_batch": 4, "micro_batch": 4, "save_every": 1}, "optimizer": {"lr": 1e-3}}


def loram_recipe(model: Path, examples: Path, storage: Path, *, align: bool = True, **sections: Any) -> Recipe:
    """Taylor pruning, two steps of alignment, four of LoRA; in this process unless ``scaling`` says otherwise."""
    base = {**BASE, "align": ALIGN} if align else BASE
    fragment = {"name": "small", "base": base, "train": {"save_every": 2}}
    return make_recipe(fragment, run_fragment(examples, storage, evaluated=True), sections, model=model)


def run_stages(pipeline: Pipeline, stages: tuple[str, ...] = STAGES) -> None:
    for stage in stages:
        getattr(pipeline, stage)()


def files_of(storage: Path) -> dict[str, bytes]:
    """What the stages leave, but for the files that name the storage."""
    kinds = ("*.safetensors", "loram_manifest.json", "model.safetensors.index.json", "evaluate.json")
    found = {path for kind in kinds for path in storage.rglob(kind) if "checkpoints" not in path.parts}
    return {path.relative_to(storage).as_posix(): path.read_bytes() for path in found}


def identities(storage: Path) -> dict[str, tuple[int, int]]:
    """Which files they are and when they were written last: a stage that is done leaves its own alone."""
    return {name: ((storage / name).stat().st_ino, (storage / name).stat().st_mtime_ns) for name in files_of(storage)}


def dying_run(recipe: Recipe, stage: str, rename: int) -> dict[str, int]:
    """All stages; in one of them this process is killed at the n-th time that a file takes its final name.

    An even n dies before the rename, an odd one behind it. Returns the renames of every stage if nothing dies.
    """
    counts: dict[str, int] = {}
    now = ""
    originals = {name: getattr(os, name) for name in ("rename", "replace")}

    def counting(name: str) -> Any:
        def move(*arguments: Any, **options: Any) -> None:
            if "/.making-" in str(arguments[0]):  # an empty directory of the cache
                originals[name](*arguments, **options)
                return
            counts[now] = counts.get(now, 0) + 1
            last = now == stage and counts[now] == rename
            if last and rename % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            originals[name](*arguments, **options)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        return move

    for name in originals:
        setattr(os, name, counting(name))
    pipeline = Pipeline(recipe)
    for now in STAGES:
        run_stages(pipeline, (now,))
    return counts

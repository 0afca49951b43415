"""Build a demo model by pre-training it on Python's standard library; resumable, kept in the content-keyed cache.

python benchmarks/make_base.py --model demo-long --storage raymem-runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

from raymem.cli.console import TrainingDisplay, hush_libraries
from raymem.recipe.load import MODELS
from raymem.runs import demo
from raymem.runs.train import launch
from raymem.storage.storage import Storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="demo-long")
    parser.add_argument("--storage", default="raymem-runs", help="storage.path of the recipes that will use it")
    arguments = parser.parse_args()
    hush_libraries()
    recipe = demo.pretraining_recipe(arguments.model, Storage.open(str(Path(arguments.storage).resolve())))
    if demo.finished_model(recipe) is None:
        with TrainingDisplay(recipe.train.steps) as display:
            launch(recipe, listeners=[display.show], status=display.status)
        demo.discard_checkpoints(recipe)
    print(demo.finished_model(recipe))


if __name__ == "__main__":
    main()

"""Train a recipe: ``ray job submit --working-dir . -- python jobs/finetune.py jobs/recipes/quickstart.yaml``.

Takes what ``raymem train`` takes.
"""

import sys

from raymem.cli import run_app

if __name__ == "__main__":
    sys.exit(run_app("train", *sys.argv[1:]))

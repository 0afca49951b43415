"""Evaluate what a recipe left: ``ray job submit --working-dir . -- python jobs/evaluate.py RECIPE``.

Takes what ``raymem evaluate`` takes.
"""

import sys

from raymem.cli import run_app

if __name__ == "__main__":
    sys.exit(run_app("evaluate", *sys.argv[1:]))

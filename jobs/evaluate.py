"""Evaluate what a recipe left: ``ray job submit --working-dir . -- python jobs/evaluate.py RECIPE``.

The same as ``python -m raymem evaluate``, and takes what that takes.
"""

import sys

from raymem.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()

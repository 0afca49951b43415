"""Train a recipe: ``ray job submit --working-dir . -- python jobs/finetune.py jobs/recipes/quickstart.yaml``.

The same as ``python -m raymem train``, and takes what that takes.
"""

import sys

from raymem.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()

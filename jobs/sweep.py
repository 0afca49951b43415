"""Search recipes: ``ray job submit --working-dir . -- python jobs/sweep.py RECIPE --space joint --budget 12GiB``.

The same as ``python -m raymem sweep``, and takes what that takes.
"""

import sys

from raymem.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    main()

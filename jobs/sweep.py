"""Search recipes: ``ray job submit --working-dir . -- python jobs/sweep.py RECIPE --space joint --budget 12GiB``.

Takes what ``raymem sweep`` takes.
"""

import sys

from raymem.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    main()

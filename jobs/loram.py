"""All stages of LoRAM: ``ray job submit --working-dir . -- python jobs/loram.py jobs/recipes/loram.yaml``.

The same as ``python -m raymem loram run``, and takes what that takes.
"""

import sys

from raymem.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["loram", "run"]
    main()

"""``python -m raymem``: the ``raymem`` command by an interpreter of one's choice, as the jobs of a cluster start it."""

from raymem.cli.main import main

if __name__ == "__main__":
    main()

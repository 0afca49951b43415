"""Random and broken input of every kind: each is a value or one short sentence, soon, and in little memory.

``python -m tests.fuzz --help`` tries many; ``test_fuzz.py`` tries a few, always the same.
"""

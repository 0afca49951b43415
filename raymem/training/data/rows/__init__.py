"""Reads rows of each kind of file, within limits of their size and depth."""

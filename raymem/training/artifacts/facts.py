"""Names the file with raymem's own facts in the directory of a result."""

FACTS = "raymem.json"
"""The facts that no standard file has, beside these and written last: with it the directory is whole."""

"""Keeps names that manifests and indexes give, and links that directories hold, inside their directory."""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def is_inside(name: object) -> bool:
    """Say whether a name out of a file is one of a file below its directory."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def leads_out(path: Path, directory: Path) -> bool:
    """Say whether a file of a directory is a link to somewhere else; what is copied from there may be a secret.

    The cache of the Hugging Face hub has its files in ``blobs``, beside ``snapshots/<commit>`` with links to them.
    """
    target, directory = path.resolve(), directory.resolve()
    homes = [directory]
    if directory.parent.name == "snapshots":
        homes.append(directory.parent.parent / "blobs")
    return not any(target.is_relative_to(home) for home in homes)

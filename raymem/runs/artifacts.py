"""Gives local files of artefacts, which may lie on an object store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from raymem.storage.storage import Storage
from raymem.storage.unfinished import temporary
from raymem.training.artifacts.export import FACTS


@contextlib.contextmanager
def local_copy(location: str) -> Iterator[str]:
    """Yield a local directory with the artefact at ``location``; of ``s3://`` and ``gs://`` it is a temporary copy.

    Raises:
        StorageError: it cannot be fetched.
    """
    if "://" not in location:
        yield location
        return
    parent, _, rest = location.partition("?")
    base, _, name = parent.rpartition("/")
    with temporary("artifact") as folder:
        directory = Path(folder) / name
        Storage.open(f"{base}?{rest}" if rest else base).download_dir(name, directory, last=FACTS)
        yield str(directory)

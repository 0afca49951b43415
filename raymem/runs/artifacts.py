"""Gives local files of artefacts, which may lie on an object store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from raymem.cache import cache_root
from raymem.errors import ModelError
from raymem.recipe.paths import is_local
from raymem.recipe.schema import ModelSection
from raymem.storage.storage import Storage
from raymem.storage.unfinished import temporary
from raymem.training.artifacts.facts import FACTS
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import fetch
from raymem.training.model.smollm2 import located


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


@contextlib.contextmanager
def local_or_downloaded(location: str) -> Iterator[str]:
    """Yield as :func:`local_copy`; an id of the Hugging Face hub is downloaded into its cache, so is ``smollm2``.

    Raises:
        StorageError: it cannot be fetched.
        ModelError: no directory and no such id.
    """
    named = located(ModelSection(name=location), cache_root()).name or location
    if "://" in named or is_local(named) or named.count("/") != 1:
        with local_copy(named) as directory:
            yield directory
        return
    try:
        downloaded = fetch(named, None, DistEnv(), weights_too=True)
    except ModelError as error:
        raise ModelError(str(error).removeprefix("model.name: ")) from None
    yield str(downloaded)

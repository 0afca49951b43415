"""Gives local files of artefacts, which may lie on an object store."""

from __future__ import annotations

from raymem.cache import cache_root
from raymem.errors import ModelError, StorageError
from raymem.recipe.paths import is_local
from raymem.recipe.schema import ModelSection
from raymem.storage.checksums import CHECKSUMS
from raymem.storage.remote.copies import fetched
from raymem.storage.remote.files import directory_at
from raymem.training.artifacts.facts import FACTS
from raymem.training.dist_env import DistEnv
from raymem.training.model.build import fetch
from raymem.training.model.smollm2 import located


def local_copy(location: str) -> str:
    """Return the local directory of an artefact; one on ``s3://`` or ``gs://`` is fetched once per node.

    Raises:
        StorageError: it cannot be fetched, or is not there, whole.
    """
    if "://" not in location:
        return location
    there = directory_at(location)
    if not (there / FACTS).is_file() and (there / CHECKSUMS).is_file():
        raise StorageError(f"{location} has no {FACTS}: its upload never finished, or it was deleted; use another one")
    directory = fetched(location, ["*", "*/*"])
    if not any(path.is_file() for path in directory.iterdir()):
        raise StorageError(f"{location} has no files; check the address")
    return str(directory)


def local_or_downloaded(location: str) -> str:
    """Return as :func:`local_copy`; an id of the Hugging Face hub is downloaded into its cache, so is ``smollm2``.

    Raises:
        StorageError: it cannot be fetched.
        ModelError: no directory and no such id.
    """
    named = located(ModelSection(name=location), cache_root()).name or location
    if "://" in named or is_local(named) or named.count("/") != 1:
        return local_copy(named)
    try:
        downloaded = fetch(named, None, DistEnv(), weights_too=True)
    except ModelError as error:
        raise ModelError(str(error).removeprefix("model.name: ")) from None
    return str(downloaded)

"""Finds evaluation data that is trained on too, by contents, whatever the paths."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from raymem.errors import RaymemError
from raymem.recipe.data import Source
from raymem.training.data.readers import load_hub
from raymem.training.data.sources.copies import LocalFile, SourceFile, codec
from raymem.training.data.sources.index import IndexFiles
from raymem.training.data.sources.opened import OpenedSource, files_of, is_hub

log = logging.getLogger(__name__)


def also_trained_on(
    evaluated: OpenedSource,
    source: Source,
    train: Sequence[tuple[str, Source]],
    cache_dir: Path,
    index: IndexFiles,
) -> str | None:
    """Describe the contents that an evaluation source shares with training sources, or None.

    Training files whose size rules out that they are the same are not read. Sources that cannot be read are left to
    whoever trains on them.

    Args:
        train: place and source of each.
        index: indexes files.
    """
    shared: list[str] = []
    for where, trained in train:
        try:
            if is_hub(trained):
                if is_hub(source) and trained.path == source.path and _fingerprint(trained) == evaluated.identity[-1]:
                    shared.append(f"the same rows as {where}")
            elif evaluated.files:
                shared += _shared_files(evaluated, where, files_of(trained, where, cache_dir), index)
        except RaymemError as error:
            log.debug("%s cannot be compared with %s: %s", where, evaluated.where, error)
    return "; ".join(shared) or None


def _shared_files(evaluated: OpenedSource, where: str, files: Sequence[SourceFile], index: IndexFiles) -> Iterator[str]:
    by_content = dict(zip(evaluated.identity, evaluated.files, strict=True))
    for file in files:
        if not any(_may_be_same(file, other) for other in evaluated.files):
            continue
        (indexed,) = index([(file, where)])
        if (other := by_content.get(indexed.content)) is not None:
            alike = "is" if other.name == file.name else f"has the contents of {file.name},"
            yield f"{other.name} {alike} a file of {where}"


def _may_be_same(trained: SourceFile, evaluated: SourceFile) -> bool:
    """Say whether two files may be the same: sizes decide where known, since nothing is fetched for a comparison."""
    if codec(trained.name) == codec(evaluated.name):
        return trained.size == evaluated.size > 0
    return isinstance(trained, LocalFile)


def _fingerprint(source: Source) -> str:
    return str(load_hub(source.path, source.subset, source.split or "train", source.revision)._fingerprint)

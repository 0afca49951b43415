"""What a job upload would contain: measured with Ray's own walk, so that it is what Ray will really send."""

from __future__ import annotations

import os
from pathlib import Path

from raymem.errors import ClusterError

MAX_UPLOAD_BYTES = 100 << 20
"""The limit of Ray's dashboard for one upload."""


def packaged_files(working_dir: Path) -> dict[str, int]:
    """Bytes of each file that Ray would upload: relative name -> size; .gitignore and .rayignore are honoured."""
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(working_dir).as_posix()] = path.stat().st_size

    excludes = [_get_excludes(working_dir, ray_constants.get_runtime_env_default_excludes())]
    git = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(working_dir, excludes, note, include_gitignore=git, logger=_Silent())
    return sizes


def check_package(working_dir: Path, needed: list[str], limit_bytes: int = MAX_UPLOAD_BYTES) -> None:
    """Refuse an upload that is too large, or lacks a file or directory that the job needs.

    Raises:
        ClusterError: naming the five largest entries, or the missing file.
    """
    sizes = packaged_files(working_dir)
    for name in needed:
        if name not in sizes and not any(file.startswith(f"{name}/") for file in sizes):
            raise ClusterError(
                f"{name} exists in {working_dir} but .gitignore or .rayignore keeps it out of the upload; "
                "take it out of the ignore file"
            )
    total = sum(sizes.values())
    if total > limit_bytes:
        entries: dict[str, int] = {}
        for name, size in sizes.items():
            top, slash, _ = name.partition("/")
            entries[top + slash] = entries.get(top + slash, 0) + size
        largest = sorted(entries.items(), key=lambda item: -item[1])[:5]
        raise ClusterError(
            f"working directory {working_dir} would upload {_mib(total)}, more than the {_mib(limit_bytes)} that Ray "
            f"takes; largest: {', '.join(f'{name} {_mib(size)}' for name, size in largest)}; "
            "list what the job does not need in .rayignore, and keep data on the shared storage"
        )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"


class _Silent:
    def info(self, *args: object) -> None:
        """Ray announces every ignore file that it finds."""

    def error(self, *args: object) -> None:
        """The exception follows."""

"""Chooses the files of a job upload as Ray will, so that missing or too large files are reported before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pathspec

from raymem.errors import ClusterError

MAX_UPLOAD_BYTES = 100 << 20
"""The limit of Ray's dashboard for one upload."""
DEFAULT_EXCLUDES = ".git,.venv,venv,__pycache__"
"""Patterns that Ray leaves out, unless RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES names others."""


def packaged_files(working_dir: Path) -> dict[str, int]:
    """Map each file that Ray would upload to its bytes; .gitignore and .rayignore are honoured."""
    sizes: dict[str, int] = {}
    with_git = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    ignore_files = [".gitignore", ".rayignore"] if with_git else [".rayignore"]

    def visit(path: Path, rules: list[Callable[[Path], bool]]) -> None:
        lists = [path / name for name in ignore_files if (path / name).is_file()]
        rules = [*rules, *(_rule(path, file.read_text().splitlines()) for file in lists)]
        if any(is_excluded(path) for is_excluded in rules):
            return
        if path.is_file():
            sizes[path.relative_to(working_dir).as_posix()] = path.stat().st_size
        elif path.is_dir():
            for child in path.iterdir():
                visit(child, rules)

    defaults = os.environ.get("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", DEFAULT_EXCLUDES)
    visit(working_dir, [_rule(working_dir, [word.strip() for word in defaults.split(",") if word.strip()])])
    return sizes


def _rule(folder: Path, patterns: list[str]) -> Callable[[Path], bool]:
    """Say whether the patterns of a folder exclude a path below it."""
    spec = pathspec.PathSpec.from_lines("gitignore", patterns)
    return lambda path: spec.match_file(path.relative_to(folder))


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

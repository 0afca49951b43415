"""A storage whose mount goes away in the middle of a run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from raymem.errors import StorageError
from raymem.recipe.load import load_recipe
from raymem.runs.train import launch
from raymem.training.reporter import Row
from tests.helpers.run_files import result_bytes, write_recipe
from tests.helpers.small_disk import mount_small_disk
from tests.helpers.support import in_processes


def train_while_it_goes(recipe: Path, runs: Path) -> tuple[str, list[str], bytes] | None:
    """What the run says, what is below the mount then, and what a resumed run comes to; None without mounts."""
    if not mount_small_disk(runs, "20m"):
        return None
    away = runs.with_name("away")
    away.mkdir()

    def unmount(rows: Sequence[Row]) -> None:
        if rows[-1]["step"] == 3:
            subprocess.run(["mount", "--move", str(runs), str(away)], check=True)

    with pytest.raises(StorageError) as caught:
        launch(load_recipe(recipe), listeners=[unmount])
    below = sorted(os.listdir(runs))
    subprocess.run(["mount", "--move", str(away), str(runs)], check=True)
    launch(load_recipe(recipe))
    return str(caught.value), below, result_bytes(runs / "tiny")


def test_nothing_is_written_below_a_mount_that_is_gone(tmp_path: Path, llama: Path, examples: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", tmp_path, llama, examples)
    runs = tmp_path / "runs"
    runs.mkdir()
    (found,) = in_processes(train_while_it_goes, 0, tmp_path, recipe, runs)
    if found is None:
        pytest.skip("no private mount here")
    message, below, resumed = found
    assert message.startswith(f"storage.path: {runs} on ")
    assert "it has no .raymem-storage.json" in message
    assert message.endswith("mount the storage again, then run the same command again, which resumes")
    assert below == []
    assert resumed

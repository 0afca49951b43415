"""A full disk in other people's code: tokenizers, safetensors, pyarrow and sqlite each say it in words of their own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from raymem.errors import StorageError
from raymem.storage.errors import refusal, system_error, writing
from tests.helpers.commands import run_command
from tests.helpers.run_files import write_recipe
from tests.helpers.small_disk import mount_small_disk
from tests.helpers.support import in_processes


def on_small_disks(
    disk: Path, commands: Sequence[tuple[str, list[str]]]
) -> list[subprocess.CompletedProcess[str]] | None:
    """Run each command with an empty disk of its size; None where nothing can be mounted."""
    done = []
    for size, command in commands:
        if not mount_small_disk(disk, size):
            return None
        done.append(run_command(*command))
        left = {path.name for path in disk.rglob(".*")} - {".locks", ".raymem-storage.json"}
        assert not left, f"{command[0]} on {size} leaves {left}"

    return done


def test_every_command_says_it_in_a_sentence(tmp_path: Path, llama: Path, examples: Path) -> None:
    recipe = str(write_recipe(tmp_path / "tiny.yaml", tmp_path, llama, examples))
    disk = tmp_path / "disk"
    disk.mkdir()
    straight = run_command("train", recipe)
    assert straight.returncode == 0, straight.stderr
    adapter = str(tmp_path / "runs" / "tiny" / "adapter")
    here = ["-s", f"storage.path={disk}"]
    commands = [
        *((size, ["train", recipe, *here]) for size in ("4k", "24k", "64k", "160k", "240k")),
        *((size, ["data", recipe, *here]) for size in ("12k", "24k")),
        *((size, ["merge", adapter, "-o", f"{disk}/merged"]) for size in ("4k", "64k")),
        ("16k", ["export", adapter, "-o", f"{disk}/exported"]),
    ]
    (done,) = in_processes(on_small_disks, 0, tmp_path, disk, commands)
    if done is None:
        pytest.skip("no private mount here")
    sentence = re.compile(rf"(?m)^error: .*{disk}.*: no space left on the device \(.* free\); free some, or set .*\Z")
    bad = [
        f"{command[0]} on {size}: {one.returncode} {one.stderr}"
        for (size, command), one in zip(commands, done, strict=True)
        if one.returncode != 1 or "Traceback" in one.stderr or not sentence.search(one.stderr.strip())
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "words",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[Errno 28] Error writing bytes to file",
        "(sqlite3.OperationalError) database or disk is full",
    ],
)
def test_errors_of_libraries_are_known_by_their_words(tmp_path: Path, words: str) -> None:
    sentence = rf"cannot write {tmp_path}/x: no space left on the device \(.* free\)"
    with pytest.raises(StorageError, match=sentence), writing(tmp_path / "x"):
        raise RuntimeError(words)
    try:
        try:
            raise Exception(words)
        except Exception as inner:
            raise ValueError("the library gives up") from inner
    except ValueError as error:
        said = refusal(error)
    assert said is not None and "no space left on the device" in str(said)
    assert "TMPDIR or HF_HOME" in str(said)


def test_what_is_no_refusal_passes_through(tmp_path: Path) -> None:
    assert system_error(ValueError("28 rows")) is None
    assert refusal(FileNotFoundError(2, "no such file", "x")) is None
    with pytest.raises(ValueError, match="28 rows"), writing(tmp_path):
        raise ValueError("28 rows")
